"""Curvatures with a factor, A = FᵀF + diag(penalty): what follows from the rows of F that a batch gives."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch

from .._check import must_be
from .._memory import check_memory, rows_within, working_memory
from .._progress import progress
from .._types import Batch
from ..operators import LinearOperator, LowRank, add_gram, add_to_diagonal, mirrored
from .base import Curvature
from .objective import Objective
from .per_sample import split_batch
from .products import Products

__all__ = ["Factored"]


class Factored(Curvature):
    r"""A = Σᵢ wᵢFᵢᵀFᵢ / Σᵢ wᵢ + penalty, with Fᵢ (r, p) a row's own factor.

    A subclass defines ``factor_of``; products, matrix, diagonal and the factor of all the data follow. It is positive
    semi-definite, and held-out scores are by itself.

    Parameters
    ----------
    objective : Objective
        L at θ, as for ``Curvature``.

    Attributes
    ----------
    rank : int
        r; a subclass of more than one says so, on the class or in ``__init__``.

    Examples
    --------
    Gradients cut off at a norm of one, so that no row dominates:

    >>> from skinvert.curvature import CURVATURES, register_curvature
    >>> from skinvert import HessianInverter
    >>> class Clipped(Factored):
    ...     def factor_of(self, batch, weights):
    ...         g = self.objective.gradients(batch)
    ...         g = g / g.norm(dim=1, keepdim=True).clamp(min=1.0)
    ...         return (weights.sqrt()[:, None] * g)[:, None]
    >>> register_curvature("clipped", Clipped)
    >>> net = torch.nn.Linear(2, 1, bias=False)
    >>> net.weight.data = torch.tensor([[0.0, 0.0]])
    >>> data = (torch.tensor([[3.0, 4.0], [0.1, 0.0]]), torch.ones(2, 1))
    >>> HessianInverter("direct", 1.0, curvature="clipped", loss="mse").fit(net, data).curvature_.to_dense()
    tensor([[0.2000, 0.2400],
            [0.2400, 0.3200]])
    >>> del CURVATURES["clipped"]
    """

    is_psd = True
    scores_itself: ClassVar[bool] = True
    objective: Objective
    rank: int = 1

    _transient = ("_graphs", "_double", "_factor")

    def __init__(self, objective: Objective) -> None:
        super().__init__(objective)
        self._factor: torch.Tensor | None = None

    @abstractmethod
    def factor_of(self, batch: Batch, weights: torch.Tensor) -> torch.Tensor:
        """Return √wᵢ Fᵢ of the m rows of a batch with weights w (m,), as (m, r, p)."""

    def factor_parts(self, batch: Batch, weights: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield ``factor_of`` in chunks of its r rows (m, ≤ r, p), for those too large to be held at once."""
        factor, expected = self.factor_of(batch, weights), (len(weights), self.rank, self.size)
        if factor.shape != expected:
            hint = "Its `rank` says how many rows of F a sample has."
            must = f"of shape {expected}, (m, rank, p)"
            raise ValueError(must_be(f"{type(self).__name__}.factor_of", must, f"{tuple(factor.shape)}", hint))
        yield factor

    @property
    def factor_shape(self) -> tuple[int, int]:
        """(n r, p), known before the factor is built."""
        return (self.n_samples * self.rank, self.size)

    def factor(self, verbose: int = 0) -> torch.Tensor:
        """Return F (n r, p) with A = FᵀF + diag(penalty)."""
        return torch.cat(list(self.factor_chunks(verbose)))

    def factor_chunks(self, verbose: int = 0) -> Iterator[torch.Tensor]:
        """Yield the factor in chunks of rows that fit the working memory, and of columns where one row does not."""
        total = self.objective.weight_sum
        for batch, weights in progress(self.objective.batches, "factor", verbose):
            for rows, part in split_batch(batch, weights, self._chunk()):
                for factor in self.factor_parts(rows, part / total):
                    yield factor.flatten(0, 1)

    def sample_factors(self) -> Iterator[torch.Tensor]:
        """Yield Fᵢ (m, r, p), each row's own without its weight, in chunks of rows."""
        way_out = "Try fewer parameters with `params`."
        check_memory(self.rank * self.size * self.dtype.itemsize, "One row's factor", way_out, self.device)
        for batch, weights in self.objective.batches:
            for rows, part in split_batch(batch, torch.ones_like(weights), self._chunk()):
                yield torch.cat(list(self.factor_parts(rows, part)), dim=1)

    def graph(self, batch: Batch, weights: torch.Tensor) -> Products:
        """Return the products by the factor of a batch, which is made anew for each: what fits is kept whole."""

        def products(V: torch.Tensor) -> torch.Tensor:
            total = torch.zeros_like(V)
            for rows, part in split_batch(batch, weights, self._chunk()):
                for factor in self.factor_parts(rows, part):
                    flat = factor.flatten(0, 1)
                    total += (V @ flat.mT) @ flat
            return total

        return products

    def apply(self, V: torch.Tensor) -> torch.Tensor:
        """Return (V Fᵀ) F plus the penalty's share; F is kept where it fits the working memory."""
        if self._factor is None and math.prod(self.factor_shape) * self.dtype.itemsize <= working_memory():
            self._factor = self.factor()
        if self._factor is None:
            return super().apply(V)
        product = (V @ self._factor.mT) @ self._factor
        return product if self.penalty is None else product + V * self.penalty

    def minibatch(self, rows: torch.Tensor) -> LinearOperator:
        """Return an unbiased estimate from the samples ``rows`` (m,): rows of F where it is kept."""
        if self._factor is None:
            return super().minibatch(rows)
        own = self._factor.reshape(self.n_samples, self.rank, self.size)[rows.to(self.device)]
        return LowRank(math.sqrt(self.n_samples / len(rows)) * own.flatten(0, 1), self.penalty)

    def to_dense(self, verbose: int = 0) -> torch.Tensor:
        """Return the matrix (p, p), by p² operations for each row of the factor."""
        matrix = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for rows in self.factor_chunks(verbose):
            add_gram(matrix, rows)
        return add_to_diagonal(mirrored(matrix), self.penalty)

    def diagonal(self) -> torch.Tensor:
        """Return the diagonal, from the squares of the factor."""
        diagonal = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        for rows in self.factor_chunks():
            diagonal += rows.square().sum(0)
        return diagonal if self.penalty is None else diagonal + self.penalty

    def _chunk(self) -> int:
        """Return of how many rows the factor, and what it is made from, fit the working memory."""
        return rows_within(self.rank * self._numbers * self.dtype.itemsize)

    @property
    def _numbers(self) -> int:
        """How many numbers a row of F takes while it is made."""
        return 3 * self.size
