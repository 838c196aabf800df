"""Arrays, and mappings and tuples of them, as a source of raw batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from .._check import must_be, to_plain_array
from .._types import Batch
from ..models import SparseRows, labels_key
from .loaders import Indexed, Source

__all__ = ["array_source", "check_entries"]


@dataclass
class _Arrays:
    """Slices of arrays, copied or made dense a batch at a time."""

    inputs: object
    targets: object
    n: int
    size: int

    def __call__(self) -> Iterable[Batch]:
        for start in range(0, self.n, self.size):
            rows = slice(start, start + self.size)
            inputs = _sliced(self.inputs, rows)
            yield inputs if self.targets is None else (inputs, _sliced(self.targets, rows))


def array_source(data: tuple[object, ...], batch_size: int | None) -> Source:
    """Return the batches of ``(X, y)``, or of a mapping with labels and None."""
    labelled = check_entries(data)
    inputs, targets = _whole(data[0], "X"), None if labelled else _whole(data[1], "y")
    lengths = [_lengths(part) for part in (inputs, targets)]
    if targets is not None and not lengths[1]:
        raise ValueError(must_be("y", "an array of one target per row", "a scalar"))
    if len({*lengths[0], *lengths[1]}) > 1:
        got = f"inconsistent numbers of samples: {lengths[0]}, {', '.join(map(str, lengths[1]))}"
        raise ValueError(must_be("X and y", "of the same length", got))
    return _Arrays(inputs, targets, (lengths[1] or lengths[0])[0], batch_size or 1024)


def check_entries(data: tuple[object, ...]) -> bool:
    """Return whether ``(X, y)`` is a mapping with labels and None; raise where its targets are nowhere."""
    labelled = len(data) == 2 and data[1] is None and isinstance(data[0], Mapping) and labels_key(data[0]) is not None
    if len(data) != 2 or (data[1] is None and not labelled):
        got = f"{len(data)} entries, y {type(data[-1]).__name__}" if data else "no entries"
        raise ValueError(must_be("data as a tuple", "(X, y)", got))
    return labelled


def _whole(value: object, name: str) -> object:
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
        rows = cast("Indexed", value)
        return default_collate([rows[i] for i in range(len(rows))])
    if isinstance(value, tuple) and any(isinstance(part, torch.Tensor | np.ndarray | Mapping) for part in value):
        return tuple(_part(part, f"{name}[{i}]") for i, part in enumerate(value))
    if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
        return torch.stack(value)
    return to_plain_array(value, name)


def _part(value: object, name: str) -> object:
    """Return one of several inputs; numbers and other settings are shared by all rows."""
    return value if value is None or isinstance(value, str | bool | int | float) else _whole(value, name)


def _sliced(value: object, rows: slice) -> object:
    if isinstance(value, Mapping):
        return {key: _sliced(part, rows) for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_sliced(part, rows) for part in value)
    if isinstance(value, SparseRows) or (isinstance(value, torch.Tensor | np.ndarray) and value.ndim):
        return value[rows]
    return value


def _lengths(value: object) -> list[int]:
    """Return the numbers of rows of all the arrays in ``value``; those without an axis are shared by all rows."""
    if isinstance(value, Mapping | tuple):
        parts = value.values() if isinstance(value, Mapping) else value
        return [length for part in parts for length in _lengths(part)]
    if isinstance(value, torch.Tensor | np.ndarray):
        return [len(value)] if value.ndim else []
    return [len(value)] if isinstance(value, SparseRows) else []
