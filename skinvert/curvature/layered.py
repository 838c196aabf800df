"""Factored curvatures that say what they pull back through the model: a matrix and Kronecker factors layer by layer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection

import torch

from .._checkpoint import NOWHERE, Checkpoint
from .._storage import HERE, Storage
from .._types import Batch
from ..operators import KroneckerFactors, add_to_diagonal
from .factored import Factored
from .layers import Signals, agrees, dense_from_layers, diagonal_from_layers, kronecker_factors

__all__ = ["Layered"]


class Layered(Factored):
    r"""A = Σᵣ gᵣgᵣᵀ + penalty, with gᵣ = Σᵢ Dᵢᵣ · ∂vᵢ/∂θ per sample, for directions D at values v that a batch gives.

    A subclass defines ``factor_of``, as every ``Factored`` curvature, and ``signals``: so it serves ``"kfac"`` and
    ``"ekfac"``, and its matrix is assembled from the layers' inputs where each sees one row a sample.
    """

    @abstractmethod
    def signals(self, batch: Batch, weights: torch.Tensor) -> Signals:
        """Return values of the m rows of a batch and the directions at them, √wᵢ included, with Σ gᵣgᵣᵀ = Σ wᵢhᵢ."""

    def kronecker_factors(
        self,
        approx: str = "expand",
        unsupported: str = "error",
        verbose: int = 0,
        checkpoint: Checkpoint = NOWHERE,
        storage: Storage = HERE,
    ) -> KroneckerFactors:
        """Return the factors of each layer."""
        return kronecker_factors(self, approx, unsupported, verbose, checkpoint, storage)

    def to_dense(self, verbose: int = 0) -> torch.Tensor:
        """Return the matrix (p, p).

        Σᵢ Dᵢ ⊗ aᵢaᵢᵀ for Linear layers, where a sample has several rows of F, else by the factor.
        """
        # For one row of F a sample, the factor's own product costs n p² too.
        matrix = self._dense_from_layers(verbose) if self.rank > 1 else None
        return super().to_dense(verbose) if matrix is None else add_to_diagonal(matrix, self.penalty)

    def diagonal(self) -> torch.Tensor:
        """Return the diagonal, from the layers' inputs and signals, else from the squares of the factor."""
        found = diagonal_from_layers(self)
        if found is None:
            return super().diagonal()
        return found if self.penalty is None else found + self.penalty

    def diagonal_at(self, names: Collection[str]) -> torch.Tensor:
        """Return the exact diagonal at some parameters, in flat order, with no derivative by the others."""
        diagonal = self._over(self.objective.restricted(names)).diagonal()
        return diagonal if self.penalty is None else diagonal + self.penalty[self.objective.places(names)]

    def _dense_from_layers(self, verbose: int) -> torch.Tensor | None:
        """Assemble from layer inputs and output derivatives, without the penalty; None where that cannot be.

        The result is checked against a product, which shares none of its code.
        """
        matrix = dense_from_layers(self, verbose)
        return matrix if matrix is not None and agrees(self, matrix, self.objective.eps) else None
