"""Derivatives of each row's value along directions of θ, without the rows' gradients: forward mode."""

from __future__ import annotations

import math

import torch

from .._autograd import ordinary
from .._types import Batch
from ..models import TorchTwiceDifferentiable, map_tensors
from .per_sample import RowValues
from .tangents import Program, UnservedError, recorded

__all__ = ["derivatives_along"]


@ordinary
def derivatives_along(
    model: TorchTwiceDifferentiable, batch: Batch, values: RowValues, V: torch.Tensor
) -> torch.Tensor | None:
    """Return ∇vᵢᵀ d (k, m) of the values vᵢ (m,) of a batch's rows, for each direction d of V (k, p).

    By the operations of the forward pass, each pushed forward by its rule: some two forward passes a direction. None
    where one has no rule, or where a random direction does not come out as by a backward pass.
    """
    record, found = recorded(lambda: values(model.forward(map_tensors(torch.clone, batch)), batch))
    if not found.requires_grad:
        # These rows reach none of the parameters.
        return V.new_zeros(len(V), len(found))
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = torch.randn(len(found) + V.shape[1], generator=generator, dtype=torch.float64, device="cpu").to(V)
    u, v = drawn[: len(found)], drawn[len(found) :]
    try:
        along = Program(record, model.theta, found)(torch.cat([V, v[None]]))
    except torch.OutOfMemoryError:
        raise
    except (UnservedError, RuntimeError, NotImplementedError, ValueError, TypeError, IndexError):
        return None
    gradient = model.gradient_of((u * found).sum())
    gap, size = (u @ along[-1] - gradient @ v).abs(), (u * along[-1]).norm() + (gradient * v).norm()
    # Not (a > b): NaN compares false.
    return along[:-1] if bool(gap <= math.sqrt(torch.finfo(V.dtype).eps) * size) else None
