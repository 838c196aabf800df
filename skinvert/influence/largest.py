"""The largest entries of each row of a matrix that comes in blocks."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .scoring import Block

__all__ = ["largest"]


def largest(blocks: Iterable[Block], k: int, sign: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k largest entries (n_rows, k) of each row, by their value times ``sign``, and their columns.

    Of equal ones the first column's is the first.
    """
    scores: dict[int, torch.Tensor] = {}
    places: dict[int, torch.Tensor] = {}
    for rows, cols, block in blocks:
        columns = torch.arange(cols.start, cols.stop, device=block.device)
        for i, line in zip(range(rows.start, rows.stop), block, strict=True):
            joined = torch.cat([scores[i], line]) if i in scores else line
            where = torch.cat([places[i], columns]) if i in places else columns
            # By column first: of equal scores the first stays, whatever the blocks.
            order = torch.argsort(-sign * joined, stable=True)[:k] if i not in scores else _best(joined, where, sign, k)
            scores[i], places[i] = joined[order], where[order]
    return torch.stack([scores[i] for i in range(len(scores))]), torch.stack([places[i] for i in range(len(scores))])


def _best(scores: torch.Tensor, places: torch.Tensor, sign: int, k: int) -> torch.Tensor:
    by_place = torch.argsort(places)
    return by_place[torch.argsort(-sign * scores[by_place], stable=True)][:k]
