"""Per-sample gradients and Jacobians, one row per sample."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from .._autograd import ordinary
from .._types import Batch
from ..models import TorchTwiceDifferentiable, leading_length, map_tensors, row_axes, with_row_axis
from ..models.compiled import eager
from ..models.plain_functions import PlainFunctions
from ..models.structural_copy import structural_copy

__all__ = ["RowValues", "gradient_rows", "jacobian_rows", "split_batch"]

# (outputs, batch) -> one value (m,) a row, of its own row alone.
RowValues: TypeAlias = Callable[[Batch, Batch], torch.Tensor]


@ordinary
def gradient_rows(
    model: TorchTwiceDifferentiable, batch: Batch, values: RowValues | None = None, kind: str = "gradient"
) -> torch.Tensor:
    """Return ∇vᵢ of each row of a batch, (m, p): of sᵢ, the loss before the average, or of other ``values``.

    ``kind`` tells one kind of values from another: what was found of them holds for the next batch.
    """
    of = model.per_sample_loss if values is None else values
    return _rows(model, batch, _Values(kind, lambda outputs, rows: of(outputs, rows)[:, None]))[:, 0]


@ordinary
def jacobian_rows(
    model: TorchTwiceDifferentiable, batch: Batch, directions: torch.Tensor | None = None
) -> torch.Tensor:
    """Return Sᵢᵀ Jᵢ of each row, (m, r, p), for ``directions`` S (m, c, r); None takes the identity."""
    if directions is None:
        return _rows(model, batch, _Values("jacobian", lambda outputs, _: outputs.reshape(len(outputs), -1)))

    def projected(outputs: torch.Tensor, rows: Batch) -> torch.Tensor:
        S: torch.Tensor = rows[1]
        return (S.mT @ outputs.reshape(len(outputs), -1)[:, :, None])[:, :, 0]

    return _rows(model, (batch, directions), _Values("projected", projected, lambda pair: pair[0]))


def split_batch(batch: Batch, weights: torch.Tensor, size: int) -> Iterator[tuple[Batch, torch.Tensor]]:
    """Yield a batch in chunks of at most ``size`` rows."""
    for start in range(0, len(weights), size):
        rows = slice(start, start + size)
        yield map_tensors(lambda tensor, rows=rows: tensor[rows], batch), weights[rows]


class _Values(NamedTuple):
    """What is differentiated: ``of(outputs, rows)`` (m, r), of ``outputs`` on ``inputs(rows)``."""

    kind: str
    of: Callable[[Batch, Batch], torch.Tensor]
    inputs: Callable[[Batch], Batch] = lambda rows: rows


def _rows(model: TorchTwiceDifferentiable, batch: Batch, values: _Values) -> torch.Tensor:
    """Return the Jacobians (m, r, p) of the values: of all rows at once where that is right, else row by row.

    Batching rules may be missing (recurrent layers), models may branch on values; and a rule may be wrong for one
    number of rows alone. So each shape is tried once, against an ordinary backward pass.
    """
    shapes: list[str | tuple[torch.Size, torch.dtype]] = [values.kind]
    map_tensors(lambda tensor: shapes.append((tensor.shape, tensor.dtype)), batch)
    batched, key = model.batched_rows, tuple(shapes)
    if batched.get(key, True):
        rows = _at_once(model, batch, values)
        if rows is not None and (key in batched or _agree(model, batch, values, rows)):
            batched[key] = True
            return rows
        batched[key] = False
    return _one_by_one(model, batch, values)


def _at_once(model: TorchTwiceDifferentiable, batch: Batch, values: _Values) -> torch.Tensor | None:
    """Return the Jacobians under ``vmap``; None where a layer has no rule for it."""
    theta = dict(zip(model.layout.names, (t.detach() for t in model.theta), strict=True))

    axes = row_axes(batch)

    def of_row(parameters: dict[str, torch.Tensor], row: Batch) -> torch.Tensor:
        rows = with_row_axis(row, axes)
        swapped = {id(t): parameters[name] for name, t in zip(model.layout.names, model.theta, strict=True)}
        # Not `functional_call`, which leaves a parameter where a list or a closure holds it too.
        module = structural_copy(model.module, lambda tensor: swapped.get(id(tensor), tensor))
        with PlainFunctions():
            # A forward pass may write into its inputs.
            outputs = model.computed(module, map_tensors(torch.clone, values.inputs(rows)))
        return values.of(outputs, rows)[0]

    try:
        # The fused attention kernels have no batching rule.
        with sdpa_kernel(SDPBackend.MATH), eager(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop because we have not yet implemented")
            parts = torch.vmap(torch.func.jacrev(of_row), in_dims=(None, axes))(theta, batch)
    except (RuntimeError, NotImplementedError, ValueError):
        return None
    flat = [parts[name].detach() for name in model.layout.names]
    return torch.cat(
        [part.reshape(*part.shape[:2], theta[name].numel()) for name, part in zip(theta, flat, strict=True)], dim=2
    )


def _agree(model: TorchTwiceDifferentiable, batch: Batch, values: _Values, rows: torch.Tensor) -> bool:
    """Return whether a random mixture of the rows is the gradient of that mixture of the values."""
    value = values.of(model.forward(map_tensors(torch.clone, values.inputs(batch))), batch)
    if value.shape != rows.shape[:2]:
        return False
    generator = torch.Generator("cpu").manual_seed(0)
    mixture = torch.randn(value.shape, generator=generator, dtype=torch.float64, device="cpu").to(value)
    error = (mixture.reshape(-1) @ rows.flatten(0, 1) - model.gradient_of((mixture * value).sum())).norm()
    size = (mixture * rows.norm(dim=2)).norm()
    return bool(error <= math.sqrt(model.eps) * size)


def _one_by_one(model: TorchTwiceDifferentiable, batch: Batch, values: _Values) -> torch.Tensor:
    rows = []
    for i in range(leading_length(batch)):
        row = map_tensors(lambda tensor, i=i: tensor[i : i + 1], batch)
        outputs = values.of(model.forward(map_tensors(torch.clone, values.inputs(row))), row)
        rows.append(torch.stack([model.gradient_of(value, create_graph=True).detach() for value in outputs[0]]))
    return torch.stack(rows)
