"""Per-sample gradients and Jacobians, one row per sample."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..models import TorchTwiceDifferentiable, leading_length, map_tensors, row_axes, with_row_axis
from ..models.structural_copy import structural_copy

__all__ = ["gradient_rows", "jacobian_rows"]


def gradient_rows(model: TorchTwiceDifferentiable, batch: Any) -> torch.Tensor:
    """Return ∇sᵢ of each row of a batch, (m, p); sᵢ is the loss before the average."""

    def loss(outputs: Any, row: Any) -> torch.Tensor:
        return model.per_sample_loss(outputs, row)

    return _rows(model, batch, loss)[:, 0]


def jacobian_rows(model: TorchTwiceDifferentiable, batch: Any, directions: torch.Tensor | None = None) -> torch.Tensor:
    """Return Sᵢᵀ Jᵢ of each row, (m, r, p), for ``directions`` S (m, c, r); None takes the identity."""
    if directions is None:
        return _rows(model, batch, lambda outputs, _: outputs.reshape(-1))

    def projected(outputs: torch.Tensor, row: Any) -> torch.Tensor:
        return row[1].mT[0] @ outputs.reshape(-1)

    return _rows(model, (batch, directions), projected, lambda pair: pair[0])


def _rows(
    model: TorchTwiceDifferentiable,
    batch: Any,
    values: Callable[[Any, Any], torch.Tensor],
    inputs: Callable[[Any], Any] = lambda batch: batch,
) -> torch.Tensor:
    """Return the Jacobians (m, r, p) of ``values(outputs, row)`` (r,), of one-row batches."""
    # A module of its own: `functional_call` swaps its tensors while it runs, and threads may share the model.
    model = copy.copy(model)
    model.module = structural_copy(model.module)
    theta = dict(zip(model.layout.names, (t.detach() for t in model.theta), strict=True))

    axes = row_axes(batch)

    def of_row(parameters: dict[str, torch.Tensor], row: Any) -> torch.Tensor:
        row = with_row_axis(row, axes)
        call = _Call(model)
        outputs = torch.func.functional_call(call, {f"module.{k}": v for k, v in parameters.items()}, (inputs(row),))
        return values(outputs, row)

    jacobian = torch.func.jacrev(of_row)
    try:
        # The fused attention kernels have no batching rule.
        with sdpa_kernel(SDPBackend.MATH):
            parts = torch.vmap(jacobian, in_dims=(None, axes))(theta, batch)
    except (RuntimeError, NotImplementedError, ValueError):
        # Some layers have no batching rule (recurrent ones), some models branch on values: then row by row.
        return _loop(model, batch, values, inputs)
    m = leading_length(batch)
    return torch.cat([parts[name].detach().reshape(m, -1, theta[name].numel()) for name in model.layout.names], dim=2)


class _Call(torch.nn.Module):
    """The forward pass of an adapted model as a module, so that parameters can be swapped in."""

    def __init__(self, model: TorchTwiceDifferentiable) -> None:
        super().__init__()
        self.module = model.module
        self.outputs = model.outputs

    def forward(self, batch: Any) -> Any:
        return self.outputs(self.module, batch)


def _loop(model: TorchTwiceDifferentiable, batch: Any, values: Any, inputs: Any) -> torch.Tensor:
    rows = []
    for i in range(leading_length(batch)):
        row = map_tensors(lambda tensor, i=i: tensor[i : i + 1], batch)
        outputs = values(model.forward(inputs(row)), row)
        rows.append(
            torch.stack([model.gradient_of(value, create_graph=True).detach() for value in outputs.reshape(-1)])
        )
    return torch.stack(rows)
