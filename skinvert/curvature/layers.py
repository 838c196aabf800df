"""Linear layers that see one row per sample: their inputs and the derivatives of the outputs at them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .._memory import rows_within
from ..models import Affine, TorchTwiceDifferentiable

__all__ = ["Call", "LinearLayers", "linear_layers", "outer_sum", "pulled_back", "recording"]


class Call(NamedTuple):
    """One call of a layer: its input a, and where to differentiate at its result z, None where z is a constant."""

    input: torch.Tensor
    shape: torch.Size
    # Not z itself: an activation in place would turn it into its own result.
    edge: GradientEdge | None


Captured = list[Call]


@dataclass
class LinearLayers:
    """The Linear layers that hold all selected parameters.

    Attributes
    ----------
    modules : list of Linear
        In order of their parameters.
    places : list of (weight slice or None, bias slice or None)
        Where each one's parameters lie in a flat row.
    """

    model: TorchTwiceDifferentiable
    modules: list[nn.Linear]
    places: list[tuple[slice | None, slice | None]]

    def capture(self, batch: Any) -> tuple[torch.Tensor, Captured]:
        """Return the outputs, and for each layer its call, of one forward pass."""
        with recording(self.modules) as calls:
            outputs = self.model.forward(batch)
        return outputs, [calls[module][0] for module in self.modules]

    def derivatives(
        self, outputs: torch.Tensor, captured: Captured, directions: Iterable[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Return Sᵢᵀ ∂fᵢ/∂zᵢ (m, r, d) of each layer, by one backward pass per column of S (m, c)."""
        columns = [pulled_back(outputs, captured, direction) for direction in directions]
        return [torch.stack(parts, dim=1) for parts in zip(*columns, strict=True)]

    def homogeneous(self, index: int, inputs: torch.Tensor) -> torch.Tensor:
        """Return the inputs of a layer with the coordinate of its bias: (m, i), (m, i + 1) or (m, 1)."""
        weight, bias = self.places[index]
        ones = inputs.new_ones(len(inputs), 1)
        parts = ([inputs] if weight else []) + ([ones] if bias else [])
        return torch.cat(parts, dim=1).detach()


def linear_layers(model: TorchTwiceDifferentiable, batch: Any) -> LinearLayers | None:
    """Return the layers, or None unless each selected parameter is in a Linear called once on rows (m, i)."""
    slices = model.layout.slices
    owners = {id(tensor): name for name, tensor in zip(slices, model.theta, strict=True)}
    modules: list[Any] = []
    places: list[tuple[slice | None, slice | None]] = []
    found: set[str] = set()
    for module in model.module.modules():
        names = {owners[id(tensor)] for tensor in module.parameters(recurse=False) if id(tensor) in owners}
        if not names:
            continue
        if type(module) not in (nn.Linear, Affine) or found & names:
            return None
        found |= names
        weight, bias = owners.get(id(module.weight)), owners.get(id(module.bias))
        if names != {weight, bias} - {None}:
            # Its weight is made of other parameters (weight_norm, spectral_norm).
            return None
        modules.append(module)
        places.append((slices[weight] if weight else None, slices[bias] if bias else None))
    if found != set(slices):
        return None
    layers = LinearLayers(model, modules, places)
    return layers if _sees_rows(layers, batch) else None


def _sees_rows(layers: LinearLayers, batch: Any) -> bool:
    with recording(layers.modules) as calls:
        outputs = layers.model.forward(batch)
    once = all(len(calls.get(module, [])) == 1 for module in layers.modules)
    return once and all(
        call.input.ndim == 2 and len(call.input) == len(outputs) and call.edge is not None
        for call in (calls[module][0] for module in layers.modules)
    )


def pulled_back(value: torch.Tensor, captured: Captured, direction: torch.Tensor) -> list[torch.Tensor]:
    """Return the derivative of ``value`` along ``direction`` at each layer's result, zero where it does not reach."""
    edges: Any = [call.edge for call in captured]
    parts = torch.autograd.grad(value, edges, direction.reshape(value.shape), retain_graph=True, allow_unused=True)
    return [value.new_zeros(call.shape) if part is None else part for part, call in zip(parts, captured, strict=True)]


@contextmanager
def recording(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Captured]]:
    """Record every call of the modules while the context lasts."""
    calls: dict[nn.Module, Captured] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: torch.Tensor) -> None:
        edge = get_gradient_edge(result) if result.requires_grad else None
        calls.setdefault(module, []).append(Call(args[0] if args else kwargs["input"], result.shape, edge))

    handles = [module.register_forward_hook(record, with_kwargs=True) for module in modules]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def outer_sum(matrix: torch.Tensor, layers: LinearLayers, captured: Captured, Z: list[torch.Tensor]) -> None:
    """Add Σᵢ (Zᵢᵀ Zᵢ) ⊗ (aᵢ aᵢᵀ) to ``matrix``, for every pair of layers.

    One GEMM over the samples per pair: n p² operations, where the factor's own product takes n c p².
    """
    inputs = [layers.homogeneous(i, call.input) for i, call in enumerate(captured)]
    for i in range(len(inputs)):
        for j in range(i + 1):
            block = _pair_block(Z[i], Z[j], inputs[i], inputs[j])
            _place(matrix, block, layers.places[i], layers.places[j])
            if i != j:
                _place(matrix, block.permute(2, 3, 0, 1), layers.places[j], layers.places[i])


def _pair_block(Z: torch.Tensor, Y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return Σₙ Zₙᵀ Yₙ ⊗ aₙ bₙᵀ as (d, i, e, j)."""
    d, i, e, j = Z.shape[2], a.shape[1], Y.shape[2], b.shape[1]
    block = Z.new_zeros(d * e, i * j)
    step = rows_within((d * e + i * j) * Z.element_size())
    for start in range(0, len(Z), step):
        rows = slice(start, start + step)
        D = torch.bmm(Z[rows].mT, Y[rows]).flatten(1)
        outer = (a[rows, :, None] * b[rows, None, :]).flatten(1)
        block.addmm_(D.mT, outer)
    return block.reshape(d, e, i, j).permute(0, 2, 1, 3)


def _place(matrix: torch.Tensor, block: torch.Tensor, left: Any, right: Any) -> None:
    """Add a block (d, i, e, j) where the weights and biases of two layers lie."""
    for place, rows in _parts(left, block.shape[1]):
        for other, columns in _parts(right, block.shape[3]):
            part = block[:, rows][:, :, :, columns]
            size = (place.stop - place.start, other.stop - other.start)
            matrix[place, other] += part.reshape(size)


def _parts(place: tuple[slice | None, slice | None], width: int) -> list[tuple[slice, slice]]:
    weight, bias = place
    parts = []
    if weight is not None:
        parts.append((weight, slice(0, width - (bias is not None))))
    if bias is not None:
        parts.append((bias, slice(width - 1, width)))
    return parts
