"""Every accepted form of data as a re-iterable of weighted batches, in a fixed order, no row dropped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from ._autograd import own_tensor
from ._memory import working_memory
from ._validation import check_sample_weight, must_be, to_plain_array
from .models import leading_length, map_tensors

__all__ = ["Batches", "as_batches"]

ACCEPTED = (
    "an (X, y) tuple, a map-style Dataset, a DataLoader, a skorch SliceDict or SliceDataset with y, "
    "or a re-iterable of batches"
)


@dataclass
class Batches:
    """A re-iterable of ``(batch, weights)``: tensors on the device, and the batch's sample weights (m,).

    Attributes
    ----------
    source : callable
        Returns a fresh iterator of raw batches, in the same order every time.
    n_samples : int
        Number of rows.
    sample_weight : ndarray of shape (n,) or None
        None is a weight of one for each row.
    """

    source: Callable[[], Iterable[Any]]
    dtype: torch.dtype
    device: torch.device
    sample_weight: np.ndarray | None = None
    n_samples: int = 0
    kept: list[Any] | None = None

    def __iter__(self) -> Iterator[tuple[Any, torch.Tensor]]:
        """Yield ``(batch, weights)`` over all rows."""
        start = 0
        for batch in self.raw():
            m = leading_length(batch)
            yield batch, self._weights(start, m)
            start += m

    def raw(self) -> Iterable[Any]:
        """Yield the batches as tensors, from memory where they are kept."""
        if self.kept is not None:
            return self.kept
        return (_to_tensors(batch, self.dtype, self.device) for batch in self.source())

    def take(self, indices: torch.Tensor) -> Batches:
        """Return the samples ``indices`` (m,) with their weights; a sample may be taken more than once.

        They come grouped by the batch that holds them, as one batch where the shapes allow it (padded sequences may
        not).

        Raises
        ------
        ValueError
            Where the batches are not kept in memory: only then can single samples be reached.
        """
        if self.kept is None:
            hint = "Try `sklearn.set_config(working_memory=...)` (in MiB) with more, or another method."
            must = f"of at most {working_memory() / 2**20:.4g} MiB, scikit-learn's working_memory"
            raise ValueError(must_be("Data that a method draws samples from", must, "more", hint))
        rows = indices.cpu().numpy()
        stops = np.cumsum([leading_length(batch) for batch in self.kept])
        holders = np.searchsorted(stops, rows, side="right")
        parts = []
        for holder in np.unique(holders):
            start = 0 if holder == 0 else stops[holder - 1]
            inside = torch.from_numpy(rows[holders == holder] - start).to(self.device)
            parts.append(map_tensors(lambda tensor, inside=inside: tensor[inside], self.kept[holder]))
        order = rows[np.argsort(holders, kind="stable")]
        weights = None if self.sample_weight is None else self.sample_weight[order]
        kept = _merged(parts)
        return Batches(kept.__iter__, self.dtype, self.device, weights, len(rows), kept)

    def _weights(self, start: int, m: int) -> torch.Tensor:
        if self.sample_weight is None:
            return torch.ones(m, dtype=self.dtype, device=self.device)
        part = self.sample_weight[start : start + m]
        return torch.as_tensor(part, dtype=self.dtype, device=self.device)


def as_batches(
    data: Any,
    *,
    dtype: torch.dtype,
    device: torch.device,
    batch_size: int | None = None,
    sample_weight: Any = None,
    needs_row_order: bool = False,
) -> Batches:
    """Return ``data``, in any accepted form, as ``Batches``; collated once and kept where it fits the memory."""
    source = _source(data, batch_size, needs_row_order or sample_weight is not None)
    batches = Batches(source, dtype, device)
    _collect(batches)
    if not batches.n_samples:
        raise ValueError(must_be("data", "one with at least one row", "0 samples: minimum of 1 is required"))
    batches.sample_weight = check_sample_weight(sample_weight, batches.n_samples)
    return batches


def _collect(batches: Batches) -> None:
    """Count the rows, check them, and keep the batches while they fit the working memory."""
    kept: list[Any] | None = []
    size = 0
    for batch in batches.raw():
        batches.n_samples += leading_length(batch)
        size += _nbytes(batch)
        map_tensors(_check_finite, batch)
        kept = [*kept, batch] if kept is not None and size <= working_memory() else None
    batches.kept = kept


def _source(data: Any, batch_size: int | None, needs_row_order: bool) -> Callable[[], Iterable[Any]]:
    if isinstance(data, tuple):
        return _arrays(data, batch_size)
    if isinstance(data, DataLoader):
        return _loader(data, batch_size, needs_row_order)
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        rows: Any = data
        return _rebatched(data, range(len(rows)), batch_size or 1024, default_collate)
    if isinstance(data, str | bytes | Mapping) or not isinstance(data, Iterable):
        raise TypeError(must_be("data", ACCEPTED, type(data).__name__, "Labels belong in it: try `(X, y)`."))
    if isinstance(data, np.ndarray | torch.Tensor):
        raise TypeError(must_be("data", ACCEPTED, f"an array of shape {tuple(data.shape)}", "Try `(X, y)`."))
    if iter(data) is data:
        hint = "It yields its batches only once, and a solve reads them many times. Try `list(...)`."
        raise TypeError(must_be("data", ACCEPTED, f"a {type(data).__name__}", hint))
    return _Reiterable(data)


@dataclass
class _Reiterable:
    """Batches as the user's own iterable yields them."""

    data: Iterable[Any]

    def __call__(self) -> Iterable[Any]:
        return iter(self.data)


@dataclass
class _Rebatched:
    """Rows of a map-style data set, collated in the given order."""

    dataset: Any
    batches: Any
    collate: Callable[[list[Any]], Any]
    workers: int = 0

    def __call__(self) -> Iterable[Any]:
        return iter(
            DataLoader(self.dataset, batch_sampler=self.batches, collate_fn=self.collate, num_workers=self.workers)
        )


def _rebatched(
    dataset: Any, indices: Sequence[int], size: int, collate: Callable[[list[Any]], Any], workers: int = 0
) -> _Rebatched:
    if len(indices) == 0:
        raise ValueError(must_be("data", "one with at least one row", "an empty data set: 0 samples"))
    return _Rebatched(dataset, [indices[i : i + size] for i in range(0, len(indices), size)], collate, workers)


def _loader(loader: Any, batch_size: int | None, needs_row_order: bool) -> Callable[[], Iterable[Any]]:
    """Read a map-style loader in data set order, whatever it shuffles or drops."""
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        return _Reiterable(loader)
    plain = type(loader.sampler) in (SequentialSampler, RandomSampler) and loader.batch_size is not None
    if not plain and needs_row_order:
        hint = "Its rows cannot be told apart from their order. Try `torch.utils.data.Subset` with a plain DataLoader."
        raise ValueError(
            must_be("A DataLoader here", "one without its own sampler", type(loader.sampler).__name__, hint)
        )
    if loader.batch_size is None:
        # Drawn once, so that every pass sees the same rows.
        return _Rebatched(loader.dataset, list(loader.batch_sampler), loader.collate_fn, loader.num_workers)
    indices = range(len(loader.dataset)) if plain else list(loader.sampler)
    return _rebatched(loader.dataset, indices, batch_size or loader.batch_size, loader.collate_fn, loader.num_workers)


@dataclass
class _Arrays:
    """Slices of arrays that were converted once."""

    inputs: Any
    targets: Any
    size: int

    def __call__(self) -> Iterable[Any]:
        for start in range(0, len(self.targets), self.size):
            rows = slice(start, start + self.size)
            yield map_tensors(lambda tensor, rows=rows: tensor[rows], (self.inputs, self.targets))


def _arrays(data: tuple[Any, ...], batch_size: int | None) -> _Arrays:
    if len(data) != 2 or data[1] is None:
        raise ValueError(must_be("data as a tuple", "(X, y)", f"{len(data)} entries, y {type(data[-1]).__name__}"))
    inputs, targets = _whole(data[0], "X"), _whole(data[1], "y")
    if targets.ndim == 0:
        raise ValueError(must_be("y", "an array of one target per row", "a scalar"))
    lengths: list[int] = []
    map_tensors(lambda tensor: lengths.append(len(tensor)), inputs)
    if set(lengths) != {len(targets)}:
        raise ValueError(
            must_be("X and y", "of the same length", f"inconsistent numbers of samples: {lengths}, {len(targets)}")
        )
    return _Arrays(inputs, targets, batch_size or 1024)


def _whole(value: Any, name: str) -> Any:
    """Return a tensor, or a mapping of tensors, of everything in ``value``."""
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.is_complex():
            raise TypeError(must_be(name, "dense and real", f"{value.layout}, {value.dtype}"))
        return value.detach()
    if isinstance(value, Mapping):
        return {key: _whole(part, f"{name}[{key!r}]") for key, part in value.items()}
    if isinstance(value, Dataset) or (type(value).__module__.startswith("skorch") and isinstance(value, Sequence)):
        rows: Any = value
        return default_collate([rows[i] for i in range(len(rows))])
    if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
        return torch.stack(value)
    # A copy: torch would write into a read-only memory map.
    return torch.from_numpy(np.array(to_plain_array(value, name), copy=True))


def _to_tensors(batch: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Return ``batch`` on the device: floats in ``dtype``, integers as they are, short ones widened."""
    if isinstance(batch, np.ndarray):
        batch = torch.from_numpy(np.array(to_plain_array(batch, "A batch"), copy=True))
    if isinstance(batch, torch.Tensor):
        if batch.is_complex() or batch.layout != torch.strided:
            raise TypeError(must_be("data", "dense and real", f"{batch.layout}, {batch.dtype}"))
        if batch.dtype in (torch.int8, torch.int16, torch.int32):
            batch = batch.long()
        return own_tensor(batch.detach()).to(device, dtype if batch.is_floating_point() else None)
    if isinstance(batch, Mapping):
        return {key: _to_tensors(value, dtype, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(_to_tensors(value, dtype, device) for value in batch)
    return batch


def _merged(parts: list[Any]) -> list[Any]:
    """Return the parts as one batch, or as they are where they cannot be joined."""
    try:
        return [_joined(parts)] if len(parts) > 1 else parts
    except (RuntimeError, ValueError):
        return parts


def _joined(parts: list[Any]) -> Any:
    first = parts[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(parts)
    if isinstance(first, Mapping):
        return {key: _joined([part[key] for part in parts]) for key in first}
    if isinstance(first, tuple | list):
        return type(first)(_joined(list(values)) for values in zip(*parts, strict=True))
    raise ValueError(must_be("A joined batch", "of tensors", type(first).__name__))


def _check_finite(tensor: torch.Tensor) -> None:
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        kind = "NaN" if bool(tensor.isnan().any()) else "infinity"
        raise ValueError(must_be("data", "finite", kind, "Try to impute or drop those rows."))


def _nbytes(batch: Any) -> int:
    sizes: list[int] = []
    map_tensors(lambda tensor: sizes.append(tensor.nbytes), batch)
    return sum(sizes)
