"""The matrix of a curvature whose layers see one row a sample: Σᵢ Dᵢ ⊗ aᵢaᵢᵀ over every pair of layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..._memory import rows_within
from ...operators import LinearOperator
from .found import layers_of
from .kinds import KroneckerLayer, Layer
from .passes import Passes, UnexplainedError
from .probe import probe
from .recording import PulledBack, slack

__all__ = ["PairSums", "agrees", "agrees_at_some", "dense_from_layers", "linear_layers"]

# Samples whose outer products are made at once: few enough to stay in the caches, many enough for a GEMM.
CHUNK = 128


def dense_from_layers(curvature: PulledBack, verbose: int = 0) -> torch.Tensor | None:
    """Return the matrix (p, p) without the penalty; None unless all parameters are in layers that see one row each.

    One GEMM over the samples per pair of layers: n p² operations, where the factor's own product takes n c p².
    """
    # The probe takes passes: models that are none of these are told apart without it.
    size = curvature.objective.size
    if not linear_layers(layers_of(curvature.objective.model).layers, size):
        return None
    found, row_bytes = probe(curvature)
    layers = linear_layers(found.layers, size)
    if layers is None:
        return None
    held = 2 * curvature.rank * sum(len(layer.index) for layer in layers) * curvature.objective.dtype.itemsize
    passes, sums = Passes(curvature, found, row_bytes + held, verbose), PairSums(layers)
    try:
        for seen, _, inputs in passes.over(layers):
            rows = [a[0][:, 0] for a in inputs if a is not None and a[0].shape[1] == 1]
            if len(rows) < len(layers):
                return None
            columns = [[g[:, 0] for g in parts if g is not None] for parts in passes.signals(seen, inputs, check=True)]
            sums.add(rows, [torch.stack(parts, dim=1) for parts in zip(*columns, strict=True)])
    except UnexplainedError:
        return None
    return sums.matrix()


def agrees(A: LinearOperator, matrix: torch.Tensor, eps: float) -> bool:
    """Return whether a matrix is A without its penalty, by a product with A, which shares none of its code.

    ``eps`` is the rounding of both.
    """
    generator = torch.Generator(A.device).manual_seed(0)
    v = torch.randn(1, A.size, dtype=A.dtype, device=A.device, generator=generator)
    expected = A.apply(v) if A.penalty is None else A.apply(v) - v * A.penalty
    tolerance = slack(eps) * (matrix.norm() * v.norm())
    return bool((v @ matrix - expected).norm() <= tolerance)


def agrees_at_some(A: LinearOperator, diagonal: torch.Tensor, sizes: Sequence[int]) -> bool:
    """Return whether a diagonal is that of A without its penalty, at the largest entry of each part of these sizes.

    By a product with A for each part, which shares no code with it.
    """
    starts = torch.tensor([0, *sizes[:-1]], device="cpu").cumsum(0).tolist()
    places = [start + int(part.abs().argmax()) for start, part in zip(starts, diagonal.split(list(sizes)), strict=True)]
    tolerance = 1e3 * torch.finfo(A.dtype).eps
    for place in places:
        v = diagonal.new_zeros(1, A.size)
        v[0, place] = 1
        column = A.apply(v)[0] if A.penalty is None else A.apply(v)[0] - v[0] * A.penalty
        scale = torch.maximum(column.norm(), diagonal.abs().max())
        # Not (a > b): NaN compares false.
        if not bool((column[place] - diagonal[place]).abs() <= tolerance * scale):
            return False
    return True


def linear_layers(layers: Sequence[Layer], size: int) -> list[KroneckerLayer] | None:
    """Return the layers, or None unless they are linear ones that hold all p parameters."""
    linear = [
        layer
        for layer in layers
        if isinstance(layer, KroneckerLayer) and layer.dims is None and not layer.is_one_hot and not layer.shared
    ]
    whole = sum(layer.index.numel() for layer in linear) == size
    return linear if whole and len(linear) == len(layers) else None


class PairSums:
    """Σᵢ (Zᵢᵀ Yᵢ) ⊗ (aᵢ bᵢᵀ) of every pair of layers as they grow."""

    def __init__(self, layers: Sequence[KroneckerLayer]) -> None:
        self.layers, self.itemsize = layers, layers[0].parameters[0].element_size()
        self.sums: dict[tuple[int, int], torch.Tensor] = {}
        self.crossed: dict[tuple[int, int], torch.Tensor] = {}

    def add(self, inputs: Sequence[torch.Tensor], Z: Sequence[torch.Tensor]) -> None:
        """Add samples: each layer's inputs (m, i), and its signals along r directions (m, r, d)."""
        for i in range(len(Z)):
            for j in range(i + 1):
                for rows in self._chunks(len(Z[i]), i, j):
                    D = torch.bmm(Z[i][rows].mT, Z[j][rows])
                    self.add_pair(i, j, D, inputs[i][rows], inputs[j][rows])

    def add_pair(self, i: int, j: int, D: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        """Add Σₙ Dₙ ⊗ aₙ bₙᵀ, with D (m, d, e) of layers i ≥ j, and their inputs."""
        total: torch.Tensor | None = None
        # Few samples at a time: their outer products stay in the caches.
        for D_, a_, b_ in zip(D.split(CHUNK), a.split(CHUNK), b.split(CHUNK), strict=True):
            outer = _upper(a_) if i == j else (a_[:, :, None] * b_[:, None, :]).flatten(1)
            if total is None:
                total = self.sums.setdefault((i, j), D.new_zeros(D[0].numel(), outer.shape[1]))
            total.addmm_(D_.flatten(1).mT, outer)

    def add_crossed(self, i: int, j: int, slope: torch.Tensor, K: torch.Tensor, b: torch.Tensor) -> None:
        """Add Σₙ slopeₙ ⊗ Kₙ ⊗ bₙ: what the input of layer i has of layer j's results, K (m, a's, e), counts."""
        (d, (a, e), width) = slope.shape[1], K.shape[1:], b.shape[1]
        total = self.crossed.setdefault((i, j), K.new_zeros(d, a, e, width))
        diagonal = K.diagonal(dim1=1, dim2=2)
        if a >= e and int(K.count_nonzero()) == int(diagonal.count_nonzero()):
            # Nothing but an activation between them.
            rows = slope.mT @ (diagonal[..., None] * b[:, None, :]).flatten(1)
            total.diagonal(dim1=1, dim2=2).add_(rows.reshape(d, e, width).mT)
        elif d <= width:
            rows = (slope[:, :, None] * K.flatten(1)[:, None, :]).flatten(1)
            total.view(d * a * e, width).addmm_(rows.mT, b)
        else:
            total.view(d, a * e * width).addmm_(slope.mT, (K[..., None] * b[:, None, None, :]).flatten(1))

    def _pair(self, i: int, j: int) -> torch.Tensor:
        """Return the sum of a pair (d e, a b), which is used up."""
        total = self.sums.pop((i, j))
        if i != j:
            return total
        size = self.layers[i].index.shape[1]
        places = torch.zeros(size, size, dtype=torch.long, device=total.device)
        first, second = torch.triu_indices(size, size, device=total.device)
        places[first, second] = places[second, first] = torch.arange(total.shape[1], device=total.device)
        return total[:, places.reshape(-1)]

    def _chunks(self, m: int, i: int, j: int) -> Iterator[slice]:
        """Yield chunks of samples that fit the working memory."""
        (d, a), (e, b) = self.layers[i].index.shape, self.layers[j].index.shape
        step = rows_within((d * e + a * b) * self.itemsize)
        yield from (slice(start, start + step) for start in range(0, m, step))

    def matrix(self) -> torch.Tensor:
        """Return the sums as one symmetric matrix (p, p), each entry at its place in a flat row; they are used up."""
        order = torch.cat([layer.index.reshape(-1) for layer in self.layers]).argsort()
        # One axis at a time: no more than two matrices are held.
        matrix = self._by_layers()
        matrix = matrix[order]
        return matrix[:, order]

    def _by_layers(self) -> torch.Tensor:
        """Return the matrix in the order of the layers' own matrices, one layer after the other."""
        sizes = [layer.index.numel() for layer in self.layers]
        stops = torch.tensor(sizes, device="cpu").cumsum(0).tolist()
        rows = [slice(stop - size, stop) for stop, size in zip(stops, sizes, strict=True)]
        matrix = self.sums[0, 0].new_empty(stops[-1], stops[-1])
        for i, j in list(self.sums):
            (d, a), (e, b) = self.layers[i].index.shape, self.layers[j].index.shape
            block = self._pair(i, j).reshape(d, e, a, b).permute(0, 2, 1, 3)
            if i == j:
                # The others are mirrored.
                block = (block + block.permute(2, 3, 0, 1)) / 2
            if (i, j) in self.crossed:
                block = block + self.crossed.pop((i, j))
            if (j, i) in self.crossed:
                block = block + self.crossed.pop((j, i)).permute(2, 3, 0, 1)
            matrix[rows[i], rows[j]].view(d, a, e, b).copy_(block)
            if i != j:
                matrix[rows[j], rows[i]].view(e, b, d, a).copy_(block.permute(2, 3, 0, 1))
        return matrix


def _upper(a: torch.Tensor) -> torch.Tensor:
    """Return the products of each two entries of rows (m, i): half of aaᵀ, which is symmetric."""
    first, second = torch.triu_indices(a.shape[1], a.shape[1], device=a.device)
    return a.index_select(1, first) * a.index_select(1, second)
