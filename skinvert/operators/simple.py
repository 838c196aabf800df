"""Operators of matrices at hand: dense, diagonal, of a factor, and shifted."""

from __future__ import annotations

import torch

from .._check import check_shift, must_be
from .._memory import rows_within
from .base import ON_ROWS, LinearOperator, add_to_diagonal
from .gram import add_gram, mirrored

__all__ = ["Dense", "DiagonalMatrix", "LowRank", "Shifted"]


class Dense(LinearOperator):
    """The operator of a symmetric matrix (p, p).

    Examples
    --------
    >>> Dense(torch.tensor([[2.0, 1.0], [1.0, 2.0]])).apply(torch.tensor([[1.0, 0.0]]))
    tensor([[2., 1.]])
    """

    _fields = {**ON_ROWS, "matrix": "tensor[p,p]", "is_psd": "bool|missing", "hint": "str|missing"}
    _transient = ("_proven",)
    # For each λ what no eigenvalue of A + λI is below, once that was asked for.
    _proven: dict[float, float] | None = None

    def __init__(self, matrix: torch.Tensor) -> None:
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(must_be("matrix", "square", f"shape {tuple(matrix.shape)}"))
        super().__init__(len(matrix), matrix.dtype, matrix.device)
        self.matrix = matrix

    @property
    def proven(self) -> dict[float, float]:
        """What is proven of the smallest eigenvalue, by λ."""
        if self._proven is None:
            self._proven = {}
        return self._proven

    def apply(self, V: torch.Tensor) -> torch.Tensor:
        """Return V A."""
        return V @ self.matrix

    def to_dense(self, verbose: int = 0) -> torch.Tensor:
        """Return a copy of the matrix."""
        return self.matrix.clone()

    def diagonal(self) -> torch.Tensor:
        """Return the diagonal of the matrix."""
        return self.matrix.diagonal().clone()

    def in_float64(self) -> Dense:
        """Return the operator of the same matrix in float64."""
        if self.dtype == torch.float64:
            return self
        double = Dense(self.matrix.double())
        double.is_psd, double.hint = self.is_psd, self.hint
        return double

    def refining_residual(self, B: torch.Tensor, X: torch.Tensor, shift: float) -> torch.Tensor | None:
        """Return that of a float32 matrix, summed in float64 by blocks: float32 loses the digits of the condition."""
        if self.dtype != torch.float32:
            return None
        X = X.double()
        residual = B.double() - shift * X
        step = rows_within(8 * self.size, self.size)
        for start in range(0, self.size, step):
            rows = slice(start, start + step)
            residual -= X[:, rows] @ self.matrix[rows].double()
        return residual.to(B.dtype)


class DiagonalMatrix(LinearOperator):
    """The operator of a diagonal matrix, given as its diagonal (p,)."""

    _fields = {**ON_ROWS, "entries": "tensor[p]"}

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

    @property
    def lower_bound(self) -> float:
        """The smallest entry."""
        return float(self.entries.min())

    def in_float64(self) -> DiagonalMatrix:
        """Return the same diagonal in float64."""
        return self if self.dtype == torch.float64 else DiagonalMatrix(self.entries.double())


class LowRank(LinearOperator):
    """The operator A = FᵀF + diag(penalty) of a factor of r rows, F (r, p).

    Examples
    --------
    >>> LowRank(torch.tensor([[1.0, 2.0]])).to_dense()
    tensor([[1., 2.],
            [2., 4.]])
    """

    _fields = {**ON_ROWS, "rows": "tensor[r,p]", "penalty": "tensor[p]|None"}

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
        """Return FᵀF + diag(penalty), by r p² operations."""
        matrix = self.rows.new_zeros(self.shape)
        add_gram(matrix, self.rows)
        return add_to_diagonal(mirrored(matrix), self.penalty)

    def diagonal(self) -> torch.Tensor:
        """Return the squared column norms of F plus the penalty."""
        diagonal = self.rows.square().sum(0)
        return diagonal if self.penalty is None else diagonal + self.penalty

    def in_float64(self) -> LowRank:
        """Return the operator of the same rows in float64."""
        if self.dtype == torch.float64:
            return self
        return LowRank(self.rows.double(), None if self.penalty is None else self.penalty.double())


class Shifted(LinearOperator):
    """The operator A + λI.

    Examples
    --------
    >>> Shifted(DiagonalMatrix(torch.ones(2)), 0.5).diagonal()
    tensor([1.5000, 1.5000])
    """

    _fields = {**ON_ROWS, "operator": "LinearOperator", "shift": "float", "is_psd": "bool", "hint": "str"}

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

    @property
    def lower_bound(self) -> float:
        """That of A plus λ."""
        return self.operator.lower_bound + self.shift

    def in_float64(self) -> Shifted | None:
        """Return A + λI with the products of A in float64."""
        double = self.operator.in_float64()
        return None if double is None else Shifted(double, self.shift)
