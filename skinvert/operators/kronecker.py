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

    Examples
    --------
    >>> Kronecker(torch.tensor([[2.0]]), torch.tensor([[1.0, 1.0], [1.0, 3.0]])).apply(torch.tensor([[1.0, 0.0]]))
    tensor([[2., 2.]])
    """

    _fields = {**ON_ROWS, "left": "tensor[d,d]|tensor[q,d,d]", "right": "tensor[i,i]|tensor[i]|tensor[q,i,i]"}

    is_psd = True

    def __init__(self, left: torch.Tensor, right: torch.Tensor) -> None:
        shape = (*left.shape[:-1], right.shape[-1])
        super().__init__(math.prod(shape), left.dtype, left.device)
        self.left, self.right = left, right

    def apply(self, V: torch.Tensor) -> torch.Tensor:
        """Return G W A for each row."""
        W = self.left @ V.reshape(len(V), *self.left.shape[:-1], self.right.shape[-1])
        return (W * self.right if self.right.ndim == 1 else W @ self.right).reshape(V.shape)

    def to_dense(self, verbose: int = 0) -> torch.Tensor:
        """Return the matrix (d i, d i), or the block-diagonal one of the groups."""
        if self.left.ndim == 3:
            return torch.block_diag(*[torch.kron(G, A) for G, A in zip(self.left, self.right, strict=True)])
        right = torch.diag(self.right) if self.right.ndim == 1 else self.right
        return torch.kron(self.left.contiguous(), right.contiguous())

    def diagonal(self) -> torch.Tensor:
        """Return the outer product of the diagonals, flat."""
        right = self.right if self.right.ndim == 1 else self.right.diagonal(dim1=-2, dim2=-1)
        return (self.left.diagonal(dim1=-2, dim2=-1)[..., :, None] * right[..., None, :]).reshape(-1)
