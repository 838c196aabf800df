"""What is asked of data as the user holds them: what `fit` means by them, how many rows there are, and some of them."""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Mapping, Sized
from typing import Any

import numpy as np
import scipy.sparse
import torch
from sklearn.utils import check_consistent_length
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler, Subset

from .._check import must_be
from .._frames import Columned, Frame
from .._types import Array, Batch
from ..models import TwiceDifferentiable, labels_key, map_tensors
from .loaders import loader_source

__all__ = [
    "as_data",
    "as_pair",
    "check_row_order",
    "count",
    "holds_tensors",
    "is_data",
    "is_rows",
    "take",
    "with_any_targets",
]


class _Samples(Dataset[Batch]):
    """A list of samples, as a search over a data set leaves it."""

    def __init__(self, samples: list[Batch]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Batch:
        return self.samples[index]


def as_data(X: object, y: object) -> object:
    """Return what ``fit(X, y)`` with a model means: a pair, or a list of samples where a search indexed a data set."""
    if y is not None:
        return (X, y)
    return _Samples(X) if isinstance(X, list) else X


def as_pair(data: object) -> tuple[object, object]:
    """Return data as the two arguments X and y of ``fit``."""
    if isinstance(data, tuple) and len(data) == 2:
        return data
    return data, None


def check_row_order(data: object) -> None:
    """Raise where the order of a DataLoader's rows is another than its data set's, by a sampler of its own."""
    if isinstance(data, DataLoader):
        loader_source(data, None, needs_row_order=True)


def with_any_targets(data: object, model: TwiceDifferentiable) -> object:
    """Return inputs without targets, ``X`` or ``(X, None)``, with targets of zero; all else as it is.

    Those are for what does not look at them. A data set, a loader and batches bring their own, as a mapping with
    labels does.
    """
    if isinstance(data, list) and not is_rows(data, model):
        return data
    inputs, targets = data if isinstance(data, tuple) and len(data) == 2 else (data, None)
    labelled = isinstance(inputs, Mapping) and labels_key(inputs) is not None
    rows = None if targets is not None or labelled else _rows_within(inputs)
    return data if rows is None else (inputs, np.zeros(rows, dtype=np.int64))


def _rows_within(inputs: object) -> int | None:
    """Return the number of rows of the first array within inputs; None where there is none."""
    if isinstance(inputs, Mapping | tuple):
        parts = inputs.values() if isinstance(inputs, Mapping) else inputs
        found = (_rows_within(part) for part in parts)
        return next((rows for rows in found if rows is not None), None)
    if isinstance(inputs, np.ndarray | torch.Tensor):
        return len(inputs) if inputs.ndim else None
    if isinstance(inputs, Frame | Columned | list):
        return len(inputs)
    return inputs.shape[0] if isinstance(inputs, scipy.sparse.sparray | scipy.sparse.spmatrix) else None


def is_rows(data: list[Any], model: TwiceDifferentiable) -> bool:
    """Return whether a list is rows X for a model, not batches; TypeError for rows to one that takes it for these."""
    if model.reads_pairs_alone:
        return True
    first = data[0] if data else None
    flat = isinstance(first, list) and first and all(isinstance(value, numbers.Number) for value in first)
    if flat or isinstance(first, str | bytes | numbers.Number):
        # Rows of two numbers would pass for samples (x, y).
        got, hint = f"a list of a {type(first).__name__} each", "A list is one of batches here: try `np.asarray(X)`."
        raise TypeError(must_be("Data", "an array or tensor of rows, or (X, y)", got, hint))
    return False


def is_data(value: object) -> bool:
    """Return whether ``value`` is data for a model, which no plain rows or targets could be."""
    if isinstance(value, tuple):
        return any(isinstance(part, np.ndarray | torch.Tensor | Mapping | Frame | Columned) for part in value)
    return isinstance(value, DataLoader | Dataset | Iterator)


def count(data: object) -> tuple[int, Array]:
    """Return how many rows there are to split, and the targets where they are at hand."""
    if isinstance(data, np.ndarray | Frame | Columned):
        return len(data), None
    if isinstance(data, tuple) and len(data) == 2 and data[1] is not None:
        X, y = data
        inputs = X.values() if isinstance(X, Mapping) else X if isinstance(X, tuple) else [X]
        check_consistent_length(*inputs, y)
        return len(y), y.detach().cpu().numpy() if isinstance(y, torch.Tensor) else y
    dataset = data
    if isinstance(data, DataLoader) and data.batch_size is not None:
        dataset = data.dataset if type(data.sampler) in (SequentialSampler, RandomSampler) else None
    if isinstance(dataset, Dataset) and not isinstance(dataset, IterableDataset) and isinstance(dataset, Sized):
        return len(dataset), None
    must = "an (X, y) tuple, a map-style Dataset with a length, or a DataLoader of one without a sampler of its own"
    raise TypeError(must_be("Data to split into folds", must, type(data).__name__, "Batches hide their rows."))


def take(data: object, rows: np.ndarray) -> object:
    """Return the ``rows`` of data in the form that it has: a tuple, a Dataset, a DataLoader or one array."""
    if isinstance(data, tuple):
        return tuple(_taken(part, rows) for part in data)
    if isinstance(data, DataLoader):
        return DataLoader(
            Subset(data.dataset, rows.tolist()),
            batch_size=data.batch_size,
            collate_fn=data.collate_fn,
            num_workers=data.num_workers,
        )
    return Subset(data, rows.tolist()) if isinstance(data, Dataset) else _taken(data, rows)


def _taken(values: Array, rows: np.ndarray) -> Array:
    if isinstance(values, Mapping):
        return {key: _taken(part, rows) for key, part in values.items()}
    if isinstance(values, tuple):
        return tuple(_taken(part, rows) for part in values)
    if isinstance(values, torch.Tensor):
        return values[torch.from_numpy(rows).to(values.device)]
    if isinstance(values, Frame):
        return values.iloc[rows]
    return [values[i] for i in rows] if isinstance(values, list) else values[rows]


def holds_tensors(data: Batch) -> bool:
    """Return whether the inputs are tensors as the user holds them."""
    if isinstance(data, tuple):
        return _any_tensor(data[0])
    if isinstance(data, Mapping):
        return _any_tensor(data)
    if isinstance(data, DataLoader) and not isinstance(data.dataset, IterableDataset):
        return _any_tensor(data.collate_fn([data.dataset[0]]))
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        return _any_tensor(data[0])
    return _any_tensor(next(iter(data)))


def _any_tensor(batch: Batch) -> bool:
    found: list[torch.Tensor] = []
    map_tensors(found.append, batch[0] if isinstance(batch, tuple | list) and batch else batch)
    return bool(found)
