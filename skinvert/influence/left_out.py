"""Outputs of training rows, and of others, at the parameters that training without each row is predicted to give."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from .._memory import rows_within
from .._types import Batch
from ..curvature import split_batch
from ..curvature.per_sample import jacobian_rows
from ..models import Affine, TorchTwiceDifferentiable, leading_length, map_tensors
from .families import mean_of
from .fitted import Fitted
from .sides import moved

__all__ = ["is_linear", "own_outputs", "predictions_left_out"]


def predictions_left_out(fitted: Fitted, scale: str) -> torch.Tensor:
    """Return the outputs (n, ...) of each training row at the parameters without it, or the means of their targets."""
    found = []
    for _, batch, steps in fitted.remove().parts(fitted.most):
        outputs = own_outputs(fitted, batch, steps)
        found.append(outputs if scale == "link" else mean_of(fitted.model, outputs, batch)(outputs))
    return torch.cat(found)


def own_outputs(fitted: Fitted, batch: Batch, steps: torch.Tensor) -> torch.Tensor:
    """Return the outputs (m, ...) of each row of a batch after its own step (m, p)."""
    model = fitted.model
    if not is_linear(fitted):
        return torch.cat([_outputs(moved(model, step), row) for row, step in zip(_rows(batch), steps, strict=True)])
    outputs = _outputs(model, batch)
    size = rows_within(3 * outputs[0].numel() * model.num_params * model.dtype.itemsize)
    parts = split_batch(batch, steps, size)
    change = torch.cat([(jacobian_rows(model, rows) @ part[:, :, None])[:, :, 0] for rows, part in parts])
    return outputs + change.reshape(outputs.shape)


def is_linear(fitted: Fitted) -> bool:
    """Return whether outputs after a step are f + J step: to first order, and where they are linear in θ."""
    return fitted.removal == "first_order" or isinstance(fitted.model.module, Affine | nn.Linear)


def _outputs(model: TorchTwiceDifferentiable, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        outputs: torch.Tensor = model.forward(map_tensors(torch.clone, batch)).detach()
    return outputs


def _rows(batch: Batch) -> Iterator[Batch]:
    for i in range(leading_length(batch)):
        yield map_tensors(lambda tensor, i=i: tensor[i : i + 1], batch)
