"""The Kronecker factors of a curvature's layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .._storage import HERE, Storage
from .bases import KroneckerBasis

__all__ = ["KroneckerBlock", "KroneckerFactors"]


@dataclass(frozen=True)
class KroneckerBlock:
    """One layer's factors, with H ≈ G ⊗ A + diag(penalty) on its parameters; they may lie on another device than rows.

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

    def decompose(self, storage: Storage = HERE) -> tuple[KroneckerBasis, torch.Tensor]:
        """Return the eigenbasis of G ⊗ A, in the storage, and its eigenvalues, flat, on the device that computes."""
        device = self.left.device if storage.device is None else storage.device
        left, U = torch.linalg.eigh(self.left.to(device))
        U = storage.keep(U, "inverse")
        right, V = self.right.to(device), None
        if right.ndim > 1:
            right, V = torch.linalg.eigh(right)
            V = storage.keep(V, "inverse")
        # Rounding alone makes zero eigenvalues slightly negative.
        eigenvalues = left.clamp(min=0)[..., :, None] * right.clamp(min=0)[..., None, :]
        return KroneckerBasis(U, V, self.index.shape[-1]), eigenvalues.reshape(-1)

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
        Maps one ``KroneckerBasis`` per block to diag(QᵀHQ) (d, i) of each layer, exact and without the penalty, by one
        more pass over the data.
    """

    blocks: tuple[KroneckerBlock, ...]
    rest: torch.Tensor
    rest_diagonal: torch.Tensor
    refit: Callable[[Sequence[KroneckerBasis]], list[torch.Tensor]]
