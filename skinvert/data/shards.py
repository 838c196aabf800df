"""Data that are shared out among processes: whose a row is, and a row for a process that has none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .._check import must_be
from .._checksum import checksum
from .._distributed import Ranks
from .._telling import warn
from .._types import Batch
from ..models import map_tensors

if TYPE_CHECKING:
    from .batches import Batches

__all__ = ["Shard", "shared_out"]


@dataclass
class Shard:
    """One process's rows among those of all.

    Rows have numbers over all of the data: rank by rank, or where a ``DistributedSampler`` deals them out, those of
    its data set.

    Parameters
    ----------
    ranks : Ranks
        The processes.
    counts : sequence of int
        Rows of each rank.
    dealt : bool
        Whether row i of this rank is row i · size + rank of all.
    """

    ranks: Ranks
    counts: Sequence[int]
    dealt: bool

    @property
    def n_samples(self) -> int:
        """Rows of all ranks."""
        return sum(self.counts)

    @property
    def empty(self) -> bool:
        """Whether this process has no rows."""
        return not self.counts[self.ranks.rank]

    def numbers(self, start: int, m: int) -> torch.Tensor:
        """Return the numbers (m,) of the rows start, …, start + m − 1 of this process."""
        rows = torch.arange(start, start + m, device="cpu")
        return self.ranks.size * rows + self.ranks.rank if self.dealt else self._first + rows

    def own(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return which of the rows with these ``numbers`` this process has, as its own count them."""
        if self.dealt:
            mine = numbers[numbers % self.ranks.size == self.ranks.rank]
            return torch.div(mine, self.ranks.size, rounding_mode="floor")
        rows = numbers - self._first
        return rows[(rows >= 0) & (rows < self.counts[self.ranks.rank])]

    def labelled(self, batches: Batches) -> list[tuple[Batch, torch.Tensor]]:
        """Return the targets of all ranks as one batch without inputs, and its weights."""

        def parts() -> list[torch.Tensor]:
            pairs = [(batch[1], weights) for batch, weights in batches]
            targets, weights = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
            return [targets[:0], weights[:0]] if self.empty else [targets, weights]

        targets, weights = self.ranks.joined("the targets", parts)
        return [((None, targets), weights)]

    @property
    def _first(self) -> int:
        return sum(self.counts[: self.ranks.rank])


def shared_out(batches: Batches, ranks: Ranks, dealt: int | None) -> Shard:
    """Return what this process's rows are among those of all; a process without rows borrows one, which weighs nothing.

    So each process knows what a batch looks like, and the model on it.

    Parameters
    ----------
    batches : Batches
        Of this process; given the borrowed row.
    ranks : Ranks
        The processes.
    dealt : int or None
        Rows of the data set that a ``DistributedSampler`` deals out.
    """
    hint = "Give each rank its share in the same form."
    ranks.meet("the data", {"rows of the data set that a DistributedSampler deals out": dealt}, hint=hint)
    first = next(iter(batches.raw()), None) if batches.n_samples else None
    told = ranks.gathered((batches.n_samples, _checksums(first)), "the data")
    shard = Shard(ranks, [count for count, _ in told], dealt is not None)
    if not shard.n_samples:
        must = "one with at least one row on some rank"
        raise ValueError(must_be("data", must, "0 samples on every rank: minimum of 1 is required"))
    if not shard.empty and all(one == told[0] for one in told):
        warn(
            f"Each of the {ranks.size} ranks was given {shard.counts[0]} rows that begin alike: all the data? Each row "
            "counts once for each rank then. Give each rank a share, such as a DataLoader with a DistributedSampler.",
            UserWarning,
        )
    if 0 in shard.counts:
        lender = next(rank for rank, count in enumerate(shard.counts) if count)
        # Cloned: a pickled view takes its whole batch with it.
        row = map_tensors(lambda tensor: tensor[:1].cpu().clone(), first) if ranks.rank == lender else None
        row = ranks.gathered(row, "a row to lend")[lender]
        if shard.empty:
            _borrow(batches, row)
    return shard


def _borrow(batches: Batches, row: Batch) -> None:
    own: Any = map_tensors(lambda tensor: tensor.to(batches.device), row)
    batches.kept, batches.n_samples, batches.n_batches = [own], 1, 1
    batches.source = batches.kept.__iter__


def _checksums(batch: Batch) -> Iterable[object]:
    found: list[object] = []
    map_tensors(lambda tensor: found.append(checksum(tensor)), batch)
    return found
