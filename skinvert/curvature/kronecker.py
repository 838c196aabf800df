"""Kronecker factors of a curvature's layers, and the curvature's diagonal in any Kronecker eigenbasis."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from .._memory import rows_within
from .._progress import progress
from .._validation import check_choice, must_be
from ..block_operators import Eigenbasis, KroneckerBlock, KroneckerFactors
from ..models import leading_length, map_tensors
from .base import Objective
from .kronecker_layers import KroneckerLayer, check_rows, kronecker_layers, refuse
from .layers import Call, pulled_back, recording

__all__ = ["Signals", "kronecker_factors"]


class Signals(NamedTuple):
    """What a curvature pulls back through a batch: H = Σ gᵣgᵣᵀ + penalty with gᵣ = Σ directionsᵣ · ∂value per sample.

    Attributes
    ----------
    value : tensor of shape (m, ...)
        Computed from the parameters, one entry or row per sample.
    directions : tensor of shape (r, m, ...)
        Weights and denominators included, as their roots.
    mass : tensor of shape (m,)
        Each sample's share of L's denominator.
    """

    value: torch.Tensor
    directions: torch.Tensor
    mass: torch.Tensor


class Layered(Protocol):
    """A curvature that says what it pulls back."""

    objective: Objective

    @property
    def penalty(self) -> torch.Tensor | None:
        """The penalty's Hessian as a diagonal (p,), or None."""

    def signals(self, batch: Any, weights: torch.Tensor) -> Signals:
        """Return what is pulled back through a batch."""

    def diagonal(self) -> torch.Tensor:
        """Return the exact diagonal (p,)."""


def kronecker_factors(
    curvature: Layered, approx: str = "expand", unsupported: str = "error", verbose: int = 0
) -> KroneckerFactors:
    r"""Return a curvature's factors, layer by layer.

    With a the layer's inputs and g the signals pulled back to its results, W = Σ wᵢmᵢ the denominator of L and the
    weights and denominators of H inside g, over samples i and the T rows t that the layer sees of each:

    - ``"expand"``: A = Σᵢₜ wᵢmᵢ aaᵀ / W, G = Σᵢₜ ggᵀ / T;
    - ``"reduce"``: A = Σᵢ wᵢmᵢ āāᵀ / W with ā the mean over t, G = Σᵢ ĝĝᵀ with ĝ the sum over t.

    Samples count in A as they do in L, so that an ignored target is a row left out and a class weight is a sample
    weight.

    Parameters
    ----------
    curvature : GGN, Fisher or EmpiricalFisher
        It has ``signals``.
    approx : {"expand", "reduce"}, default="expand"
        How rows that share weights are taken.
    unsupported : {"error", "diagonal"}, default="error"
        What to do with parameters outside the layers that have factors.
    verbose : int, default=0
        1 shows a progress bar.

    Returns
    -------
    KroneckerFactors
        One block a layer, the exact diagonal of the rest, and ``refit``.

    References
    ----------
    Eschenhagen, Immer, Turner, Schneider & Hennig (2023), "Kronecker-factored approximate curvature for modern neural
    network architectures", eqs. 12 and 14.
    """
    check_choice(approx, "approx", ["expand", "reduce"])
    check_choice(unsupported, "unsupported", ["error", "diagonal"])
    layers, reasons, row_bytes = _probe(curvature)
    if reasons and unsupported == "error":
        refuse(reasons)
    passes = _Passes(curvature, layers, row_bytes, verbose)
    factors = [_Sums(layer, curvature.objective, approx) for layer in layers]
    for mass, inputs, signals in passes if layers else ():
        for one, a in zip(factors, inputs, strict=True):
            one.add_inputs(a, mass)
        for parts in signals:
            for one, g in zip(factors, parts, strict=True):
                one.add_signals(g)
    blocks = tuple(one.block(curvature.penalty) for one in factors)
    rest = _places(curvature.objective, reasons)
    exact = curvature.diagonal() if len(rest) else torch.empty(0, dtype=passes.dtype, device=rest.device)
    return KroneckerFactors(blocks, rest, exact[rest], passes.refit)


class _Sums:
    """A and G of one layer as they grow."""

    def __init__(self, layer: KroneckerLayer, objective: Objective, approx: str) -> None:
        self.layer, self.approx, self.total = layer, approx, objective.mass_sum
        d, i = layer.index.shape
        self.left = torch.zeros(d, d, dtype=objective.dtype, device=objective.device)
        self.right = self.left.new_zeros((i,) if layer.is_one_hot else (i, i))

    def add_inputs(self, a: torch.Tensor, mass: torch.Tensor) -> None:
        if self.approx == "reduce" and a.shape[1] > 1:
            if self.layer.is_one_hot:
                hint = 'The mean of one-hot rows has no diagonal second moment. Try approx="expand".'
                got = f"{self.layer.name}, which sees {a.shape[1]}"
                raise ValueError(must_be('An Embedding for approx="reduce"', "seeing one row a sample", got, hint))
            a = a.mean(1, keepdim=True)
        weighted = a * (mass / self.total)[:, None, None]
        if self.layer.is_one_hot:
            self.right += (weighted * a).sum((0, 1))
        else:
            self.right.addmm_(weighted.flatten(0, 1).mT, a.flatten(0, 1))

    def add_signals(self, g: torch.Tensor) -> None:
        rows = g.sum(1) if self.approx == "reduce" else g.flatten(0, 1)
        share = 1.0 if self.approx == "reduce" else 1 / g.shape[1]
        self.left.addmm_(rows.mT, rows, alpha=share)

    def block(self, penalty: torch.Tensor | None) -> KroneckerBlock:
        own = None if penalty is None else penalty[self.layer.index]
        right = self.right if self.layer.is_one_hot else (self.right + self.right.mT) / 2
        return KroneckerBlock(self.layer.name, self.layer.index, (self.left + self.left.mT) / 2, right, own)


@dataclass
class _Passes:
    """Passes over the data: per chunk of samples wᵢmᵢ (m,), each layer's inputs, and its signals column by column."""

    curvature: Layered
    layers: list[KroneckerLayer]
    row_bytes: int
    verbose: int

    @property
    def dtype(self) -> torch.dtype:
        return self.curvature.objective.dtype

    def __iter__(self) -> Iterator[tuple[torch.Tensor, list[torch.Tensor], Iterator[list[torch.Tensor]]]]:
        chunk = rows_within(self.row_bytes)
        for batch, weights in progress(self.curvature.objective.batches, "Kronecker factors", self.verbose):
            for start in range(0, len(weights), chunk):
                rows = slice(start, start + chunk)
                part = map_tensors(lambda tensor, rows=rows: tensor[rows], batch)
                yield self._of(part, weights[rows])

    def _of(
        self, batch: Any, weights: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor], Iterator[list[torch.Tensor]]]:
        found, calls = _captured(self.curvature, self.layers, batch, weights)
        reasons = {one.name: why for one in self.layers if (why := check_rows(one, calls[one.name], len(weights)))}
        if reasons:
            refuse(reasons)
        captured = [calls[layer.name][0] for layer in self.layers]
        inputs = [layer.inputs(call.input, self.dtype) for layer, call in zip(self.layers, captured, strict=True)]
        return weights * found.mass, inputs, self._signals(found, captured)

    def _signals(self, found: Signals, captured: list[Call]) -> Iterator[list[torch.Tensor]]:
        for direction in found.directions:
            parts = pulled_back(found.value, captured, direction)
            yield [layer.signals(g.detach()) for layer, g in zip(self.layers, parts, strict=True)]

    def refit(self, bases: Sequence[Eigenbasis]) -> list[torch.Tensor]:
        """Return Σ (U_Gᵀ (Σₜ gₜaₜᵀ) U_A)² of each layer: the exact diagonal of H, without the penalty, in its basis."""
        sums = [torch.zeros(layer.index.shape, dtype=self.dtype, device=layer.index.device) for layer in self.layers]
        for _, inputs, signals in self:
            rotated = [basis.of_inputs(a) for basis, a in zip(bases, inputs, strict=True)]
            for parts in signals:
                for total, basis, g, a in zip(sums, bases, parts, rotated, strict=True):
                    _add_squares(total, basis.of_signals(g), a)
        return sums


def _add_squares(total: torch.Tensor, g: torch.Tensor, a: torch.Tensor) -> None:
    """Add Σᵢ (Σₜ g a ᵀ)² entry by entry, for g (m, T, d) and a (m, T, i)."""
    if g.shape[1] == 1:
        # The square of an outer product is the outer product of the squares: one GEMM.
        total.addmm_(g[:, 0].square().mT, a[:, 0].square())
        return
    step = rows_within(2 * total.numel() * total.element_size())
    for start in range(0, len(g), step):
        rows = slice(start, start + step)
        total += torch.bmm(g[rows].mT, a[rows]).square_().sum(0)


def _captured(
    curvature: Layered, layers: list[KroneckerLayer], batch: Any, weights: torch.Tensor
) -> tuple[Signals, dict[str, list[Call]]]:
    with recording([layer.module for layer in layers]) as calls:
        found = curvature.signals(batch, weights)
    return found, {layer.name: calls.get(layer.module, []) for layer in layers}


def _probe(curvature: Layered) -> tuple[list[KroneckerLayer], dict[str, str], int]:
    """Return the layers whose calls explain their gradients, why the others do not, and the bytes that a sample takes.

    On a few samples and on one: the calls must see samples first, and Σ gₜaₜᵀ must be the derivative by the weights,
    which it is not where the model uses them outside the layer too.
    """
    objective = curvature.objective
    layers, reasons = kronecker_layers(objective.model)
    batch, weights = next(iter(objective.batches))
    size = 1
    for m in dict.fromkeys((1, min(8, leading_length(batch)))):
        part = map_tensors(lambda tensor, m=m: tensor[:m], batch)
        found, calls = _captured(curvature, layers, part, torch.ones_like(weights[:m]))
        bad = {layer.name: why for layer in layers if (why := check_rows(layer, calls[layer.name], m))}
        good = [layer for layer in layers if layer.name not in bad]
        errors = _unexplained(found, good, [calls[layer.name][0] for layer in good])
        bad.update(dict.fromkeys(errors, "its weights are used outside it too"))
        reasons.update({name: bad[one.name] for one in layers if one.name in bad for name in _names(objective, one)})
        layers = [layer for layer in layers if layer.name not in bad]
        if m == 1:
            size = _row_bytes(layers, calls, found, objective.dtype)
    return layers, reasons, size


def _row_bytes(layers: list[KroneckerLayer], calls: dict[str, list[Call]], found: Signals, dtype: torch.dtype) -> int:
    size = 3 * found.value[0].numel() * len(found.directions)
    for layer in layers:
        call = calls[layer.name][0]
        size += 3 * (layer.inputs(call.input, dtype).numel() + call.shape.numel())
    return size * dtype.itemsize


def _unexplained(found: Signals, layers: list[KroneckerLayer], captured: list[Call]) -> list[str]:
    """Return the layers whose inputs and signals do not give the derivative by their weights."""
    if not layers:
        return []
    generator = torch.Generator().manual_seed(0)
    mixture = torch.randn(len(found.directions), generator=generator, dtype=torch.float64, device="cpu").to(
        found.directions
    )
    direction = torch.einsum("r,r...->...", mixture, found.directions)
    parts = pulled_back(found.value, captured, direction)
    wrong = []
    for layer, call, part in zip(layers, captured, parts, strict=True):
        g, a = layer.signals(part), layer.inputs(call.input, part.dtype)
        product = torch.einsum("mtd,mti->di", g, a)
        expected = _gradient(found.value, direction, layer, product)
        tolerance = 1e3 * torch.finfo(part.dtype).eps * float(g.norm() * a.norm())
        if float((product - expected).norm()) > tolerance:
            wrong.append(layer.name)
    return wrong


def _gradient(value: torch.Tensor, direction: torch.Tensor, layer: KroneckerLayer, like: torch.Tensor) -> torch.Tensor:
    """Return the derivative of ``value`` along ``direction`` by the layer's matrix (d, i)."""
    parts = torch.autograd.grad(value, layer.parameters, direction, retain_graph=True, materialize_grads=True)
    row = like.new_zeros(max(place.stop for place in layer.places))
    for place, part in zip(layer.places, parts, strict=True):
        row[place] = part.reshape(-1)
    return row[layer.index]


def _names(objective: Objective, layer: KroneckerLayer) -> list[str]:
    starts = {place.start for place in layer.places}
    return [name for name, place in objective.layout.slices.items() if place.start in starts]


def _places(objective: Objective, names: dict[str, str]) -> torch.Tensor:
    parts = [
        torch.arange(place.start, place.stop, device="cpu")
        for name, place in objective.layout.slices.items()
        if name in names
    ]
    return (torch.cat(parts) if parts else torch.empty(0, dtype=torch.long, device="cpu")).to(objective.device)
