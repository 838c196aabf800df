"""The forms of data, each as a source of raw batches in a fixed order, no row dropped."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeGuard, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from .._check import must_be
from .._distributed import Ranks
from .._lazy import is_lazy
from .._types import Batch
from ..models import labels_key
from .arrays import array_source, check_entries
from .loaders import Indexed, Reiterable, Source, length, loader_source, rebatched

__all__ = ["check_form", "is_empty", "is_numbers", "is_sample", "source_of"]

ACCEPTED = (
    "an (X, y) tuple, a map-style Dataset, a DataLoader, a skorch SliceDict or SliceDataset with y, "
    "or a re-iterable of batches"
)


def source_of(data: object, batch_size: int | None, needs_row_order: bool, ranks: Ranks | None = None) -> Source:
    """Return what yields the raw batches of ``data`` anew at each call; this process's share where there are others."""
    if isinstance(data, tuple) and len(data) == 2 and data[1] is None and isinstance(data[0], Dataset | DataLoader):
        # As skorch's `fit(dataset, None)` has it.
        data = data[0]
    if isinstance(data, tuple):
        return array_source(data, batch_size)
    if isinstance(data, DataLoader):
        return loader_source(data, batch_size, needs_row_order, ranks)
    if _is_map_style(data) or (isinstance(data, list) and data and is_sample(data[0])):
        return rebatched(data, range(length(data)), batch_size, _collate)
    if isinstance(data, Mapping) and labels_key(data) is not None:
        return array_source((data, None), batch_size)
    check_form(data)
    if isinstance(data, Iterator):
        hint = "It yields its batches only once, and a solve reads them many times. Try `list(...)`."
        raise TypeError(must_be("data", ACCEPTED, f"a {type(data).__name__}", hint))
    return Reiterable(cast("Iterable[Batch]", data))


def check_form(data: object) -> None:
    """Raise where there are no targets in data, or no data, as far as their form tells: that of lazy arrays too."""
    if isinstance(data, tuple):
        check_entries(data)
    elif isinstance(data, Mapping) and labels_key(data) is not None:
        return
    elif isinstance(data, str | bytes | Mapping) or not isinstance(data, Iterable):
        hint = "Labels belong in it: try `(X, y)`, or a mapping with 'labels'."
        raise TypeError(must_be("data", ACCEPTED, type(data).__name__, hint))
    elif isinstance(data, np.ndarray | torch.Tensor) or is_lazy(data):
        got = f"an array of shape {tuple(getattr(data, 'shape', ()))}"
        raise TypeError(must_be("data", ACCEPTED, got, "Try `(X, y)`."))


def is_empty(data: object) -> bool:
    """Return whether ``(X, y)`` have no rows: arrays, sparse matrices, frames and their columns, or lists of labels."""
    if not isinstance(data, tuple) or len(data) != 2:
        return False
    shapes: list[tuple[int, ...]] = [
        np.shape(part) if isinstance(part, list) else getattr(part, "shape", ()) for part in data
    ]
    return all(len(shape) and shape[0] == 0 for shape in shapes)


def _is_map_style(data: object) -> TypeGuard[Indexed]:
    """Return whether ``data`` holds samples by their index: a Dataset, or what only quacks like one."""
    if isinstance(data, Dataset):
        return not isinstance(data, IterableDataset)
    if isinstance(data, Sequence | Mapping | deque | np.ndarray | torch.Tensor):
        return False
    if not isinstance(data, Indexed):
        return False
    # With `__iter__` it may yield batches; Hugging Face's data sets yield samples, as mappings.
    return not isinstance(data, Iterable) or (len(data) > 0 and is_sample(data[0], mapping=True))


def is_sample(item: object, mapping: bool = False) -> bool:
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


def _collate(samples: list[Batch]) -> Batch:
    """Return samples as a batch as torch does, but their lists of numbers as rows."""
    try:
        return default_collate([_with_arrays(sample) for sample in samples])
    except RuntimeError as error:
        hint = "Try a DataLoader with a `collate_fn` that pads."
        raise ValueError(must_be("Samples", "of one shape", str(error), hint)) from error


def _with_arrays(sample: object) -> object:
    if isinstance(sample, Mapping):
        return {key: _row(value) for key, value in sample.items()}
    if isinstance(sample, tuple | list) and type(sample) in (tuple, list) and len(sample) == 2:
        return tuple(map(_row, sample))
    return sample


def _row(value: object) -> object:
    return np.asarray(value) if is_numbers(value) else value


def is_numbers(value: object) -> bool:
    """Return whether ``value`` is a list of numbers, however deep."""
    first = value
    while isinstance(first, list) and first:
        first = first[0]
    return isinstance(value, list) and isinstance(first, int | float)
