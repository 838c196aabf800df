"""The forms of data, each as a source of raw batches in a fixed order, no row dropped."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
    default_collate,
)

from ._validation import must_be, to_plain_array
from .models import SparseRows, labels_key

__all__ = ["Samples", "is_numbers", "source_of"]

ACCEPTED = (
    "an (X, y) tuple, a map-style Dataset, a DataLoader, a skorch SliceDict or SliceDataset with y, "
    "or a re-iterable of batches"
)


def source_of(data: Any, batch_size: int | None, needs_row_order: bool) -> Callable[[], Iterable[Any]]:
    """Return what yields the raw batches of ``data`` anew at each call."""
    if isinstance(data, tuple) and len(data) == 2 and data[1] is None and isinstance(data[0], Dataset | DataLoader):
        # As skorch's `fit(dataset, None)` has it.
        data = data[0]
    if isinstance(data, tuple):
        return _arrays(data, batch_size)
    if isinstance(data, DataLoader):
        return _loader(data, batch_size, needs_row_order)
    if _is_map_style(data) or (isinstance(data, list) and data and _is_sample(data[0])):
        return _rebatched(data, range(_length(data)), batch_size or 1024, _collate)
    if isinstance(data, Mapping) and labels_key(data) is not None:
        return _arrays((data, None), batch_size)
    if isinstance(data, str | bytes | Mapping) or not isinstance(data, Iterable):
        hint = "Labels belong in it: try `(X, y)`, or a mapping with 'labels'."
        raise TypeError(must_be("data", ACCEPTED, type(data).__name__, hint))
    if isinstance(data, np.ndarray | torch.Tensor):
        raise TypeError(must_be("data", ACCEPTED, f"an array of shape {tuple(data.shape)}", "Try `(X, y)`."))
    if isinstance(data, Iterator):
        hint = "It yields its batches only once, and a solve reads them many times. Try `list(...)`."
        raise TypeError(must_be("data", ACCEPTED, f"a {type(data).__name__}", hint))
    return _Reiterable(data)


class Samples(Dataset):
    """A list of samples, as a search over a data set leaves it."""

    def __init__(self, samples: list[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index]


def _length(dataset: Any) -> int:
    """Return the number of a data set's samples, which torch itself asks for only late."""
    try:
        return len(dataset)
    except TypeError as error:
        hint = "Define `__len__`, or make it an IterableDataset in a DataLoader."
        raise TypeError(must_be("A map-style Dataset", "one with a length", type(dataset).__name__, hint)) from error


def _is_map_style(data: Any) -> bool:
    """Return whether ``data`` holds samples by their index: a Dataset, or what only quacks like one."""
    if isinstance(data, Dataset):
        return not isinstance(data, IterableDataset)
    if isinstance(data, Sequence | Mapping | deque | np.ndarray | torch.Tensor):
        return False
    if not (callable(getattr(data, "__getitem__", None)) and callable(getattr(data, "__len__", None))):
        return False
    # With `__iter__` it may yield batches; Hugging Face's data sets yield samples, as mappings.
    rows: Any = data
    return not isinstance(data, Iterable) or (len(rows) > 0 and _is_sample(rows[0], mapping=True))


def _is_sample(item: Any, mapping: bool = False) -> bool:
    """Return whether an item is one sample, rather than a batch: its target is a scalar, or of another length."""
    if isinstance(item, Mapping):
        key = labels_key(item)
        return mapping or (key is not None and np.ndim(item[key]) == 0)
    if not isinstance(item, tuple | list) or len(item) != 2:
        return False
    x, y = item
    if not isinstance(y, Mapping | tuple | list) and np.ndim(y) == 0:
        return True
    if not all(isinstance(part, torch.Tensor | np.ndarray) and part.ndim for part in (x, y)):
        return False
    # Labels of another number than the rows are a fault in a batch, not a sample of many labels.
    return len(x) != len(y) and torch.as_tensor(y).is_floating_point()


def _collate(samples: list[Any]) -> Any:
    """Return samples as a batch as torch does, but their lists of numbers as rows."""
    try:
        return default_collate([_with_arrays(sample) for sample in samples])
    except RuntimeError as error:
        hint = "Try a DataLoader with a `collate_fn` that pads."
        raise ValueError(must_be("Samples", "of one shape", str(error), hint)) from error


def _with_arrays(sample: Any) -> Any:
    if isinstance(sample, Mapping):
        return {key: _row(value) for key, value in sample.items()}
    return tuple(map(_row, sample)) if type(sample) in (tuple, list) and len(sample) == 2 else sample


def _row(value: Any) -> Any:
    return np.asarray(value) if is_numbers(value) else value


def is_numbers(value: Any) -> bool:
    """Return whether ``value`` is a list of numbers, however deep."""
    first = value
    while isinstance(first, list) and first:
        first = first[0]
    return isinstance(value, list) and isinstance(first, int | float)


@dataclass
class _Reiterable:
    """Batches as the user's own iterable yields them."""

    data: Iterable[Any]

    def __call__(self) -> Iterable[Any]:
        return iter(self.data)


@dataclass
class _Rebatched:
    """Rows of a map-style data set, collated in the given order; items that are batches where that is None.

    With ``at_once`` the data set itself is asked for each batch by the list of its rows.
    """

    dataset: Any
    batches: Any
    collate: Callable[[Any], Any]
    workers: int = 0
    at_once: bool = False

    def __call__(self) -> Iterable[Any]:
        order = {"batch_size": None} if self.batches is None else {"batch_sampler": self.batches}
        if self.at_once:
            order = {"batch_size": None, "sampler": self.batches}
        return iter(DataLoader(self.dataset, collate_fn=self.collate, num_workers=self.workers, **order))


def _rebatched(
    dataset: Any, indices: Sequence[int], size: int, collate: Callable[[list[Any]], Any], workers: int = 0
) -> _Rebatched:
    if len(indices) == 0:
        raise ValueError(must_be("data", "one with at least one row", "an empty data set: 0 samples"))
    return _Rebatched(dataset, [indices[i : i + size] for i in range(0, len(indices), size)], collate, workers)


# -- loaders -----------------------------------------------------------------------------------------------------------


def _loader(loader: Any, batch_size: int | None, needs_row_order: bool) -> Callable[[], Iterable[Any]]:
    """Read a map-style loader in data set order, whatever it shuffles or drops."""
    if isinstance(loader.dataset, IterableDataset):
        _refuse_a_dropped_rest(loader)
        return _Reiterable(loader)
    if loader.batch_sampler is None and isinstance(loader.sampler, BatchSampler):
        return _read_at_once(loader, batch_size, needs_row_order)
    batched: Any = loader.batch_sampler if loader.batch_size is None else None
    if batched is not None and type(batched) is not BatchSampler:
        return _Rebatched(
            loader.dataset, _drawn_batches(loader, needs_row_order), loader.collate_fn, loader.num_workers
        )
    sampler = loader.sampler if batched is None else batched.sampler
    indices = _rows_of(sampler, _length(loader.dataset), needs_row_order)
    if loader.batch_sampler is None:
        whole = isinstance(indices, range)
        dataset = loader.dataset if whole else torch.utils.data.Subset(loader.dataset, indices)
        return _Rebatched(dataset, None, loader.collate_fn, loader.num_workers)
    own = loader.batch_size if batched is None else batched.batch_size
    return _rebatched(loader.dataset, indices, batch_size or own, loader.collate_fn, loader.num_workers)


def _read_at_once(loader: Any, batch_size: int | None, needs_row_order: bool) -> _Rebatched:
    """Read a loader whose data set is given the indices of a batch, and returns it whole."""
    indices = _rows_of(loader.sampler.sampler, _length(loader.dataset), needs_row_order)
    size = batch_size or loader.sampler.batch_size
    batches = [list(indices[i : i + size]) for i in range(0, len(indices), size)]
    return _Rebatched(loader.dataset, batches, loader.collate_fn, loader.num_workers, at_once=True)


def _rows_of(sampler: Any, n: int, needs_row_order: bool) -> Sequence[int]:
    """Return the rows of the data set that a sampler stands for: all of them, or a fixed subset drawn once."""
    name = type(sampler).__name__
    if type(sampler) in (SequentialSampler, RandomSampler):
        # Their own source may be shorter than the data set.
        source = getattr(sampler, "data_source", None)
        return range(n if source is None else min(n, len(source)))
    if isinstance(sampler, WeightedRandomSampler):
        hint = "It draws other rows each time. Try a DataLoader without it, and its weights as `sample_weight=`."
        raise ValueError(must_be("A DataLoader's sampler", "one of fixed rows", name, hint))
    if needs_row_order:
        hint = "Its rows cannot be told apart from their order. Try `torch.utils.data.Subset` with a plain DataLoader."
        raise ValueError(must_be("A DataLoader here", "one without its own sampler", name, hint))
    drawn = [list(itertools.islice(iter(sampler), n + 1)) for _ in range(2)]
    if len(set(drawn[0])) < len(drawn[0]) or set(drawn[0]) != set(drawn[1]):
        hint = "It repeats rows, or draws other ones each time. Try a DataLoader without it, or `Subset`."
        raise ValueError(must_be("A DataLoader's sampler", "one of fixed rows, each once", name, hint))
    if getattr(sampler, "num_replicas", 1) > 1:
        hint = "It yields one process's share of the rows. Try a DataLoader without it."
        raise ValueError(must_be("A DataLoader's sampler", "one of all rows", name, hint))
    return drawn[0]


def _drawn_batches(loader: Any, needs_row_order: bool) -> list[Any]:
    """Return the batches of a batch sampler of the user's, drawn once, so that every pass sees the same rows."""
    sampler, n = loader.batch_sampler, _length(loader.dataset)
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


def _refuse_a_dropped_rest(loader: Any) -> None:
    if loader.drop_last:
        hint = "The rows that it drops belong to L. Try drop_last=False."
        raise ValueError(must_be("A DataLoader of a stream", "one that keeps its last batch", "drop_last=True", hint))


# -- arrays ------------------------------------------------------------------------------------------------------------


@dataclass
class _Arrays:
    """Slices of arrays, copied or made dense a batch at a time."""

    inputs: Any
    targets: Any
    n: int
    size: int

    def __call__(self) -> Iterable[Any]:
        for start in range(0, self.n, self.size):
            rows = slice(start, start + self.size)
            inputs = _sliced(self.inputs, rows)
            yield inputs if self.targets is None else (inputs, _sliced(self.targets, rows))


def _arrays(data: tuple[Any, ...], batch_size: int | None) -> _Arrays:
    labelled = len(data) == 2 and data[1] is None and isinstance(data[0], Mapping) and labels_key(data[0]) is not None
    if len(data) != 2 or (data[1] is None and not labelled):
        raise ValueError(must_be("data as a tuple", "(X, y)", f"{len(data)} entries, y {type(data[-1]).__name__}"))
    inputs, targets = _whole(data[0], "X"), None if labelled else _whole(data[1], "y")
    lengths = [_lengths(part) for part in (inputs, targets)]
    if targets is not None and not lengths[1]:
        raise ValueError(must_be("y", "an array of one target per row", "a scalar"))
    if len({*lengths[0], *lengths[1]}) > 1:
        got = f"inconsistent numbers of samples: {lengths[0]}, {', '.join(map(str, lengths[1]))}"
        raise ValueError(must_be("X and y", "of the same length", got))
    return _Arrays(inputs, targets, (lengths[1] or lengths[0])[0], batch_size or 1024)


def _whole(value: Any, name: str) -> Any:
    """Return tensors, arrays or sparse rows of everything in ``value``, the user's own memory where it can be."""
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.is_complex():
            hint = "Try `.to_dense()`." if value.layout != torch.strided else ""
            raise TypeError(must_be(name, "dense and real", f"{value.layout}, {value.dtype}", hint))
        return value.detach()
    if isinstance(value, SparseRows):
        return value
    if isinstance(value, Mapping):
        return {key: _part(part, f"{name}[{key!r}]") for key, part in value.items()}
    if isinstance(value, Dataset) or (type(value).__module__.startswith("skorch") and isinstance(value, Sequence)):
        rows: Any = value
        return default_collate([rows[i] for i in range(len(rows))])
    if isinstance(value, tuple) and any(isinstance(part, torch.Tensor | np.ndarray | Mapping) for part in value):
        return tuple(_part(part, f"{name}[{i}]") for i, part in enumerate(value))
    if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
        return torch.stack(value)
    return to_plain_array(value, name)


def _part(value: Any, name: str) -> Any:
    """Return one of several inputs; numbers and other settings are shared by all rows."""
    return value if value is None or isinstance(value, str | bool | int | float) else _whole(value, name)


def _sliced(value: Any, rows: slice) -> Any:
    if isinstance(value, Mapping):
        return {key: _sliced(part, rows) for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_sliced(part, rows) for part in value)
    if not isinstance(value, torch.Tensor | np.ndarray | SparseRows) or getattr(value, "ndim", 1) == 0:
        return value
    return value[rows]


def _lengths(value: Any) -> list[int]:
    """Return the numbers of rows of all the arrays in ``value``; those without an axis are shared by all rows."""
    if isinstance(value, Mapping | tuple):
        parts = value.values() if isinstance(value, Mapping) else value
        return [length for part in parts for length in _lengths(part)]
    if isinstance(value, torch.Tensor | np.ndarray):
        return [len(value)] if value.ndim else []
    return [len(value)] if isinstance(value, SparseRows) else []
