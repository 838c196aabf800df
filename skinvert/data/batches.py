"""Every accepted form of data as a re-iterable of weighted batches, in a fixed order, no row dropped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from .._autograd import own_tensor
from .._check import all_finite, check_sample_weight, finite_rows, must_be, to_plain_array
from .._checksum import RowChecksum, checksum
from .._distributed import Ranks
from .._memory import working_memory
from .._types import Batch
from ..models import TwiceDifferentiable, labels_key, leading_length, map_tensors, rebuilt
from .loaders import NoRowsError, Source, dealt_out
from .shards import Shard, shared_out
from .sources import is_empty, is_numbers, source_of

__all__ = ["Batches", "as_batches", "batches_of"]


@dataclass
class Batches:
    """A re-iterable of ``(batch, weights)``: tensors on the device, and the batch's sample weights (m,).

    Attributes
    ----------
    source : callable
        Returns a fresh iterator of raw batches, in the same order every time.
    n_samples : int
        Number of rows.
    n_batches : int
        Number of batches in a pass over ``source``.
    fixed : bool
        Whether their size was asked for, and so is kept.
    checksums : list
        Of the raw batches of the first pass, where later ones are held against it.
    sample_weight : ndarray of shape (n,) or None
        None is a weight of one for each row.
    shard : Shard or None
        What these rows are among those of other processes; None where they are all of the data.
    """

    source: Source
    dtype: torch.dtype
    device: torch.device
    sample_weight: np.ndarray | None = None
    n_samples: int = 0
    kept: list[Batch] | None = None
    n_batches: int = 0
    fixed: bool = False
    checksums: list[list[Any]] = field(default_factory=list, repr=False)
    shard: Shard | None = None

    def __len__(self) -> int:
        """Return the number of batches, as the first pass counted them."""
        return self.n_batches if self.kept is None else len(self.kept)

    def __iter__(self) -> Iterator[tuple[Batch, torch.Tensor]]:
        """Yield ``(batch, weights)`` over all rows."""
        start = 0
        for batch in self.raw():
            m = leading_length(batch)
            yield batch, self._weights(start, m)
            start += m

    def raw(self) -> Iterable[Batch]:
        """Yield the batches as tensors, from memory where they are kept."""
        if self.kept is not None:
            return self.kept
        return (_to_tensors(batch, self.dtype, self.device) for batch in self.source())

    def row_checksums(self) -> list[int]:
        """Return checksums of the rows, the same whatever the batches that they come in, by a pass over the data."""
        found: dict[int, RowChecksum] = {}
        for batch in self.raw():
            tensors: list[torch.Tensor] = []
            map_tensors(tensors.append, batch)
            for place, tensor in enumerate(tensors):
                found.setdefault(place, RowChecksum()).add(tensor)
        return [each.value for each in found.values()]

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

    def merged(self, most: int) -> Batches:
        """Return the same rows in the same order, small kept batches joined to at most so many rows where they fit.

        Those of other shapes, as padded sequences are, stay as they are.
        """
        if self.kept is None or self.fixed:
            return self
        groups: list[list[Batch]] = [[]]
        rows = 0
        for batch in self.kept:
            m = leading_length(batch)
            if groups[-1] and rows + m > most:
                groups.append([])
                rows = 0
            groups[-1].append(batch)
            rows += m
        return replace(self, kept=[batch for group in groups for batch in _merged(group)])

    def in_float64(self) -> Batches:
        """Return the same batches, their floats cast from what they are here to float64."""
        kept = None if self.kept is None else [map_tensors(_double, batch) for batch in self.kept]
        return replace(self, source=_Doubled(self), dtype=torch.float64, kept=kept)

    def _weights(self, start: int, m: int) -> torch.Tensor:
        if self.sample_weight is None:
            return torch.ones(m, dtype=self.dtype, device=self.device)
        part = self.sample_weight[start : start + m]
        return torch.as_tensor(part, dtype=self.dtype, device=self.device)


def as_batches(
    data: object,
    *,
    dtype: torch.dtype,
    device: torch.device,
    model: TwiceDifferentiable | None = None,
    batch_size: int | None = None,
    sample_weight: object = None,
    needs_row_order: bool = False,
    hold: bool = True,
    ranks: Ranks | None = None,
) -> Batches:
    """Return ``data``, in any accepted form, as ``Batches``; collated once and kept where it fits the memory.

    What is kept is a copy, which later changes of the user's arrays do not reach; what is not is held against the
    checksums of the first pass, unless ``hold`` is False: for what one pass alone decides. A ``model`` says how its
    batches are read as pairs (inputs, targets). With ``ranks`` the data are this process's share, which may be empty.
    """
    source = _source(data, batch_size, needs_row_order or sample_weight is not None, ranks)
    passes = _SameEveryPass(source, dtype, device, hold)
    batches = Batches(passes, dtype, device, fixed=batch_size is not None)
    _collect(batches)
    batches.checksums = passes.seen or []
    if not batches.n_samples and ranks is None:
        raise ValueError(must_be("data", "one with at least one row", "0 samples: minimum of 1 is required"))
    batches.sample_weight = check_sample_weight(sample_weight, batches.n_samples, vanishing=ranks is not None)
    if ranks is not None:
        batches.shard = shared_out(batches, ranks, dealt_out(data))
        if batches.shard.empty:
            batches.sample_weight = np.zeros(1)
    if model is not None:
        model.learn_labels(batches.raw)
        batches.source = _Paired(batches.source, model)
        batches.kept = None if batches.kept is None else [model.pair(batch) for batch in batches.kept]
    return batches


def batches_of(
    model: TwiceDifferentiable,
    data: object,
    *,
    batch_size: int | None = None,
    sample_weight: object = None,
    needs_row_order: bool = False,
    hold: bool = True,
    ranks: Ranks | None = None,
) -> Batches:
    """Return ``data`` as a model reads it, as ``Batches`` in its dtype and on its device."""
    # scikit-learn reads no empty arrays.
    nothing = ranks is not None and is_empty(data)
    return as_batches(
        [] if nothing else model.read(data),
        dtype=model.dtype,
        device=model.device,
        model=model,
        batch_size=batch_size,
        sample_weight=sample_weight,
        needs_row_order=needs_row_order,
        hold=hold,
        ranks=ranks,
    )


def _source(data: object, batch_size: int | None, needs_row_order: bool, ranks: Ranks | None) -> Source:
    try:
        return source_of(data, batch_size, needs_row_order, ranks)
    except NoRowsError:
        if ranks is None:
            raise
        return tuple


def _collect(batches: Batches) -> None:
    """Count the rows, check them, and keep copies of the batches while they fit the working memory."""
    kept: list[Batch] | None = []
    size, empty = 0, None
    for batch in batches.raw():
        start, m = batches.n_samples, leading_length(batch)
        empty = batches.n_batches if not m and empty is None else empty
        batches.n_samples += m
        batches.n_batches += 1
        size += _nbytes(batch)
        map_tensors(partial(_check_finite, start=start, stop=batches.n_samples), batch)
        kept = [*kept, map_tensors(torch.clone, batch)] if kept is not None and size <= working_memory() else None
    batches.kept = kept
    if empty is not None and batches.n_samples:
        raise ValueError(must_be("A batch", "of at least one row", f"batch {empty} without any", "Leave it out."))


@dataclass
class _SameEveryPass:
    """Raw batches as tensors, each pass held against the first one's checksums."""

    source: Source
    dtype: torch.dtype
    device: torch.device
    hold: bool = True
    seen: list[list[Any]] | None = field(default=None, repr=False)

    def __call__(self) -> Iterator[Batch]:
        """Yield the batches; ValueError where they are not those of the first pass."""
        first = self.seen is None
        known = [] if self.seen is None else self.seen
        count = -1
        for count, raw in enumerate(self.source()):
            batch = _to_tensors(raw, self.dtype, self.device)
            if not self.hold:
                yield batch
                continue
            found = _checksums(batch)
            if first:
                known.append(found)
            elif count >= len(known) or found != known[count]:
                raise ValueError(_differs(f"another batch {count}"))
            yield batch
        if self.hold and not first and count + 1 < len(known):
            raise ValueError(_differs(f"{count + 1} batches after {len(known)}"))
        self.seen = known


@dataclass
class _Paired:
    """Raw batches as the pairs that a model reads in them."""

    source: Source
    model: TwiceDifferentiable

    def __call__(self) -> Iterator[Batch]:
        return (self.model.pair(batch) for batch in self.source())


@dataclass
class _Doubled:
    """Batches with their floats in float64."""

    batches: Batches

    def __call__(self) -> Iterator[Batch]:
        return (map_tensors(_double, batch) for batch in self.batches.raw())


def _double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _differs(got: str) -> str:
    must = "the same data in every pass: a solve reads them many times"
    hint = (
        "They differ between passes: random augmentation, shuffling, or arrays changed since fit? Make them "
        "deterministic, or materialise them once: `list(loader)`, or `sklearn.set_config(working_memory=...)`."
    )
    return must_be("The data", must, got, hint)


def _checksums(batch: Batch) -> list[Any]:
    found: list[Any] = []
    map_tensors(lambda tensor: found.append(checksum(tensor)), batch)
    return found


def _to_tensors(batch: Batch, dtype: torch.dtype, device: torch.device) -> Batch:
    """Return a batch on the device; the targets of a pair or a labelled mapping are never short integers."""
    if isinstance(batch, Mapping):
        label = labels_key(batch)
        return {key: _tensor(value, dtype, device, key == label) for key, value in batch.items()}
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return (_tensor(batch[0], dtype, device), _tensor(batch[1], dtype, device, True))
    return _tensor(batch, dtype, device)


def _tensor(value: object, dtype: torch.dtype, device: torch.device, target: bool = False) -> Batch:
    """Return a part of a batch: floats in ``dtype``, short integers widened, but the bytes of inputs as they are."""
    if isinstance(value, np.ndarray | np.generic) or is_numbers(value):
        # In one order: sums of the same numbers, laid out otherwise, round otherwise.
        value = torch.from_numpy(np.array(to_plain_array(value, "A batch"), copy=True, order="C"))
    if isinstance(value, torch.Tensor):
        if value.is_complex() or value.layout != torch.strided:
            hint = "Try `.to_dense()` in the collate_fn." if value.layout != torch.strided else ""
            raise TypeError(must_be("data", "dense and real", f"{value.layout}, {value.dtype}", hint))
        wide = value.is_floating_point() or value.dtype in (torch.bool, torch.int64)
        if not wide and (target or value.dtype != torch.uint8):
            value = value.long()
        return own_tensor(value.detach()).to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, Mapping):
        return {key: _tensor(part, dtype, device, target) for key, part in value.items()}
    if isinstance(value, tuple | list):
        parts = [_tensor(part, dtype, device, target) for part in value]
        return rebuilt(value, parts) if isinstance(value, tuple) else tuple(parts)
    return value


def _merged(parts: list[Batch]) -> list[Batch]:
    """Return the parts as one batch, or as they are where they cannot be joined."""
    if len(parts) < 2:
        return parts
    try:
        joined = _joined(parts)
    except (RuntimeError, ValueError):
        return parts
    lengths: list[int] = []
    map_tensors(lambda tensor: lengths.append(len(tensor)), joined)
    # Not a table that all rows of a batch share.
    return [joined] if set(lengths) == {sum(leading_length(part) for part in parts)} else parts


def _joined(parts: list[Batch]) -> Batch:
    first = parts[0]
    if isinstance(first, torch.Tensor) and first.ndim:
        return torch.cat(parts)
    if isinstance(first, Mapping):
        return {key: _joined([part[key] for part in parts]) for key in first}
    if isinstance(first, tuple | list):
        joined = [_joined(list(values)) for values in zip(*parts, strict=True)]
        return rebuilt(first, joined)
    raise ValueError(must_be("A joined batch", "of tensors", type(first).__name__))


def _check_finite(tensor: torch.Tensor, start: int, stop: int) -> None:
    if tensor.is_floating_point() and not all_finite(tensor):
        kind = "NaN" if bool(tensor.isnan().any()) else "infinity"
        place = f"a value that rows {start} to {stop - 1} share"
        if tensor.ndim and len(tensor) == stop - start:
            place = f"row {start + int((~finite_rows(tensor.reshape(len(tensor), -1))).nonzero()[0])}"
        raise ValueError(must_be("data", "finite", f"{kind} in {place}", "Try to impute or drop such rows."))


def _nbytes(batch: Batch) -> int:
    sizes: list[int] = []
    map_tensors(lambda tensor: sizes.append(tensor.nbytes), batch)
    return sum(sizes)
