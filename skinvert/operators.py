"""Symmetric linear operators on rows: ``A.apply(V)`` applies A to each row of V (k, p)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import scipy.sparse.linalg
import torch

from ._autograd import ordinary, ordinary_methods
from ._memory import check_memory, rows_within
from ._progress import progress
from ._state import TensorState
from ._validation import check_shift, must_be

__all__ = ["Dense", "Diagonal", "LinearOperator", "LowRank", "Shifted", "TensorState", "as_scipy"]


# What an operator may compute, in this class or in one below.
_COMPUTED = (
    "apply",
    "to_dense",
    "diagonal",
    "factor",
    "factor_chunks",
    "sample_factors",
    "gradient_rows",
    "signals",
    "kronecker_factors",
    "minibatch",
)


class LinearOperator(TensorState, ABC):
    r"""A symmetric p × p operator on rows.

    ``apply`` is all that a subclass must define; the dense matrix and the diagonal then cost p products. A subclass
    with more structure says so by what it has: ``factor()`` (rows F with A = FᵀF + diag(penalty)), and so on.

    Parameters
    ----------
    size : int
        p.
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

    Examples
    --------
    >>> A = Diagonal(torch.tensor([1.0, 2.0]))
    >>> A.apply(torch.tensor([[3.0, 4.0]]))
    tensor([[3., 8.]])
    >>> A.aslinearoperator() @ np.array([3.0, 4.0])
    array([3., 8.], dtype=float32)
    """

    is_psd: bool = False
    hint: str = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let products and factors be right under ``no_grad``, ``inference_mode`` and ``autocast``."""
        super().__init_subclass__(**kwargs)
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

    def psd_companion(self) -> LinearOperator | None:
        """Return a positive semi-definite operator that stands for this one in preconditioners; None where none is."""
        return self if self.is_psd else None

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
    step = rows_within(2 * matrix.shape[1] * matrix.element_size(), matrix.shape[0])
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


class Dense(LinearOperator):
    """The operator of a symmetric matrix (p, p).

    Examples
    --------
    >>> Dense(torch.tensor([[2.0, 1.0], [1.0, 2.0]])).apply(torch.tensor([[1.0, 0.0]]))
    tensor([[2., 1.]])
    """

    def __init__(self, matrix: torch.Tensor) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(must_be("matrix", "square", f"shape {tuple(matrix.shape)}"))
        super().__init__(len(matrix), matrix.dtype, matrix.device)
        self.matrix = matrix

    def apply(self, V: torch.Tensor) -> torch.Tensor:
        """Return V A."""
        return V @ self.matrix

    def to_dense(self, verbose: int = 0) -> torch.Tensor:
        """Return a copy of the matrix."""
        return self.matrix.clone()

    def diagonal(self) -> torch.Tensor:
        """Return the diagonal of the matrix."""
        return self.matrix.diagonal().clone()


class Diagonal(LinearOperator):
    """The operator of a diagonal matrix, given as its diagonal (p,)."""

    _fields: ClassVar[dict[str, str]] = {
        "size": "int",
        "dtype": "dtype",
        "device": "device",
        "entries": "tensor[p]",
    }

    def __init__(self, entries: torch.Tensor) -> None:
        super().__init__(len(entries), entries.dtype, entries.device)
        self.entries = entries

    def apply(self, V: torch.Tensor) -> torch.Tensor:
        """Return each row times the diagonal."""
        return V * self.entries

    def to_dense(self, verbose: int = 0) -> torch.Tensor:
        """Return the diagonal matrix."""
        return torch.diag(self.entries)

    def diagonal(self) -> torch.Tensor:
        """Return a copy of the diagonal."""
        return self.entries.clone()


class LowRank(LinearOperator):
    """The operator A = FᵀF + diag(penalty) of a factor of r rows, F (r, p).

    Examples
    --------
    >>> LowRank(torch.tensor([[1.0, 2.0]])).to_dense()
    tensor([[1., 2.],
            [2., 4.]])
    """

    is_psd = True

    def __init__(self, rows: torch.Tensor, penalty: torch.Tensor | None = None) -> None:
        super().__init__(rows.shape[1], rows.dtype, rows.device)
        self.rows, self.penalty = rows, penalty

    @property
    def factor_shape(self) -> tuple[int, int]:
        """(r, p), known before the factor is built."""
        return (self.rows.shape[0], self.size)

    def factor(self, verbose: int = 0) -> torch.Tensor:
        """Return F (r, p)."""
        return self.rows

    def apply(self, V: torch.Tensor) -> torch.Tensor:
        """Return (V Fᵀ) F + V diag(penalty)."""
        product = (V @ self.rows.mT) @ self.rows
        return product if self.penalty is None else product + V * self.penalty

    def to_dense(self, verbose: int = 0) -> torch.Tensor:
        """Return FᵀF + diag(penalty), by one GEMM."""
        matrix = self.rows.mT @ self.rows
        return add_to_diagonal(matrix, self.penalty)

    def diagonal(self) -> torch.Tensor:
        """Return the squared column norms of F plus the penalty."""
        diagonal = self.rows.square().sum(0)
        return diagonal if self.penalty is None else diagonal + self.penalty


class Shifted(LinearOperator):
    """The operator A + λI.

    Examples
    --------
    >>> Shifted(Diagonal(torch.ones(2)), 0.5).diagonal()
    tensor([1.5000, 1.5000])
    """

    _fields: ClassVar[dict[str, str]] = {
        "size": "int",
        "dtype": "dtype",
        "device": "device",
        "operator": "LinearOperator",
        "shift": "float",
        "is_psd": "bool",
        "hint": "str",
    }

    def __init__(self, operator: LinearOperator, shift: float) -> None:
        super().__init__(operator.size, operator.dtype, operator.device)
        check_shift(shift, operator.dtype)
        self.operator, self.shift = operator, float(shift)
        self.is_psd, self.hint = operator.is_psd and shift >= 0, operator.hint

    def apply(self, V: torch.Tensor) -> torch.Tensor:
        """Return A v + λ v for each row."""
        product = self.operator.apply(V)
        return product + self.shift * V if self.shift else product

    def to_dense(self, verbose: int = 0) -> torch.Tensor:
        """Return the matrix A + λI."""
        return add_to_diagonal(self.operator.to_dense(verbose), self.shift)

    def diagonal(self) -> torch.Tensor:
        """Return the diagonal of A plus λ."""
        return self.operator.diagonal() + self.shift


def add_to_diagonal(matrix: torch.Tensor, entries: torch.Tensor | float | None) -> torch.Tensor:
    """Add ``entries`` to the diagonal of ``matrix`` in place, and return it."""
    if entries is not None:
        matrix.diagonal().add_(entries)
    return matrix


class _ScipyOperator(scipy.sparse.linalg.LinearOperator):
    """SciPy's face of a symmetric operator on rows: columns in, columns out."""

    def __init__(self, operator: LinearOperator) -> None:
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


def as_scipy(operator: Any) -> scipy.sparse.linalg.LinearOperator:
    """Return SciPy's face of ``operator``: anything symmetric with size, shape, dtype, device and ``apply``."""
    return _ScipyOperator(operator)
