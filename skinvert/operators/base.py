"""Symmetric linear operators on rows: ``A.apply(V)`` applies A to each row of V (k, p)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NoReturn, Protocol

import numpy as np
import scipy.sparse.linalg
import torch

from .._autograd import ordinary, ordinary_methods
from .._check import must_be
from .._checkpoint import NOWHERE, Checkpoint
from .._memory import available_memory, check_memory, rows_within
from .._progress import progress
from .._state import TensorState
from .._storage import HERE, Storage
from .factors import KroneckerFactors

__all__ = ["FACES", "LinearOperator", "add_to_diagonal", "as_scipy", "check_dense_memory", "symmetrise"]


# What an operator may offer beside products, its matrix and its diagonal; ``LinearOperator.faces`` says which it has.
FACES = ("factor", "factor_chunks", "sample_factors", "gradient_rows", "kronecker_factors", "minibatch")
# What computes, and so is made right under any ambient state of autograd.
_COMPUTED = ("apply", "to_dense", "diagonal", "in_float64", "signals", *FACES)
# What a file holds of every operator.
ON_ROWS = {"size": "int", "dtype": "dtype", "device": "device"}


class LinearOperator(TensorState, ABC):
    r"""A symmetric p × p operator on rows.

    ``apply`` is all that a subclass must define; the dense matrix and the diagonal then cost p products. A subclass
    with more structure says so by what it defines of the optional faces: ``factor()`` (rows F with A = FᵀF +
    diag(penalty)), and so on. Methods declare which of these they need.

    Parameters
    ----------
    size : int
        p, the width of a row.
    dtype : torch.dtype
        Of rows and products.
    device : torch.device
        Of rows and products.

    Attributes
    ----------
    is_psd : bool
        Whether the operator is positive semi-definite by construction.
    hint : str
        What to try where the operator turns out to be indefinite: it ends the warnings of the methods.
    penalty : tensor of shape (p,) or None
        The diagonal that ``factor`` leaves out.
    faces : frozenset of str
        Which of ``FACES`` the class defines.

    Examples
    --------
    >>> from skinvert.operators import DiagonalMatrix, LowRank
    >>> A = DiagonalMatrix(torch.tensor([1.0, 2.0]))
    >>> A.apply(torch.tensor([[3.0, 4.0]]))
    tensor([[3., 8.]])
    >>> A.aslinearoperator() @ np.array([3.0, 4.0])
    array([3., 8.], dtype=float32)
    >>> LowRank(torch.ones(1, 2)).faces
    frozenset({'factor'})
    """

    is_psd: bool = False
    hint: str = ""
    penalty: torch.Tensor | None = None
    # Of the class, save where an operator stands for another.
    faces: frozenset[str] = frozenset()
    # The same operator at less cost and with fewer digits, where methods are to work with that.
    rough: LinearOperator | None = None

    def __init_subclass__(cls, **kwargs: object) -> None:
        """Note the faces; let products and factors be right under ``no_grad``, ``inference_mode`` and ``autocast``."""
        super().__init_subclass__(**kwargs)
        inherited = {face for base in cls.__bases__ if issubclass(base, LinearOperator) for face in base.faces}
        defined = {face for face in FACES if face in vars(cls)}
        # A subclass takes a face back as it would any method: ``factor = LinearOperator.factor``.
        denied = {face for face in defined if vars(cls)[face] is vars(LinearOperator)[face]}
        cls.faces = frozenset((inherited | defined) - denied)
        ordinary_methods(cls, _COMPUTED)

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.size, self.dtype, self.device = int(size), dtype, torch.device(device)

    @property
    def shape(self) -> tuple[int, int]:
        """(p, p)."""
        return (self.size, self.size)

    @abstractmethod
    def apply(self, V: torch.Tensor) -> torch.Tensor:
        """Return A v for each row v of V (k, p), as rows (k, p)."""

    def to_dense(self, verbose: int = 0) -> torch.Tensor:
        """Return the matrix (p, p), by p products over chunks of the identity; symmetrised."""
        matrix = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        for part, product in self._identity_products(verbose):
            matrix[part] = product
        return symmetrise(matrix)

    def diagonal(self) -> torch.Tensor:
        """Return the diagonal (p,), by p products that are not kept."""
        diagonal = torch.empty(self.size, dtype=self.dtype, device=self.device)
        for part, product in self._identity_products():
            diagonal[part] = product[:, part].diagonal()
        return diagonal

    @property
    def has_own_diagonal(self) -> bool:
        """Whether its class has a way to the diagonal other than p products."""
        return type(self).diagonal is not LinearOperator.diagonal

    @property
    def eps(self) -> float:
        """The relative rounding of its products: that of its dtype, unless they are computed in a lesser one."""
        return torch.finfo(self.dtype).eps

    def available_memory(self) -> int:
        """Return the bytes that can still be allocated on its device: of processes that share it, the least of all."""
        return available_memory(self.device)

    def psd_companion(self) -> LinearOperator | None:
        """Return a positive semi-definite operator that stands for this one in preconditioners; None where none is."""
        return self if self.is_psd else None

    @property
    def lower_bound(self) -> float:
        """A number that no eigenvalue is below, by construction; NaN where none is known."""
        if not self.is_psd:
            return math.nan
        # The penalty is part of A; in the operator's dtype it may have been rounded upwards.
        return 0.0 if self.penalty is None else float(self.penalty.min()) * (1 - torch.finfo(self.dtype).eps)

    def in_float64(self) -> LinearOperator | None:
        """Return the operator with its products in float64, of the numbers that it was given; None where it has none.

        Here itself, where its dtype is that already. A class whose products are not right to rounding returns None.
        """
        return self if self.dtype == torch.float64 else None

    def in_autocast(self, dtype: torch.dtype) -> LinearOperator:
        """Return the operator with passes through its model under ``torch.autocast``; TypeError where it has none."""
        self._lacks("in_autocast")

    def refining_residual(self, B: torch.Tensor, X: torch.Tensor, shift: float) -> torch.Tensor | None:
        """Return b − (A + λI) x as one step of refinement wants it; None where that is not at hand, or not needed."""
        return None

    # -- optional faces --------------------------------------------------------------------------------------------

    @property
    def factor_shape(self) -> tuple[int, int] | None:
        """(r, p) of ``factor``, known before it is built; None without one."""
        return None

    def factor(self, verbose: int = 0) -> torch.Tensor:
        """Return F (r, p) with A = FᵀF + diag(penalty)."""
        self._lacks("factor")

    def factor_chunks(self, verbose: int = 0) -> Iterator[torch.Tensor]:
        """Yield the rows of F in chunks (m, p) that fit the working memory."""
        self._lacks("factor_chunks")

    def sample_factors(self) -> Iterator[torch.Tensor]:
        """Yield chunks (m, r, p) of the samples' own Fᵢ, with FᵢᵀFᵢ a sample's curvature without its weight."""
        self._lacks("sample_factors")

    def gradient_rows(self, verbose: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rows gᵢ (n, p) and shares wᵢ/Σw (n,) with A = Σ wᵢ gᵢgᵢᵀ / Σ wᵢ + diag(penalty).

        The rows are the caller's, to be written over.
        """
        self._lacks("gradient_rows")

    def kronecker_factors(
        self,
        approx: str = "expand",
        unsupported: str = "error",
        verbose: int = 0,
        checkpoint: Checkpoint = NOWHERE,
        storage: Storage = HERE,
    ) -> KroneckerFactors:
        """Return the factors of each layer; an operator is asked with the last two where they are set alone."""
        self._lacks("kronecker_factors")

    @property
    def n_samples(self) -> int:
        """Number n of samples that ``minibatch`` takes from."""
        self._lacks("minibatch")

    def minibatch(self, rows: torch.Tensor) -> LinearOperator:
        """Return an unbiased estimate of A from the samples of these indices (m,)."""
        self._lacks("minibatch")

    def _lacks(self, face: str) -> NoReturn:
        raise TypeError(must_be("The operator", f"one with `{face}`", f"a {type(self).__name__}"))

    # -- other forms -----------------------------------------------------------------------------------------------

    def aslinearoperator(self) -> scipy.sparse.linalg.LinearOperator:
        """Return the operator as a ``scipy.sparse.linalg.LinearOperator`` on columns."""
        return as_scipy(self)

    def _identity_products(self, verbose: int = 0) -> Iterator[tuple[slice, torch.Tensor]]:
        step = rows_within(2 * self.size * self.dtype.itemsize, self.size)
        starts = progress(range(0, self.size, step), "products with the identity", verbose, -(-self.size // step))
        for start in starts:
            rows = min(step, self.size - start)
            identity = torch.zeros(rows, self.size, dtype=self.dtype, device=self.device)
            identity[:, start : start + rows].fill_diagonal_(1.0)
            yield slice(start, start + rows), self.apply(identity)


def symmetrise(matrix: torch.Tensor) -> torch.Tensor:
    """Return (M + Mᵀ) / 2, in place and by blocks, so that no second matrix is needed."""
    # Few rows at a time: the caches hold the columns that go with them.
    step = rows_within(2 * matrix.shape[1] * matrix.element_size(), 128)
    for start in range(0, len(matrix), step):
        rows, rest = slice(start, start + step), slice(start, None)
        mean = (matrix[rows, rest] + matrix[rest, rows].mT) / 2
        matrix[rows, rest] = mean
        matrix[rest, rows] = mean.mT
    return matrix


def check_dense_memory(A: LinearOperator, copies: int) -> None:
    """Raise MemoryError, with the way out, where ``copies`` of the p × p matrix of A do not fit."""
    check_memory(
        copies * A.size**2 * A.dtype.itemsize,
        f"A dense curvature of p = {A.size:,} parameters",
        'Try method="cg", which keeps no matrix, or fewer parameters with `params`.',
        A.device,
    )


def add_to_diagonal(matrix: torch.Tensor, entries: torch.Tensor | float | None) -> torch.Tensor:
    """Add ``entries`` to the diagonal of ``matrix`` in place, and return it."""
    if entries is not None:
        matrix.diagonal().add_(entries)
    return matrix


class OnRows(Protocol):
    """Anything symmetric that acts on rows: an operator, or an inverse of one."""

    @property
    def shape(self) -> tuple[int, int]:
        """(p, p)."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows."""

    @property
    def device(self) -> torch.device:
        """Of the rows."""

    def apply(self, V: torch.Tensor) -> torch.Tensor:
        """Return the products (k, p)."""


class _ScipyOperator(scipy.sparse.linalg.LinearOperator):
    """SciPy's face of a symmetric operator on rows: columns in, columns out."""

    def __init__(self, operator: OnRows) -> None:
        self.operator = operator
        super().__init__(dtype=torch.empty(0, dtype=operator.dtype, device="cpu").numpy().dtype, shape=operator.shape)

    @ordinary
    def _matmat(self, X: np.ndarray) -> np.ndarray:
        rows = torch.from_numpy(np.array(X.T, dtype=self.dtype, order="C", copy=True))
        product = self.operator.apply(rows.to(self.operator.device))
        return product.detach().cpu().numpy().T

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        return self._matmat(np.asarray(x).reshape(-1, 1))[:, 0]

    def _adjoint(self) -> _ScipyOperator:
        return self


def as_scipy(operator: OnRows) -> scipy.sparse.linalg.LinearOperator:
    """Return SciPy's face of ``operator``."""
    return _ScipyOperator(operator)
