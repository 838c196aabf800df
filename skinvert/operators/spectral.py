"""The operator of a few eigenpairs, and of one value on all that is orthogonal to them."""

from __future__ import annotations

import torch

from .base import LinearOperator

__all__ = ["Spectral"]


class Spectral(LinearOperator):
    """The operator Uᵀ diag(values) U + rest (I − UᵀU) of orthonormal rows U (r, p).

    Examples
    --------
    >>> Spectral(torch.tensor([2.0]), torch.tensor([[1.0, 0.0]]), 0.5).apply(torch.ones(1, 2))
    tensor([[2.0000, 0.5000]])
    """

    def __init__(self, values: torch.Tensor, vectors: torch.Tensor, rest: float) -> None:
        super().__init__(vectors.shape[1], vectors.dtype, vectors.device)
        self.values, self.vectors, self.rest = values, vectors, rest
        self.is_psd = rest >= 0 and bool((values >= 0).all())

    def apply(self, V: torch.Tensor) -> torch.Tensor:
        """Return the products, by two GEMMs."""
        along = V @ self.vectors.mT
        return self.rest * V + (along * (self.values - self.rest)) @ self.vectors

    def diagonal(self) -> torch.Tensor:
        """Return the diagonal (p,)."""
        return self.rest + (self.values - self.rest) @ self.vectors.square()
