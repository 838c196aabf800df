"""The matrix of a curvature whose layers see one row a sample: Σᵢ Dᵢ ⊗ aᵢaᵢᵀ over every pair of layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..._memory import rows_within
from .found import layers_of
from .kinds import KroneckerLayer, Layer
from .passes import Passes, UnexplainedError
from .probe import probe
from .recording import PulledBack

__all__ = ["dense_from_layers"]


def dense_from_layers(curvature: PulledBack, verbose: int = 0) -> torch.Tensor | None:
    """Return the matrix (p, p) without the penalty; None unless all parameters are in layers that see one row each.

    One GEMM over the samples per pair of layers: n p² operations, where the factor's own product takes n c p².
    """
    # The probe takes passes: models that are none of these are told apart without it.
    if not _serves(layers_of(curvature.objective.model).layers, curvature):
        return None
    found, row_bytes = probe(curvature)
    layers = _serves(found.layers, curvature)
    if layers is None:
        return None
    held = 2 * curvature.rank * sum(len(layer.index) for layer in layers) * curvature.objective.dtype.itemsize
    passes, sums = Passes(curvature, found, row_bytes + held, verbose), _PairSums(layers)
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


def _serves(layers: Sequence[Layer], curvature: PulledBack) -> list[KroneckerLayer] | None:
    """Return the layers, or None unless they are linear ones that hold all parameters."""
    linear = [
        layer
        for layer in layers
        if isinstance(layer, KroneckerLayer) and layer.dims is None and not layer.is_one_hot and not layer.shared
    ]
    whole = sum(layer.index.numel() for layer in linear) == curvature.objective.size
    return linear if whole and len(linear) == len(layers) else None


class _PairSums:
    """Σᵢ (Zᵢᵀ Yᵢ) ⊗ (aᵢ bᵢᵀ) of every pair of layers as they grow."""

    def __init__(self, layers: Sequence[KroneckerLayer]) -> None:
        self.layers = layers
        self.sums: dict[tuple[int, int], torch.Tensor] = {}

    def add(self, inputs: Sequence[torch.Tensor], Z: Sequence[torch.Tensor]) -> None:
        """Add samples: each layer's inputs (m, i), and its signals along r directions (m, r, d)."""
        for i in range(len(Z)):
            for j in range(i + 1):
                size = (Z[i].shape[2] * Z[j].shape[2], inputs[i].shape[1] * inputs[j].shape[1])
                total = self.sums.setdefault((i, j), Z[i].new_zeros(size))
                _add_pair(total, Z[i], Z[j], inputs[i], inputs[j])

    def matrix(self) -> torch.Tensor:
        """Return the sums as one matrix (p, p), each entry at its place in a flat row; they are used up."""
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
            block = self.sums.pop((i, j)).reshape(d, e, a, b).permute(0, 2, 1, 3)
            matrix[rows[i], rows[j]].view(d, a, e, b).copy_(block)
            if i != j:
                matrix[rows[j], rows[i]].view(e, b, d, a).copy_(block.permute(2, 3, 0, 1))
        return matrix


def _add_pair(total: torch.Tensor, Z: torch.Tensor, Y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add Σₙ Zₙᵀ Yₙ ⊗ aₙ bₙᵀ to ``total`` (d e, i j), in chunks of samples that fit the working memory."""
    step = rows_within(sum(total.shape) * Z.element_size())
    for start in range(0, len(Z), step):
        rows = slice(start, start + step)
        D = torch.bmm(Z[rows].mT, Y[rows]).flatten(1)
        outer = (a[rows, :, None] * b[rows, None, :]).flatten(1)
        total.addmm_(D.mT, outer)
