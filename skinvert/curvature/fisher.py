"""The empirical Fisher of the true labels: Σ wᵢ gᵢgᵢᵀ / Σ wᵢ."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .._memory import rows_within, working_memory
from .._progress import progress
from ..operators import add_to_diagonal, symmetrise
from .base import Curvature, Objective
from .ggn import split_batch
from .rows import gradient_rows

__all__ = ["EmpiricalFisher"]


class EmpiricalFisher(Curvature):
    r"""E = Σᵢ wᵢ gᵢgᵢᵀ / Σᵢ wᵢ + penalty, with gᵢ = ∇ℓᵢ of the true labels, the penalty left out of gᵢ.

    Neither the Fisher nor the Gauss–Newton matrix: its size follows the residuals, and at an interpolating minimum it
    is zero.

    References
    ----------
    Kunstner, Balles & Hennig (2019), "Limitations of the empirical Fisher approximation", eq. 3.
    """

    is_psd = True

    def __init__(self, objective: Objective) -> None:
        super().__init__(objective)
        self.hint = ""
        self._factor: torch.Tensor | None = None

    _transient = ("_graphs", "_factor")

    @property
    def factor_shape(self) -> tuple[int, int]:
        """(n, p), known before the factor is built."""
        return (self.objective.batches.n_samples, self.size)

    def factor(self, verbose: int = 0) -> torch.Tensor:
        """Return F (n, p) with E = FᵀF + diag(penalty): the rows √(wᵢ/Σw) gᵢ."""
        return torch.cat(list(self.factor_chunks(verbose)))

    def factor_chunks(self, verbose: int = 0) -> Iterator[torch.Tensor]:
        """Yield the factor in chunks of rows that fit the working memory."""
        chunk = rows_within(3 * self.size * self.dtype.itemsize)
        for batch, weights in progress(self.objective.batches, "per-sample gradients", verbose):
            for rows, part in split_batch(batch, weights, chunk):
                yield self._factor_of(rows, part)

    def apply(self, V: torch.Tensor) -> torch.Tensor:
        """Return (V Fᵀ) F plus the penalty's share; F is kept where it fits the working memory."""
        if self._factor is None and self.factor_shape[0] * self.size * self.dtype.itemsize <= working_memory():
            self._factor = self.factor()
        product = torch.zeros_like(V)
        for rows in self.factor_chunks() if self._factor is None else [self._factor]:
            product += (V @ rows.mT) @ rows
        return product if self.penalty is None else product + V * self.penalty

    def to_dense(self, verbose: int = 0) -> torch.Tensor:
        """Return the matrix (p, p), by one GEMM per chunk of the factor."""
        matrix = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for rows in self.factor_chunks(verbose):
            matrix.addmm_(rows.mT, rows)
        return symmetrise(add_to_diagonal(matrix, self.penalty))

    def diagonal(self) -> torch.Tensor:
        """Return the diagonal, from the squares of the factor."""
        diagonal = sum((rows.square().sum(0) for rows in self.factor_chunks()), start=torch.zeros(()))
        return diagonal if self.penalty is None else diagonal + self.penalty

    def sample_terms(self, batch: Any, Z: torch.Tensor) -> torch.Tensor:
        """Return zᵢᵀ hᵢ zᵢ (m,) of each row's own term hᵢ = gᵢgᵢᵀ."""
        return (self._gradients(batch) * Z).sum(1).square()

    def _factor_of(self, batch: Any, weights: torch.Tensor) -> torch.Tensor:
        return self._gradients(batch) * (weights / self.objective.weight_sum).sqrt()[:, None]

    def _gradients(self, batch: Any) -> torch.Tensor:
        return self.objective.scale * gradient_rows(self.objective.model, batch)
