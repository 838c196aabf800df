"""The largest entries of each row of a matrix that comes in blocks."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .._check import must_be
from .._types import State
from .course import Kept
from .scoring import Block

__all__ = ["Largest"]


class Largest(Kept):
    """The k largest entries of each row, by their value times ``sign``, and their columns.

    Of equal ones the first column's is the first. Rows come in order, the first of them in the first block.

    Parameters
    ----------
    k : int
        How many.
    sign : int
        1, or -1 for the smallest.
    dtype : torch.dtype
        Of the entries.
    shape : tuple of int
        Of the matrix.
    """

    def __init__(self, k: int, sign: int, dtype: torch.dtype, shape: tuple[int, int]) -> None:
        self.k, self.sign, self.dtype, self.shape = k, sign, dtype, shape
        self.scores: dict[int, torch.Tensor] = {}
        self.places: dict[int, torch.Tensor] = {}

    def take(self, block: Block) -> None:
        """Take the entries of a block into account."""
        rows, cols, entries = block
        columns = torch.arange(cols.start, cols.stop, device=entries.device)
        for i, line in zip(range(rows.start, rows.stop), entries, strict=True):
            first = i not in self.scores
            joined = line if first else torch.cat([self.scores[i], line])
            where = columns if first else torch.cat([self.places[i], columns])
            # By column first: of equal scores the first stays, whatever the blocks.
            by_place = torch.argsort(where)
            order = by_place[torch.argsort(-self.sign * joined[by_place], stable=True)][: self.k]
            self.scores[i], self.places[i] = joined[order], where[order]

    def found(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the entries (n_rows, k) and their columns."""
        rows = range(len(self.scores))
        return torch.stack([self.scores[i] for i in rows]), torch.stack([self.places[i] for i in rows])

    @property
    def fields(self) -> Mapping[str, str]:
        """Padded to k entries, of the columns -1."""
        return {"largest": f"tensor[rows,{self.k}]", "places": f"index[rows,{self.k}]"}

    def state(self, stop: int) -> State:
        """Return what is largest so far of each row that was met."""
        rows = range(len(self.scores))
        if not rows:
            return {
                "largest": torch.empty(0, self.k, dtype=self.dtype, device="cpu"),
                "places": torch.empty(0, self.k, dtype=torch.int64, device="cpu"),
            }
        largest = self.scores[0].new_zeros(len(rows), self.k)
        places = self.places[0].new_full((len(rows), self.k), -1)
        for i in rows:
            largest[i, : len(self.scores[i])], places[i, : len(self.places[i])] = self.scores[i], self.places[i]
        return {"largest": largest, "places": places}

    def restore(self, state: State, stop: int) -> None:
        """Take what was largest so far."""
        largest, places = state["largest"], state["places"]
        sound = len(places) <= self.shape[0] and bool(((places >= -1) & (places < self.shape[1])).all())
        if not sound or largest.dtype != self.dtype:
            got = f"{largest.dtype} of shape {tuple(largest.shape)}, in columns up to {int(places.max())}"
            raise ValueError(must_be("The largest of a checkpoint", f"{self.dtype} of {self.shape} scores", got))
        for i, (line, where) in enumerate(zip(largest, places, strict=True)):
            self.scores[i], self.places[i] = line[where >= 0], where[where >= 0]
