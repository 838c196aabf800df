"""A curvature written out: the same matrix, factor, samples and layers, without the model and its passes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from .._checkpoint import NOWHERE, Checkpoint
from .._storage import HERE, Storage
from ..operators import Dense, KroneckerBasis, KroneckerFactors, LinearOperator, symmetrise

__all__ = ["Tabulated"]


class Tabulated(LinearOperator):
    """What an operator computes, computed once and kept; with the faces that it has.

    Parameters
    ----------
    A : LinearOperator
        Of few parameters and samples.
    dtype : torch.dtype
        What its float64 numbers are rounded to.
    """

    def __init__(self, A: LinearOperator, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(A.size, dtype, A.device)
        # Those of the operator that is written out.
        self.faces = A.faces
        self.is_psd, self.hint = A.is_psd, A.hint
        self.penalty = None if A.penalty is None else A.penalty.to(dtype)
        self.matrix = symmetrise(A.apply(torch.eye(A.size, dtype=A.dtype))).to(dtype)
        self.rows = A.factor().to(dtype) if "factor" in A.faces else None
        self.gradients = tuple(part.to(dtype) for part in A.gradient_rows()) if "gradient_rows" in A.faces else None
        self.samples = _samples(A, dtype) if "minibatch" in A.faces else None
        self.layers = {
            approx: A.kronecker_factors(approx) if "kronecker_factors" in A.faces else None
            for approx in ("expand", "reduce")
        }

        companion = A.psd_companion()
        self.companion = None if companion is None or companion is A else Tabulated(companion, dtype)

    def psd_companion(self) -> LinearOperator | None:
        """Return itself, or what stands for it."""
        return self if self.is_psd else self.companion

    def apply(self, V: torch.Tensor) -> torch.Tensor:
        """Return V A."""
        return V @ self.matrix

    @property
    def factor_shape(self) -> tuple[int, int] | None:
        """(r, p)."""
        return None if self.rows is None else (len(self.rows), self.size)

    def factor(self, verbose: int = 0) -> torch.Tensor:
        """Return F."""
        return super().factor() if self.rows is None else self.rows.clone()

    def factor_chunks(self, verbose: int = 0) -> Iterator[torch.Tensor]:
        """Yield F whole."""
        yield self.factor()

    def gradient_rows(self, verbose: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the samples' gradients and shares."""
        if self.gradients is None:
            return super().gradient_rows()
        rows, shares = self.gradients
        return rows.clone(), shares

    @property
    def n_samples(self) -> int:
        """Number n of samples."""
        return super().n_samples if self.samples is None else len(self.samples)

    def minibatch(self, rows: torch.Tensor) -> LinearOperator:
        """Return the mean of the samples' own matrices."""
        return super().minibatch(rows) if self.samples is None else Dense(self.samples[rows].mean(0))

    def kronecker_factors(
        self,
        approx: str = "expand",
        unsupported: str = "error",
        verbose: int = 0,
        checkpoint: Checkpoint = NOWHERE,
        storage: Storage = HERE,
    ) -> KroneckerFactors:
        """Return the layers' factors; ``refit`` is by the matrix."""
        factors = self.layers[approx]
        if factors is None:
            return super().kronecker_factors()
        blocks = tuple(
            replace(
                block,
                left=block.left.to(self.dtype),
                right=block.right.to(self.dtype),
                penalty=None if block.penalty is None else block.penalty.to(self.dtype),
            )
            for block in factors.blocks
        )
        return KroneckerFactors(blocks, factors.rest, factors.rest_diagonal.to(self.dtype), self._refit)

    def _refit(self, bases: Sequence[KroneckerBasis]) -> list[torch.Tensor]:
        """Return diag(QᵀHQ) of each layer's block of H, the penalty left out."""
        factors = self.layers["expand"]
        assert factors is not None
        H = self.matrix if self.penalty is None else self.matrix - torch.diag(self.penalty)
        diagonals = []
        for block, basis in zip(factors.blocks, bases, strict=True):
            index = block.index.reshape(-1)
            part = H[index][:, index]
            whole = basis.coordinates(basis.coordinates(part).mT)
            diagonals.append(whole.diagonal().reshape(block.index.shape).clone())
        return diagonals


def _samples(A: LinearOperator, dtype: torch.dtype) -> torch.Tensor:
    """Return each sample's own unbiased estimate of A, (n, p, p)."""
    return torch.stack([A.minibatch(torch.tensor([i])).to_dense() for i in range(A.n_samples)]).to(dtype)
