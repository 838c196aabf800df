"""The Kronecker factors of a curvature's layers, and the eigenbases that they have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from .._state import TensorState

__all__ = ["Eigenbasis", "KroneckerBlock", "KroneckerFactors"]


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
