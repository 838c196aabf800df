"""The operator of eigenvalues along a basis, and of one value on all that is orthogonal to it."""

from __future__ import annotations

import torch

from .base import ON_ROWS, LinearOperator
from .bases import Basis

__all__ = ["Spectral"]


class Spectral(LinearOperator):
    """The operator Q diag(values) Qᵀ + rest (I − QQᵀ) of a basis Q; ``rest`` counts where Q is not all of the space.

    ``device`` is that of the rows, where the values lie on another.

    Examples
    --------
    >>> from skinvert.operators import Eigenvectors
    >>> Spectral(Eigenvectors(torch.tensor([[1.0, 0.0]])), torch.tensor([2.0]), 0.5).apply(torch.ones(1, 2))
    tensor([[2.0000, 0.5000]])
    """

    _fields = {**ON_ROWS, "basis": "Basis", "values": "tensor[r]", "rest": "float", "is_psd": "bool"}

    def __init__(
        self, basis: Basis, values: torch.Tensor, rest: float = 0.0, device: torch.device | None = None
    ) -> None:
        super().__init__(basis.size, values.dtype, values.device if device is None else device)
        self.basis, self.values = basis, values
        self.rest = 0.0 if basis.rank == basis.size else float(rest)
        self.is_psd = self.rest >= 0 and bool((values >= 0).all())

    def apply(self, V: torch.Tensor) -> torch.Tensor:
        """Return the products, from the rows' coordinates."""
        along = self.basis.combination(self.basis.coordinates(V) * self._beyond_rest())
        return self.rest * V + along if self.rest else along

    def in_float64(self) -> None:
        """Return None: eigenpairs are right to the tolerance of their solver, not to rounding."""

    def diagonal(self) -> torch.Tensor:
        """Return the diagonal (p,)."""
        return self.rest + self.basis.diagonal(self._beyond_rest())

    def _beyond_rest(self) -> torch.Tensor:
        return (self.values - self.rest if self.rest else self.values).to(self.device)
