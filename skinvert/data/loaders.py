"""A DataLoader, or rows of a data set, as a source of raw batches: in data set order, whatever it shuffles or drops."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, cast, runtime_checkable

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    WeightedRandomSampler,
)

from .._check import must_be
from .._distributed import Ranks
from .._types import Batch

__all__ = ["Indexed", "NoRowsError", "Reiterable", "Source", "dealt_out", "length", "loader_source", "rebatched"]

Source: TypeAlias = Callable[[], Iterable[Batch]]


class NoRowsError(ValueError):
    """Data without a row, which one of several processes may have."""


@runtime_checkable
class Indexed(Protocol):
    """Samples by their index: a map-style Dataset, or what only quacks like one."""

    def __getitem__(self, index: int, /) -> Batch: ...

    def __len__(self) -> int: ...


@runtime_checkable
class _Replicated(Protocol):
    """A sampler of one process's share of the rows, torch's own or another library's."""

    num_replicas: int


@dataclass
class Reiterable:
    """Batches as the user's own iterable yields them."""

    data: Iterable[Batch]

    def __call__(self) -> Iterable[Batch]:
        """Return a fresh iterator."""
        return iter(self.data)


@dataclass
class _Rebatched:
    """Rows of a map-style data set, collated in the given order; items that are batches where that is None.

    With ``at_once`` the data set itself is asked for each batch by the list of its rows.
    """

    dataset: Indexed
    batches: Sequence[Sequence[int]] | None
    collate: Callable[[list[Batch]], Batch]
    workers: int = 0
    at_once: bool = False

    def __call__(self) -> Iterable[Batch]:
        order: dict[str, Any] = {"batch_size": None} if self.batches is None else {"batch_sampler": self.batches}
        if self.at_once:
            order = {"batch_size": None, "sampler": self.batches}
        if not self.workers:
            # A seed for workers is drawn even where there are none: not from the user's random state.
            order["generator"] = torch.Generator("cpu")
        return iter(
            DataLoader(cast("Dataset[Batch]", self.dataset), collate_fn=self.collate, num_workers=self.workers, **order)
        )


def rebatched(
    dataset: Indexed,
    indices: Sequence[int],
    size: int | None,
    collate: Callable[[list[Batch]], Batch],
    workers: int = 0,
) -> _Rebatched:
    """Return batches of these rows of a map-style data set, in this order."""
    if len(indices) == 0:
        raise NoRowsError(must_be("data", "one with at least one row", "an empty data set: 0 samples"))
    return _Rebatched(dataset, _chunks(indices, size or 1024), collate, workers)


def length(dataset: Indexed) -> int:
    """Return the number of a data set's samples, which torch itself asks for only late."""
    try:
        return len(dataset)
    except TypeError as error:
        hint = "Define `__len__`, or make it an IterableDataset in a DataLoader."
        raise TypeError(must_be("A map-style Dataset", "one with a length", type(dataset).__name__, hint)) from error


def loader_source(
    loader: DataLoader[Batch], batch_size: int | None, needs_row_order: bool, ranks: Ranks | None = None
) -> Source:
    """Read a map-style loader in data set order, whatever it shuffles or drops.

    Of a ``DistributedSampler`` where there are ``ranks``: each row on one of them, whatever the sampler shuffles, pads
    or drops.
    """
    if isinstance(loader.dataset, IterableDataset):
        _refuse_a_dropped_rest(loader)
        return Reiterable(loader)
    # torch declares no length, as a stream has none.
    dataset, collate, workers = cast("Indexed", loader.dataset), loader.collate_fn, loader.num_workers
    if loader.batch_sampler is None and isinstance(loader.sampler, BatchSampler):
        # The data set is given the indices of a batch, and returns it whole.
        rows = _rows_of(loader.sampler.sampler, length(dataset), needs_row_order, ranks)
        batches = [list(part) for part in _chunks(rows, batch_size or loader.sampler.batch_size)]
        return _Rebatched(dataset, batches, collate, workers, at_once=True)
    batched: Any = loader.batch_sampler if loader.batch_size is None else None
    if batched is not None and type(batched) is not BatchSampler:
        return _Rebatched(dataset, _drawn_batches(batched, length(dataset), needs_row_order), collate, workers)
    sampler = loader.sampler if batched is None else batched.sampler
    indices = _rows_of(sampler, length(dataset), needs_row_order, ranks)
    if loader.batch_sampler is None:
        whole = isinstance(indices, range)
        if whole and isinstance(sampler, DistributedSampler):
            hint = "Try a `torch.utils.data.Subset` of each rank's items, and a plain DataLoader."
            raise ValueError(must_be("A DistributedSampler", "one of rows", "one of items that are batches", hint))
        return _Rebatched(dataset if whole else Subset(loader.dataset, indices), None, collate, workers)
    own = loader.batch_size if batched is None else batched.batch_size
    return rebatched(dataset, indices, batch_size or own, collate, workers)


def dealt_out(data: object) -> int | None:
    """Return how many rows a loader's data set has where a ``DistributedSampler`` deals them out; else None."""
    if not isinstance(data, DataLoader) or isinstance(data.dataset, IterableDataset):
        return None
    sampler: Any = data.sampler if data.batch_size is not None or data.batch_sampler is None else data.batch_sampler
    while isinstance(sampler, BatchSampler):
        sampler = sampler.sampler
    if not isinstance(sampler, DistributedSampler):
        return None
    return min(length(cast("Indexed", part)) for part in (data.dataset, sampler.dataset))


def _chunks(rows: Sequence[int], size: int) -> list[Sequence[int]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def _rows_of(sampler: Any, n: int, needs_row_order: bool, ranks: Ranks | None) -> Sequence[int]:
    """Return the rows of the data set that a sampler stands for: all of them, or a fixed subset drawn once."""
    name = type(sampler).__name__
    if type(sampler) in (SequentialSampler, RandomSampler):
        # Their own source may be shorter than the data set.
        return range(n if sampler.data_source is None else min(n, len(sampler.data_source)))
    if isinstance(sampler, WeightedRandomSampler):
        hint = "It draws other rows each time. Try a DataLoader without it, and its weights as `sample_weight=`."
        raise ValueError(must_be("A DataLoader's sampler", "one of fixed rows", name, hint))
    if needs_row_order:
        hint = "Its rows cannot be told apart from their order. Try `torch.utils.data.Subset` with a plain DataLoader."
        raise ValueError(must_be("A DataLoader here", "one without its own sampler", name, hint))
    if isinstance(sampler, _Replicated) and (ranks is not None or sampler.num_replicas > 1):
        return _share_of(sampler, n, ranks)
    drawn = [list(itertools.islice(iter(sampler), n + 1)) for _ in range(2)]
    if len(set(drawn[0])) < len(drawn[0]) or set(drawn[0]) != set(drawn[1]):
        hint = "It repeats rows, or draws other ones each time. Try a DataLoader without it, or `Subset`."
        raise ValueError(must_be("A DataLoader's sampler", "one of fixed rows, each once", name, hint))
    return drawn[0]


def _share_of(sampler: Any, n: int, ranks: Ranks | None) -> range:
    """Return the rows of one rank: dealt out as the sampler does, but without its order, and without its padding."""
    name = type(sampler).__name__
    if ranks is None:
        hint = (
            'It yields one process\'s share of the rows. Try `HessianInverter(process_group="world")`, which fits all '
            "processes' rows together, or a DataLoader without it."
        )
        raise ValueError(must_be("A DataLoader's sampler", "one of all rows", name, hint))
    if type(sampler) is not DistributedSampler:
        hint = "Try torch's, or give each rank a `torch.utils.data.Subset` of its rows and a plain DataLoader."
        raise ValueError(must_be("A sampler of one rank's rows", "a DistributedSampler itself", name, hint))
    place, own = (sampler.rank, sampler.num_replicas), (ranks.rank, ranks.size)
    if place != own:
        got = f"rank {place[0]} of {place[1]}"
        hint = "Try `DistributedSampler(dataset, num_replicas=..., rank=...)` with those of the process group."
        raise ValueError(must_be("A DistributedSampler", f"that of rank {own[0]} of {own[1]}", got, hint))
    # As above: its own data set may be shorter.
    return range(ranks.rank, min(n, length(cast("Indexed", sampler.dataset))), ranks.size)


def _drawn_batches(sampler: Iterable[Iterable[int]], n: int, needs_row_order: bool) -> list[list[int]]:
    """Return the batches of a batch sampler of the user's, drawn once, so that every pass sees the same rows."""
    name = type(sampler).__name__
    if needs_row_order:
        hint = "Its rows cannot be told apart from their order. Try a plain DataLoader."
        raise ValueError(must_be("A DataLoader here", "one without its own sampler", name, hint))
    batches = [list(batch) for batch in itertools.islice(iter(sampler), n + 1)]
    rows = [row for batch in batches for row in batch]
    if len(rows) != n or len(set(rows)) != n:
        got = f"{name} with {len(set(rows))} of {n} rows in {len(rows)} draws"
        hint = "Rows that it drops or repeats are missing from L, or count twice. Try a plain DataLoader, or `Subset`."
        raise ValueError(must_be("A DataLoader's batch sampler", "one that yields every row once", got, hint))
    return batches


def _refuse_a_dropped_rest(loader: DataLoader[Batch]) -> None:
    if loader.drop_last:
        hint = "The rows that it drops belong to L. Try drop_last=False."
        raise ValueError(must_be("A DataLoader of a stream", "one that keeps its last batch", "drop_last=True", hint))
