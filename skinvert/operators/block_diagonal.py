"""Block-diagonal operators, each block on its own entries of a row."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .base import ON_ROWS, LinearOperator
from .placing import in_chunks, join_blocks, order_of, split_blocks

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
    order : tensor of shape (p,), default=None
        What ``order_of`` gives for the indices, in their place where it is known.

    Examples
    --------
    >>> from skinvert.operators import Dense, DiagonalMatrix
    >>> blocks = [DiagonalMatrix(torch.tensor([10.0])), DiagonalMatrix(torch.tensor([2.0, 3.0]))]
    >>> BlockDiagonal(blocks, [torch.tensor([1]), torch.tensor([0, 2])]).apply(torch.ones(1, 3))
    tensor([[ 2., 10.,  3.]])
    """

    _fields = {**ON_ROWS, "operators": "list[LinearOperator]", "is_psd": "bool", "order": "index[p]|None"}

    def __init__(
        self,
        operators: Sequence[LinearOperator],
        indices: Sequence[torch.Tensor] | None = None,
        order: torch.Tensor | None = None,
    ) -> None:
        first = operators[0]
        super().__init__(sum(operator.size for operator in operators), first.dtype, first.device)
        self.operators = list(operators)
        self.is_psd = all(operator.is_psd for operator in operators)
        # One tensor, so that it is pickled as an array.
        self.order = order if indices is None else order_of(indices, self.size, first.device)

    def apply(self, V: torch.Tensor) -> torch.Tensor:
        """Return each block's product with its own entries, in chunks of rows that fit the working memory."""
        return in_chunks(self._apply, V, self.size)

    def _apply(self, V: torch.Tensor) -> torch.Tensor:
        return self.joined([A.apply(part) for A, part in zip(self.operators, self.parts(V), strict=True)])

    def to_dense(self, verbose: int = 0) -> torch.Tensor:
        """Return the matrix (p, p)."""
        matrix = torch.block_diag(*[operator.to_dense(verbose) for operator in self.operators])
        if self.order is None:
            return matrix
        placed, order = torch.empty_like(matrix), self.order.to(matrix.device)
        placed[order[:, None], order] = matrix
        return placed

    def diagonal(self) -> torch.Tensor:
        """Return the diagonals of the blocks, in place."""
        return self.joined([operator.diagonal()[None] for operator in self.operators])[0]

    def parts(self, V: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return each block's own entries of the rows V (k, p)."""
        return split_blocks(V, [operator.size for operator in self.operators], self.order)

    def joined(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return rows (k, p) of each block's own entries."""
        return join_blocks(parts, self.order)
