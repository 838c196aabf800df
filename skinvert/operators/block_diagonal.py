"""Block-diagonal operators, each block on its own entries of a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from .._check import must_be
from .._memory import rows_within
from .base import LinearOperator

__all__ = ["BlockDiagonal"]


class BlockDiagonal(LinearOperator):
    """A block-diagonal operator: each block acts on its own entries of a row.

    Parameters
    ----------
    operators : sequence of LinearOperator
        The blocks.
    indices : sequence of tensor of shape (size of the block,), default=None
        Which entries of a row each block acts on, in its own order: all of 0, …, p − 1, each once. None is one block
        after the other.

    Examples
    --------
    >>> from skinvert.operators import Dense, DiagonalMatrix
    >>> blocks = [DiagonalMatrix(torch.tensor([10.0])), DiagonalMatrix(torch.tensor([2.0, 3.0]))]
    >>> BlockDiagonal(blocks, [torch.tensor([1]), torch.tensor([0, 2])]).apply(torch.ones(1, 3))
    tensor([[ 2., 10.,  3.]])
    """

    _fields: ClassVar[dict[str, str]] = {
        "size": "int",
        "dtype": "dtype",
        "device": "device",
        "operators": "list[LinearOperator]",
        "is_psd": "bool",
        "order": "index[p]|None",
    }

    def __init__(self, operators: Sequence[LinearOperator], indices: Sequence[torch.Tensor] | None = None) -> None:
        first = operators[0]
        super().__init__(sum(operator.size for operator in operators), first.dtype, first.device)
        self.operators = list(operators)
        self.is_psd = all(operator.is_psd for operator in operators)
        # One tensor, so that it is pickled as an array.
        self.order: torch.Tensor | None = None
        if indices is not None:
            self.order = torch.cat([index.reshape(-1) for index in indices]).to(first.device)
            _check_partition(self.order, self.size)

    def apply(self, V: torch.Tensor) -> torch.Tensor:
        """Return each block's product with its own entries, in chunks of rows that fit the working memory."""
        # The parts of V, a rotation of them, the products, and these in place.
        chunk = rows_within(4 * self.size * V.element_size())
        if len(V) <= chunk:
            return self._apply(V)
        product = torch.empty_like(V)
        for start in range(0, len(V), chunk):
            rows = slice(start, start + chunk)
            product[rows] = self._apply(V[rows])
        return product

    def _apply(self, V: torch.Tensor) -> torch.Tensor:
        return self.joined([A.apply(part) for A, part in zip(self.operators, self.parts(V), strict=True)])

    def to_dense(self, verbose: int = 0) -> torch.Tensor:
        """Return the matrix (p, p)."""
        matrix = torch.block_diag(*[operator.to_dense(verbose) for operator in self.operators])
        if self.order is None:
            return matrix
        placed = torch.empty_like(matrix)
        placed[self.order[:, None], self.order] = matrix
        return placed

    def diagonal(self) -> torch.Tensor:
        """Return the diagonals of the blocks, in place."""
        return self.joined([operator.diagonal()[None] for operator in self.operators])[0]

    def with_operators(self, operators: Sequence[LinearOperator]) -> BlockDiagonal:
        """Return the operator of other blocks on the same entries."""
        other = BlockDiagonal(operators)
        other.order = self.order
        return other

    def parts(self, V: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return each block's own entries of the rows V (k, p)."""
        sizes = [operator.size for operator in self.operators]
        return (V if self.order is None else V[:, self.order]).split(sizes, dim=1)

    def joined(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return rows (k, p) of each block's own entries."""
        rows = torch.cat(list(parts), dim=1)
        if self.order is None:
            return rows
        placed = torch.empty_like(rows)
        placed[:, self.order] = rows
        return placed


def _check_partition(order: torch.Tensor, size: int) -> None:
    if len(order) != size or not bool((order.sort().values == torch.arange(size, device=order.device)).all()):
        raise ValueError(must_be("indices", f"each of 0, ..., {size - 1} once", f"{len(order)} of them"))
