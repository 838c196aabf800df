"""Orthonormal vectors that a spectrum belongs to: eigenvectors, Kronecker products, the axes, and blocks of these."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch

from .._state import TensorState
from .._storage import HERE, Storage
from .placing import in_chunks, join_blocks, order_of, split_blocks

__all__ = ["Basis", "BlockBasis", "Eigenvectors", "KroneckerBasis", "StandardBasis", "rounding", "zero_cut"]


# Numbers of the rows that are taken at once where each is a matrix of its own: what is made of them stays in the
# caches, and small tensors take memory that was used before, where large ones take new pages.
AT_ONCE = 2**18


def rounding(size: int, dtype: torch.dtype) -> float:
    """Return (10 + √p)·eps: how far from zero a null eigenvalue of a p × p matrix of norm 1 comes out by rounding.

    eps is that of the dtype in which the matrix was made and decomposed; the rounding of p entries in a row adds up
    like √p, and 10 is for matrices of few.
    """
    return (10 + size**0.5) * torch.finfo(dtype).eps


def zero_cut(values: torch.Tensor, size: int) -> float:
    """Return (10 + √p)·eps·max|θ|: within it an eigenvalue of a p × p matrix is zero, below its negative negative."""
    return rounding(size, values.dtype) * (float(values.abs().max()) if values.numel() else 0.0)


class Basis(TensorState, ABC):
    """The orthonormal columns Q (p, r) of Q diag(θ) Qᵀ, on rows.

    Attributes
    ----------
    size, rank : int
        p and r; all of the space where they are the same.
    of_curvature : bool
        Whether these are eigenvectors of the curvature itself, as far as they go; else of an approximation.
    """

    of_curvature: ClassVar[bool] = False

    @property
    @abstractmethod
    def size(self) -> int:
        """Number p of entries of a row."""

    @property
    def rank(self) -> int:
        """Number r of vectors: p, unless a class says otherwise."""
        return self.size

    @property
    def rows_at_once(self) -> int | None:
        """How many rows to take at once for speed on the CPU; None is all, for the sake of one GEMM."""
        return None

    @abstractmethod
    def coordinates(self, V: torch.Tensor) -> torch.Tensor:
        """Return V Q (k, r) of rows V (k, p)."""

    @abstractmethod
    def combination(self, C: torch.Tensor) -> torch.Tensor:
        """Return C Qᵀ (k, p) of coordinates C (k, r)."""

    @abstractmethod
    def diagonal(self, values: torch.Tensor) -> torch.Tensor:
        """Return the diagonal (p,) of Q diag(values) Qᵀ."""

    def zero_cuts(self, eigenvalues: torch.Tensor, hessian_perturbation: float) -> torch.Tensor:
        """Return (r,): within which distance of zero each θ + λ counts as zero.

        Here all are rounded together, as those of one matrix. With θ ≥ 0 and λ > 0 nothing is zero, however small λ is:
        θ + λ is then as exact as λ.
        """
        safe = hessian_perturbation > 0 and bool((eigenvalues >= 0).all())
        return torch.full_like(eigenvalues, 0.0 if safe else zero_cut(eigenvalues, self.size))


class Eigenvectors(Basis):
    """Orthonormal rows (r, p), r ≤ p: eigenvectors as they are.

    Examples
    --------
    >>> Eigenvectors(torch.tensor([[0.6, 0.8]])).coordinates(torch.tensor([[5.0, 0.0]]))
    tensor([[3.]])
    """

    _fields = {"rows": "tensor[r,p]"}
    of_curvature = True

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    @property
    def size(self) -> int:
        """Number p of entries of a row."""
        return self.rows.shape[1]

    @property
    def rank(self) -> int:
        """Number r of eigenvectors."""
        return self.rows.shape[0]

    def coordinates(self, V: torch.Tensor) -> torch.Tensor:
        """Return the products with the eigenvectors, by one GEMM."""
        return V @ self.rows.mT

    def combination(self, C: torch.Tensor) -> torch.Tensor:
        """Return the sums of eigenvectors, by one GEMM."""
        return C @ self.rows

    def diagonal(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sums of their squares."""
        return values @ self.rows.square()


class KroneckerBasis(Basis):
    """Q = U_G ⊗ U_A on flat matrices (d, i) in row-major order, kept as its factors.

    Rows may be on another device than the factors, which are then moved to it for each call.

    Parameters
    ----------
    left : tensor of shape (d, d) or (q, d, d)
        U_G, eigenvectors in columns; q of them for q groups, each with its own (d, i) of a row.
    right : tensor of shape (i, i), (q, i, i) or None
        U_A; None is the identity.
    inputs : int
        i.
    """

    _fields = {"left": "tensor[d,d]|tensor[q,d,d]", "right": "tensor[i,i]|None|tensor[q,i,i]", "inputs": "int"}

    def __init__(self, left: torch.Tensor, right: torch.Tensor | None, inputs: int) -> None:
        self.left, self.right, self.inputs = left, right, int(inputs)

    @property
    def shape(self) -> tuple[int, ...]:
        """(d, i), or (q, d, i) of q groups."""
        return (*self.left.shape[:-1], self.inputs)

    @property
    def size(self) -> int:
        """Number of entries of the matrices."""
        return math.prod(self.shape)

    @property
    def rows_at_once(self) -> int | None:
        """A few: each row is a matrix, with GEMMs of its own."""
        return max(8, AT_ONCE // self.size)

    def coordinates(self, V: torch.Tensor) -> torch.Tensor:
        """Return U_Gᵀ W U_A of matrices W, flat."""
        W = V.reshape(len(V), *self.shape)
        left, right = self._on(V.device)
        return (left.mT @ (W if right is None else W @ right)).reshape(V.shape)

    def combination(self, C: torch.Tensor) -> torch.Tensor:
        """Return U_G C U_Aᵀ of coordinates C, flat."""
        W = C.reshape(len(C), *self.shape)
        left, right = self._on(C.device)
        return (left @ (W if right is None else W @ right.mT)).reshape(C.shape)

    def diagonal(self, values: torch.Tensor) -> torch.Tensor:
        """Return U_G² e (U_A²)ᵀ, squares by entry."""
        W = values.reshape(self.shape)
        left, right = self._on(values.device)
        return (left.square() @ (W if right is None else W @ right.square().mT)).reshape(-1)

    def quadratic(self, R: torch.Tensor) -> torch.Tensor:
        """Return diag(Qᵀ diag(R) Q) (p,) of a diagonal R."""
        W = R.reshape(self.shape)
        left, right = self._on(R.device)
        return (left.square().mT @ (W if right is None else W @ right.square())).reshape(-1)

    def of_inputs(self, a: torch.Tensor) -> torch.Tensor:
        """Return U_Aᵀ a of rows a (..., i)."""
        return a if self.right is None else a @ self.right.to(a.device)

    def of_signals(self, g: torch.Tensor) -> torch.Tensor:
        """Return U_Gᵀ g of rows g (..., d)."""
        return g @ self.left.to(g.device)

    def _on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.left.to(device), None if self.right is None else self.right.to(device)


class StandardBasis(Basis):
    """The axes themselves: θ is a diagonal, whose entries may differ in scale by many decades.

    Each is judged by itself: it counts, however small beside the others, unless rounding of its own makes θ + λ zero.
    """

    _fields = {"length": "int"}

    def __init__(self, size: int) -> None:
        self.length = int(size)

    @property
    def size(self) -> int:
        """Number p of entries of a row."""
        return self.length

    def coordinates(self, V: torch.Tensor) -> torch.Tensor:
        """Return the rows as they are."""
        return V

    def combination(self, C: torch.Tensor) -> torch.Tensor:
        """Return the coordinates as they are."""
        return C

    def diagonal(self, values: torch.Tensor) -> torch.Tensor:
        """Return the values."""
        return values

    def zero_cuts(self, eigenvalues: torch.Tensor, hessian_perturbation: float) -> torch.Tensor:
        """Return the rounding of each entry."""
        own = rounding(1, eigenvalues.dtype) * eigenvalues.abs()
        return torch.where(eigenvalues >= 0, 0.0, own) if hessian_perturbation > 0 else own


class BlockBasis(Basis):
    """One basis for each block of a row's entries; coordinates of one block after those of the other.

    Parameters
    ----------
    bases : sequence of Basis
        The blocks'.
    indices : sequence of tensor of shape (size of the block,)
        Which entries of a row each block has, in its own order: all of 0, …, p − 1, each once.
    storage : Storage
        Where the order of the entries is to lie.
    """

    _fields = {"bases": "list[Basis]", "order": "index[p]"}

    def __init__(self, bases: Sequence[Basis], indices: Sequence[torch.Tensor], storage: Storage = HERE) -> None:
        self.bases = list(bases)
        # One tensor, so that it is pickled as an array.
        self.order = order_of(indices, self.size, indices[0].device, storage)

    @property
    def size(self) -> int:
        """Number p of entries of a row."""
        return sum(basis.size for basis in self.bases)

    @property
    def rank(self) -> int:
        """Number of all vectors."""
        return sum(basis.rank for basis in self.bases)

    @property
    def rows_at_once(self) -> int | None:
        """As many as the whole of a row allows, where all blocks but the axes want few."""
        wanted = [basis.rows_at_once for basis in self.bases if not isinstance(basis, StandardBasis)]
        return max(8, AT_ONCE // self.size) if wanted and None not in wanted else None

    def coordinates(self, V: torch.Tensor) -> torch.Tensor:
        """Return each block's coordinates, in chunks of rows that fit the working memory."""
        return in_chunks(self._coordinates, V, self.rank)

    def combination(self, C: torch.Tensor) -> torch.Tensor:
        """Return each block's combination in its place, in chunks of rows that fit the working memory."""
        return in_chunks(self._combination, C, self.size)

    def diagonal(self, values: torch.Tensor) -> torch.Tensor:
        """Return the diagonals of the blocks, in place."""
        own = zip(self.bases, self.parts(values), strict=True)
        return join_blocks([basis.diagonal(part)[None] for basis, part in own], self.order)[0]

    def zero_cuts(self, eigenvalues: torch.Tensor, hessian_perturbation: float) -> torch.Tensor:
        """Return each block's own."""
        own = zip(self.bases, self.parts(eigenvalues), strict=True)
        return torch.cat([basis.zero_cuts(part, hessian_perturbation) for basis, part in own])

    def parts(self, values: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return each block's own of the values (..., r)."""
        return values.split([basis.rank for basis in self.bases], dim=-1)

    def _coordinates(self, V: torch.Tensor) -> torch.Tensor:
        own = zip(self.bases, split_blocks(V, [basis.size for basis in self.bases], self.order), strict=True)
        return join_blocks([basis.coordinates(part) for basis, part in own], None)

    def _combination(self, C: torch.Tensor) -> torch.Tensor:
        own = zip(self.bases, self.parts(C), strict=True)
        return join_blocks([basis.combination(part) for basis, part in own], self.order)
