"""Outputs of training rows at the parameters that training without each of them is predicted to give."""

from __future__ import annotations

import torch

from .._memory import rows_within
from .._types import Batch
from ..curvature import split_batch
from ..curvature.per_sample import jacobian_rows
from ..models import map_tensors
from .families import mean_of
from .fitted import Fitted

__all__ = ["own_outputs", "predictions_left_out"]


def predictions_left_out(fitted: Fitted, scale: str) -> torch.Tensor:
    """Return the outputs (n, ...) of each training row without it, or the means of the targets that they stand for."""
    found = []
    for _, batch, steps in fitted.remove().parts(fitted.most):
        outputs = own_outputs(fitted, batch, steps)
        found.append(outputs if scale == "link" else mean_of(fitted.model, outputs, batch)(outputs))
    return torch.cat(found)


def own_outputs(fitted: Fitted, batch: Batch, steps: torch.Tensor) -> torch.Tensor:
    """Return f + J step (m, ...) of each row of a batch and its own step (m, p).

    Linear in the step for any model: along what the data do not determine, such as the bias of a dead unit, steps may
    be long, and the outputs there are nothing that refits give (docs/benchmarks/README.md).
    """
    model = fitted.model
    with torch.no_grad():
        outputs: torch.Tensor = model.forward(map_tensors(torch.clone, batch)).detach()
    size = rows_within(3 * outputs[0].numel() * model.num_params * model.dtype.itemsize)
    parts = split_batch(batch, steps, size)
    change = torch.cat([(jacobian_rows(model, rows) @ part[:, :, None])[:, :, 0] for rows, part in parts])
    return outputs + change.reshape(outputs.shape)
