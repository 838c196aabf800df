"""The exact diagonal of a curvature, layer by layer: sums of squares of each sample's derivatives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from ..._checkpoint import like
from ..._memory import rows_within
from ..._storage import HERE, Storage
from ..._types import State
from ...operators import KroneckerBasis
from .found import layers_of
from .kinds import Inputs, KroneckerLayer, Layer, gram
from .passes import Passes, UnexplainedError
from .probe import probe
from .recording import PulledBack

__all__ = ["Squares", "SquaresOfSums", "add_squares", "diagonal_from_layers"]


class Squares:
    """The exact diagonal at a norm's parameters as it grows."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        first = layer.parameters[0]
        self.sums = torch.zeros(layer.index.shape, dtype=first.dtype, device=first.device)

    def add_inputs(self, inputs: Inputs, mass: torch.Tensor) -> None:
        """Take nothing: the signals hold them already."""

    def add_signals(self, g: torch.Tensor) -> None:
        """Add the samples' gradients (m, number of parameters) along a direction."""
        self.sums += g.square().sum(0)

    def entries(self, penalty: torch.Tensor | None) -> torch.Tensor:
        """Return the diagonal."""
        return self.sums if penalty is None else self.sums + penalty[self.layer.index]

    def scales(self) -> torch.Tensor:
        """Return what is finite where all sums are."""
        return self.sums

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the sums, for a checkpoint."""
        return {"sums": self.sums}

    def fields(self) -> dict[str, str]:
        """Return the types of ``tensors``."""
        return like(self.tensors())

    def restore(self, known: State) -> None:
        """Go on with the sums of a checkpoint."""
        self.sums.copy_(known["sums"])


class SquaresOfSums:
    """Σ (U_Gᵀ (Σₜ gₜaₜᵀ) U_A)² of a layer as it grows, over samples and directions; in place of U nothing is rotated.

    Parameters
    ----------
    layer : KroneckerLayer
        The layer.
    basis : KroneckerBasis, default=None
        U_G and U_A.
    storage : Storage
        Where the sum is to lie.

    Attributes
    ----------
    total : tensor of the layer's matrix
        Without the penalty.
    """

    def __init__(self, layer: KroneckerLayer, basis: KroneckerBasis | None = None, storage: Storage = HERE) -> None:
        self.basis, first = basis, layer.parameters[0]
        self.total = storage.zeros(layer.index.shape, first.dtype, first.device, "eigenvalues")
        self._a: torch.Tensor | None = None
        self._squares: torch.Tensor | None = None

    def begin(self, inputs: Inputs) -> None:
        """Take a chunk's inputs, those of every direction."""
        (a,) = inputs
        self._a = a if self.basis is None else self.basis.of_inputs(a)

    def add(self, g: torch.Tensor) -> None:
        """Add a direction's signals (m, [q,] T, d)."""
        if self._a is None:
            return
        g = g if self.basis is None else self.basis.of_signals(g)
        if g.shape[-2] == 1:
            # The square of an outer product is the outer product of the squares, and a is that of every direction: one
            # GEMM for all of them.
            self._squares = g.square() if self._squares is None else self._squares.addcmul_(g, g)
            return
        step = rows_within(2 * self.total.numel() * self.total.element_size())
        for start in range(0, len(g), step):
            rows = slice(start, start + step)
            self.total += (g[rows].mT @ self._a[rows]).square_().sum(0).to(self.total.device)

    def end(self) -> None:
        """Add what the directions have in common."""
        if self._squares is not None and self._a is not None:
            self.total += gram(self._squares, self._a.square()).to(self.total.device)
        self._a = self._squares = None


def add_squares(
    sums: Sequence[SquaresOfSums], inputs: Sequence[Inputs | None], signals: Iterable[Sequence[torch.Tensor | None]]
) -> None:
    """Add a chunk: each layer's inputs, and its signals direction by direction; None where it was not called."""
    for one, a in zip(sums, inputs, strict=True):
        if a is not None:
            one.begin(a)
    for parts in signals:
        for one, g in zip(sums, parts, strict=True):
            if g is not None:
                one.add(g)
    for one in sums:
        one.end()


def diagonal_from_layers(curvature: PulledBack) -> torch.Tensor | None:
    """Return the diagonal (p,) without the penalty; None unless the layers that are known have all parameters.

    A backward pass a direction and, where a layer sees one row a sample, n p operations for all directions together,
    where the factor's rows take n p for each.
    """
    size = curvature.objective.size
    # The probe takes passes: models with other parameters are told apart without it.
    if sum(layer.index.numel() for layer in layers_of(curvature.objective.model).layers) != size:
        return None
    found, row_bytes = probe(curvature)
    if found.reasons:
        return None
    layers = found.layers
    kronecker = [j for j, layer in enumerate(layers) if isinstance(layer, KroneckerLayer)]
    sums = {j: SquaresOfSums(layer) for j, layer in enumerate(layers) if isinstance(layer, KroneckerLayer)}
    norms = {j: Squares(layer) for j, layer in enumerate(layers) if j not in sums}
    passes = Passes(curvature, found, row_bytes, verbose=0)
    try:
        for seen, _, inputs in passes.over(layers):
            signals = _with_norms(passes.signals(seen, inputs, check=True), kronecker, norms)
            add_squares([sums[j] for j in kronecker], [inputs[j] for j in kronecker], signals)
    except UnexplainedError:
        return None
    diagonal = torch.empty(size, dtype=curvature.objective.dtype, device=curvature.objective.device)
    for j, layer in enumerate(layers):
        diagonal[layer.index] = sums[j].total if j in sums else norms[j].sums
    return diagonal


def _with_norms(
    signals: Iterable[list[torch.Tensor | None]], kronecker: Sequence[int], norms: dict[int, Squares]
) -> Iterable[list[torch.Tensor | None]]:
    """Yield the signals of the Kronecker layers, those of norms taken out and added up."""
    for parts in signals:
        for j, one in norms.items():
            if (g := parts[j]) is not None:
                one.add_signals(g)
        yield [parts[j] for j in kronecker]
