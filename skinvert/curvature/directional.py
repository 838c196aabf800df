"""Derivatives of each row's value along directions of θ, without the rows' gradients: forward mode."""

from __future__ import annotations

import math

import torch
from torch.utils.flop_counter import FlopCounterMode

from .._autograd import ordinary
from .._types import Batch
from ..models import TorchTwiceDifferentiable, leading_length, map_tensors
from .per_sample import RowValues
from .tangents import Program, UnservedError, recorded

__all__ = ["derivatives_along", "most_directions"]

# From so many parameters on the rows' gradients fall out of a CPU's caches.
LARGE = 30_000


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


def most_directions(model: TorchTwiceDifferentiable, batch: Batch) -> int:
    """Return up to how many directions forward mode is faster than the rows' gradients.

    As timed (docs/benchmarks/NOTES.md): by how often a forward pass uses a parameter for one row, and by whether the
    gradients fit the caches; the same for the same shapes, so that the same call gives the same digits.
    """
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.forward(map_tensors(torch.clone, batch))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # noqa: BLE001 (user code under a mode may raise anything; what is its own, it raises again)
        return 1
    uses = counter.get_total_flops() / (2 * leading_length(batch) * model.num_params)
    if uses > 4:
        return 1
    return 200 if uses <= 2 and model.num_params >= LARGE else 8
