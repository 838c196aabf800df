"""Kronecker products on the rows of a layer."""

from __future__ import annotations

import math

import torch

from .base import ON_ROWS, LinearOperator

__all__ = ["Kronecker"]


class Kronecker(LinearOperator):
    r"""G ⊗ A on rows vec(W), with W (d, i) in row-major order: W ↦ G W Aᵀ.

    Parameters
    ----------
    left : tensor of shape (d, d) or (q, d, d)
        G, symmetric positive semi-definite; q of them for q groups, each with its own (d, i) of a row.
    right : tensor of shape (i, i), (i,) or (q, i, i)
        A, symmetric positive semi-definite; its diagonal where it is diagonal.
    device : torch.device, default=None
        Of the rows; None is that of the factors, which are else moved to it for each call.

    Examples
    --------
    >>> Kronecker(torch.tensor([[2.0]]), torch.tensor([[1.0, 1.0], [1.0, 3.0]])).apply(torch.tensor([[1.0, 0.0]]))
    tensor([[2., 2.]])
    """

    _fields = {**ON_ROWS, "left": "tensor[d,d]|tensor[q,d,d]", "right": "tensor[i,i]|tensor[i]|tensor[q,i,i]"}

    is_psd = True

    def __init__(self, left: torch.Tensor, right: torch.Tensor, device: torch.device | None = None) -> None:
        shape = (*left.shape[:-1], right.shape[-1])
        super().__init__(math.prod(shape), left.dtype, left.device if device is None else device)
        self.left, self.right = left, right

    def apply(self, V: torch.Tensor) -> torch.Tensor:
        """Return G W A for each row."""
        left, right = self._here()
        W = left @ V.reshape(len(V), *left.shape[:-1], right.shape[-1])
        return (W * right if right.ndim == 1 else W @ right).reshape(V.shape)

    def to_dense(self, verbose: int = 0) -> torch.Tensor:
        """Return the matrix (d i, d i), or the block-diagonal one of the groups."""
        left, right = self._here()
        if left.ndim == 3:
            return torch.block_diag(*[torch.kron(G, A) for G, A in zip(left, right, strict=True)])
        right = torch.diag(right) if right.ndim == 1 else right
        return torch.kron(left.contiguous(), right.contiguous())

    def diagonal(self) -> torch.Tensor:
        """Return the outer product of the diagonals, flat."""
        left, right = self._here()
        right = right if right.ndim == 1 else right.diagonal(dim1=-2, dim2=-1)
        return (left.diagonal(dim1=-2, dim2=-1)[..., :, None] * right[..., None, :]).reshape(-1)

    def _here(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.left.to(self.device), self.right.to(self.device)
