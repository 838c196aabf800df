"""Rows in Dask arrays: what is fitted maps each block of rows when that is computed, on whatever worker."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeGuard
from uuid import uuid4

import numpy as np
from sklearn.base import TransformerMixin

from ._check import must_be

if TYPE_CHECKING:
    import dask.array as da
    from dask.delayed import Delayed

__all__ = ["StaysLazy", "check_in_memory", "is_lazy", "over_rows"]


class StaysLazy(TransformerMixin):
    """A transformer whose lazy output stays lazy, whatever ``set_output`` asks for: a frame would be computed whole."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Lead lazy rows past scikit-learn's wrappers of the class's own methods."""
        own = {name: vars(cls)[name] for name in ("transform", "fit_transform") if name in vars(cls)}
        super().__init_subclass__(**kwargs)
        for name, method in own.items():
            setattr(cls, name, _unless_lazy(getattr(cls, name), method))


def _unless_lazy(framing: Callable[..., Any], method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that puts its output into the container that is set, but that of lazy rows."""

    @wraps(method)
    def inside(self: object, X: object, *args: object, **kwargs: object) -> Any:
        chosen = method if is_lazy((X, *args, kwargs.get("y"))) else framing
        return chosen(self, X, *args, **kwargs)

    return inside


def is_lazy(data: object) -> bool:
    """Return whether data are a Dask array, or have one as a part."""
    return any(_is_dask(part) for part in _leaves(data))


def check_in_memory(data: object, what: str, hint: str) -> None:
    """Raise TypeError where data are lazy and ``what`` cannot be."""
    if is_lazy(data):
        raise TypeError(must_be(what, "in memory", "a Dask array", hint))


def over_rows(fitted: object, method: str, data: object, width: int, dtype: np.dtype[Any]) -> da.Array:
    """Return ``fitted.method(data)`` of lazy rows as a lazy array (n, width), in the blocks of rows of its first part.

    A block is computed as rows in memory are, as a whole. Blocks of columns are joined. Where a distributed client is
    there, ``fitted`` is sent to each of its workers now, once. One node of the graph it is in any case.

    Parameters
    ----------
    fitted : estimator
        One that stays as it is, see ``as_it_is``; pickled on its way to other processes.
    method : str
        Of it.
    data : dask array, or tuple or mapping of such and of arrays
        All with n rows.
    width : int
        Columns of the result.
    dtype : dtype
        Of the result.
    """
    import dask.array as da
    from dask.delayed import delayed

    rows = _row_chunks(data)
    aligned = [_aligned(part, rows) for part in _leaves(data)]
    holder = _sent(fitted)
    mapped, form, empty = (
        delayed(_mapped, pure=False),
        _form(data, iter(range(len(aligned)))),
        np.empty((0, width), dtype),
    )
    blocks = zip(rows, *(part.to_delayed().ravel() for part in aligned), strict=True)
    found = [da.from_delayed(mapped(holder, method, form, *parts), (m, width), meta=empty) for m, *parts in blocks if m]
    return da.concatenate(found) if found else da.from_array(empty)


class _Node:
    """What is fitted, as a node of a graph. Its pickle is the name alone for as long as a client has it on its workers.

    Schedulers without workers, and clients that come later, find it in the graph.
    """

    def __init__(self, name: str, fitted: object, sent: Any = None) -> None:
        self.name, self.fitted, self.sent = name, fitted, sent

    def __reduce__(self) -> tuple[object, ...]:
        return _Node, (self.name, None if self.sent is not None and self.sent.status == "finished" else self.fitted)

    def __dask_tokenize__(self) -> str:
        return self.name


def _sent(fitted: object) -> Delayed:
    """Return what stands for ``fitted`` in a graph; with a client it is on all workers, for as long as this is held."""
    from dask.delayed import delayed

    library = sys.modules.get("distributed")
    try:
        client = None if library is None else library.Client.current()
    except ValueError:
        client = None
    name, sent = f"{type(fitted).__name__}-{uuid4().hex}", None
    if client is not None:
        # As a node of the graph alone it would be sent again whenever a worker had no block to do. Of a node that its
        # workers have under the same name the client's scheduler takes no notice.
        sent = client.scatter({name: _Node(name, fitted)}, broadcast=True, hash=False)[name]
    return delayed(_Node(name, fitted, sent), name=name, traverse=False)


def _mapped(node: Any, method: str, form: object, *parts: np.ndarray) -> np.ndarray:
    """Map one block of rows, on a worker."""
    if node.fitted is None:
        hint = "Another client's workers have it: compute with that one, by threads, or call `transform` again."
        raise RuntimeError(must_be("What was fitted", "on this worker", "its name alone", hint))
    found = getattr(node.fitted, method)(_filled(form, parts))
    return np.asarray(found)


def _is_dask(part: object) -> TypeGuard[da.Array]:
    """Return whether a part is a Dask array; whoever has one has imported its library."""
    library = sys.modules.get("dask.array")
    return library is not None and isinstance(part, library.Array)


def _leaves(data: object) -> Iterator[object]:
    """Yield the arrays within data, in order; a target of None is none."""
    if isinstance(data, Mapping):
        data = tuple(data.values())
    if isinstance(data, tuple):
        for part in data:
            yield from _leaves(part)
    elif data is not None:
        yield data


def _form(data: object, places: Iterator[int]) -> object:
    """Return data with numbers in the places of its arrays, in order."""
    if isinstance(data, Mapping):
        return {key: _form(part, places) for key, part in data.items()}
    if isinstance(data, tuple):
        return tuple(_form(part, places) for part in data)
    return None if data is None else next(places)


def _filled(form: object, parts: tuple[np.ndarray, ...]) -> object:
    """Return data again, with arrays in the places of numbers."""
    if isinstance(form, Mapping):
        return {key: _filled(part, parts) for key, part in form.items()}
    if isinstance(form, tuple):
        return tuple(_filled(part, parts) for part in form)
    return parts[form] if isinstance(form, int) else None


def _row_chunks(data: object) -> tuple[int, ...]:
    """Return the lengths of the blocks of rows of the first Dask array; raise where any one's are not known."""
    lazy = [part for part in _leaves(data) if _is_dask(part)]
    for part in lazy:
        if not part.ndim:
            raise ValueError(must_be("A Dask array", "of rows", "one number"))
        if any(math.isnan(length) for length in part.chunks[0]):
            hint = "Try `array.compute_chunk_sizes()` first."
            raise ValueError(must_be("A Dask array", "of known chunks of rows", "unknown ones", hint))
    chunks: tuple[int, ...] = lazy[0].chunks[0]
    return chunks


def _aligned(part: Any, rows: tuple[int, ...]) -> da.Array:
    """Return a part in blocks of the rows' lengths, its other axes whole."""
    import dask.array as da

    part = part if _is_dask(part) else da.from_array(np.asarray(part), chunks=-1)
    if part.shape[0] != sum(rows):
        raise ValueError(must_be("All parts of the data", f"of {sum(rows):,} rows", f"one of {part.shape[0]:,}"))
    return part.rechunk({0: rows, **dict.fromkeys(range(1, part.ndim), -1)})
