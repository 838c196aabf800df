"""Kronecker factors of a curvature's layers, and the curvature's diagonal in any Kronecker eigenbasis."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..._check import check_choice
from ..._memory import check_memory
from ...operators import KroneckerBasis, KroneckerBlock, KroneckerFactors
from ..objective import Objective
from .found import refuse
from .kinds import Inputs, KroneckerLayer, Layer, symmetric_gram
from .passes import Chunk, Kept, Passes, UnexplainedError
from .probe import probe
from .recording import PulledBack
from .squares import Squares, SquaresOfSums, add_squares

__all__ = ["kronecker_factors"]


def kronecker_factors(
    curvature: PulledBack, approx: str = "expand", unsupported: str = "error", verbose: int = 0
) -> KroneckerFactors:
    r"""Return a curvature's factors, layer by layer.

    With a the layer's inputs and g the signals pulled back to its results, W = Σ wᵢmᵢ the denominator of L and the
    weights and denominators of H inside g, over samples i and the T rows t that the layer sees of each:

    - ``"expand"``: A = Σᵢₜ wᵢmᵢ aaᵀ / W, G = Σᵢₜ ggᵀ / T;
    - ``"reduce"``: A = Σᵢ wᵢmᵢ āāᵀ / W with ā the mean over t, G = Σᵢ ĝĝᵀ with ĝ the sum over t.

    Samples count in A as they do in L, so that an ignored target is a row left out and a class weight is a sample
    weight. A grouped convolution has one A and G a group, an attention one a projection, and a layer that is called
    several times sees the rows of all its calls. The scale and shift of norms have their exact diagonal.

    Parameters
    ----------
    curvature : Layered
        It says by ``signals`` what it pulls back.
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
    found, row_bytes = probe(curvature)
    while True:
        if found.reasons and unsupported == "error":
            refuse(found.reasons)
        _check_memory(found.layers, row_bytes, curvature.objective)
        try:
            return _summed(Passes(curvature, found, row_bytes, verbose), approx)
        except UnexplainedError as error:
            found = found.without(error.reasons)


def _summed(passes: Passes, approx: str) -> KroneckerFactors:
    objective, layers = passes.curvature.objective, passes.found.layers
    sums = [
        _Factors(layer, objective, approx) if isinstance(layer, KroneckerLayer) else Squares(layer) for layer in layers
    ]
    kept = Kept([j for j, one in enumerate(sums) if isinstance(one, _Factors)])
    for seen, mass, inputs in passes.over(layers):
        for one, a in zip(sums, inputs, strict=True):
            if a is not None:
                one.add_inputs(a, mass)
        for parts in kept.taken(inputs, passes.signals(seen, inputs, check=True)):
            for one, g in zip(sums, parts, strict=True):
                if g is not None:
                    one.add_signals(g)
    places, values = _rest(passes, [one for one in sums if isinstance(one, Squares)])
    blocks = []
    # Its sums are the block's own now.
    while sums:
        if isinstance(one := sums.pop(0), _Factors):
            blocks.append(one.block(passes.curvature.penalty))
    refit = _Refit(passes, [layer for layer in layers if isinstance(layer, KroneckerLayer)], kept)
    return KroneckerFactors(tuple(blocks), places, values, refit)


def _rest(passes: Passes, norms: Sequence[Squares]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the places of the parameters without factors, those of norms first, and the exact diagonal there."""
    curvature, reasons = passes.curvature, passes.found.reasons
    places = [*(one.layer.index for one in norms), curvature.objective.places(reasons)]
    values = [one.entries(curvature.penalty) for one in norms] + ([curvature.diagonal_at(reasons)] if reasons else [])
    empty = torch.empty(0, dtype=curvature.objective.dtype, device=curvature.objective.device)
    return torch.cat(places), torch.cat([*values, empty])


@dataclass
class _Refit:
    """The exact diagonal in other eigenbases, by one more pass, or from what was kept of the first."""

    passes: Passes
    layers: list[KroneckerLayer]
    kept: Kept

    def __call__(self, bases: Sequence[KroneckerBasis]) -> list[torch.Tensor]:
        """Return Σ (U_Gᵀ (Σₜ gₜaₜᵀ) U_A)² of each layer: the exact diagonal of H, without the penalty, in its basis."""
        sums = [SquaresOfSums(layer, basis) for layer, basis in zip(self.layers, bases, strict=True)]
        for inputs, signals in self._chunks():
            add_squares(sums, inputs, signals)
        return [one.total for one in sums]

    def _chunks(self) -> Iterator[Chunk]:
        """Yield each chunk's inputs, and its signals direction by direction."""
        if self.kept.whole:
            yield from self.kept.chunks
            return
        for seen, _, inputs in self.passes.over(self.layers):
            yield inputs, self.passes.signals(seen, inputs)


class _Factors:
    """A and G of one layer as they grow."""

    def __init__(self, layer: KroneckerLayer, objective: Objective, approx: str) -> None:
        self.layer, self.approx = layer, approx
        *groups, d, i = layer.index.shape
        self.left = torch.zeros(*groups, d, d, dtype=objective.dtype, device=objective.device)
        self.right = self.left.new_zeros((i,) if layer.is_one_hot else (*groups, i, i))

    def add_inputs(self, inputs: Inputs, mass: torch.Tensor) -> None:
        (a,) = inputs
        if self.approx == "reduce" and a.shape[-2] > 1:
            a = a.mean(-2, keepdim=True)
            if self.right.ndim == 1:
                self._make_dense()
        weighted = a * mass.reshape(-1, *[1] * (a.ndim - 1))
        self.right += (weighted * a).sum((0, 1)) if self.right.ndim == 1 else symmetric_gram(weighted, a)

    def _make_dense(self) -> None:
        """Make room for a second moment of means of one-hot rows, which is not diagonal."""
        needed = 4 * self.right.numel() ** 2 * self.right.element_size()
        way_out = 'Try approx="expand", of which an Embedding\'s factor is diagonal.'
        check_memory(needed, f"The reduced factor of {self.layer.name}", way_out, self.right.device)
        self.right = torch.diag(self.right)

    def add_signals(self, g: torch.Tensor) -> None:
        rows = g.sum(-2, keepdim=True) if self.approx == "reduce" else g
        self.left += symmetric_gram(rows, rows) / rows.shape[-2]

    def block(self, penalty: torch.Tensor | None) -> KroneckerBlock:
        own = None if penalty is None else penalty[self.layer.index]
        right = self.right if self.right.ndim == 1 else (self.right + self.right.mT) / 2
        return KroneckerBlock(self.layer.name, self.layer.index, (self.left + self.left.mT) / 2, right, own)


def _check_memory(layers: list[Layer], row_bytes: int, objective: Objective) -> None:
    """Raise where the factors, their eigenbases and one sample do not fit."""
    held = largest = 0
    for layer in layers:
        if not isinstance(layer, KroneckerLayer):
            continue
        *groups, d, i = layer.index.shape
        q = groups[0] if groups else 1
        sides = [q * d * d, q * i * (1 if layer.is_one_hot else i)]
        # Factors and eigenbases; eigenvalues and their inverse; two indices of 8 bytes.
        held += 2 * sum(sides) + 2 * q * d * i + 16 * q * d * i // objective.dtype.itemsize
        largest = max(largest, *sides)
    # `eigh` works on a copy, with twice its size beside.
    needed = (held + 3 * largest) * objective.dtype.itemsize + row_bytes
    way_out = 'Try `params` with fewer parameters, or method="cg", which holds no factors.'
    check_memory(needed, "The Kronecker factors of the layers", way_out, objective.device)
