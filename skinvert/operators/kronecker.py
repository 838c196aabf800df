"""Operators of layers: Kronecker products, their eigenbases, and the factors of a curvature."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from .._state import TensorState
from .base import LinearOperator

__all__ = ["Eigenbasis", "Kronecker", "KroneckerBlock", "KroneckerFactors", "Rotated"]


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

    _fields: ClassVar[dict[str, str]] = {
        "size": "int",
        "dtype": "dtype",
        "device": "device",
        "left": "tensor[d,d]|tensor[q,d,d]",
        "right": "tensor[i,i]|tensor[i]|tensor[q,i,i]",
    }

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


class Eigenbasis(TensorState):
    """The orthogonal matrix Q = U_G ⊗ U_A, kept as its factors; ``right`` None is the identity.

    Parameters
    ----------
    left : tensor of shape (d, d) or (q, d, d)
        U_G, eigenvectors in columns; q of them for q groups.
    right : tensor of shape (i, i), (q, i, i) or None
        U_A.
    """

    _fields: ClassVar[dict[str, str]] = {
        "left": "tensor[d,d]|tensor[q,d,d]",
        "right": "tensor[i,i]|None|tensor[q,i,i]",
    }

    def __init__(self, left: torch.Tensor, right: torch.Tensor | None) -> None:
        self.left, self.right = left, right

    def coordinates(self, W: torch.Tensor) -> torch.Tensor:
        """Return U_Gᵀ W U_A of matrices W (..., d, i)."""
        return self.left.mT @ (W if self.right is None else W @ self.right)

    def combination(self, C: torch.Tensor) -> torch.Tensor:
        """Return U_G C U_Aᵀ of coordinates C (..., d, i)."""
        return self.left @ (C if self.right is None else C @ self.right.mT)

    def of_inputs(self, a: torch.Tensor) -> torch.Tensor:
        """Return U_Aᵀ a of rows a (..., i)."""
        return a if self.right is None else a @ self.right

    def of_signals(self, g: torch.Tensor) -> torch.Tensor:
        """Return U_Gᵀ g of rows g (..., d)."""
        return g @ self.left

    def quadratic(self, R: torch.Tensor) -> torch.Tensor:
        """Return diag(Qᵀ diag(R) Q) of a diagonal R, both of the shape of a layer's matrix."""
        right = R if self.right is None else R @ self.right.square()
        return self.left.square().mT @ right


class Rotated(LinearOperator):
    """Q diag(e) Qᵀ, with Q an ``Eigenbasis`` and e the eigenvalues (d, i), or (q, d, i) of q groups."""

    _fields: ClassVar[dict[str, str]] = {
        "size": "int",
        "dtype": "dtype",
        "device": "device",
        "basis": "Eigenbasis",
        "eigenvalues": "tensor[d,i]|tensor[q,d,i]",
        "is_psd": "bool",
    }

    def __init__(self, basis: Eigenbasis, eigenvalues: torch.Tensor) -> None:
        super().__init__(eigenvalues.numel(), eigenvalues.dtype, eigenvalues.device)
        self.basis, self.eigenvalues = basis, eigenvalues
        self.is_psd = bool((eigenvalues >= 0).all())

    def apply(self, V: torch.Tensor) -> torch.Tensor:
        """Return the rows, rotated, scaled and rotated back."""
        C = self.basis.coordinates(V.reshape(len(V), *self.eigenvalues.shape))
        return self.basis.combination(C * self.eigenvalues).reshape(V.shape)


@dataclass(frozen=True)
class KroneckerBlock:
    """One layer's factors, with H ≈ G ⊗ A + diag(penalty) on its parameters.

    Attributes
    ----------
    name : str
        Of the layer.
    index : tensor of shape (d, i) or (q, d, i)
        Where the layer's matrix [weight, bias] lies in a flat row; the q matrices of a grouped convolution.
    left : tensor of shape (d, d) or (q, d, d)
        G, of the derivatives at the layer's results.
    right : tensor of shape (i, i), (i,) or (q, i, i)
        A, of the layer's inputs with the bias's coordinate; its diagonal for an Embedding.
    penalty : tensor of the shape of ``index``, or None
        The penalty's Hessian.
    """

    name: str
    index: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor
    penalty: torch.Tensor | None

    def decompose(self) -> tuple[Eigenbasis, torch.Tensor]:
        """Return the eigenbasis of G ⊗ A and its eigenvalues, of the shape of ``index``."""
        left, U = torch.linalg.eigh(self.left)
        right, V = (self.right, None) if self.right.ndim == 1 else torch.linalg.eigh(self.right)
        # Rounding alone makes zero eigenvalues slightly negative.
        return Eigenbasis(U, V), left.clamp(min=0)[..., :, None] * right.clamp(min=0)[..., None, :]

    @property
    def uniform_penalty(self) -> float | None:
        """The one value of the penalty, 0 without one; None where it differs between the layer's parameters."""
        if self.penalty is None:
            return 0.0
        first = self.penalty.reshape(-1)[0]
        return float(first) if bool((self.penalty == first).all()) else None


@dataclass(frozen=True)
class KroneckerFactors:
    """What a layered curvature gives to the methods that invert it layer by layer.

    Attributes
    ----------
    blocks : tuple of KroneckerBlock
        One a layer.
    rest : tensor of shape (q,)
        Places of the parameters that no Kronecker layer holds: those of norms, and the unsupported ones.
    rest_diagonal : tensor of shape (q,)
        The exact diagonal of the curvature there, penalty included.
    refit : callable
        Maps one ``Eigenbasis`` per block to diag(QᵀHQ) (d, i) of each layer, exact and without the penalty, by one
        more pass over the data.
    """

    blocks: tuple[KroneckerBlock, ...]
    rest: torch.Tensor
    rest_diagonal: torch.Tensor
    refit: Callable[[Sequence[Eigenbasis]], list[torch.Tensor]]
