"""Data frames: whose rows they are, whose columns, and right-hand sides that are no rows at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized, ValuesView
from typing import Any, Protocol, TypeGuard, runtime_checkable

import numpy as np
import scipy.sparse
import torch
from sklearn.base import BaseEstimator
from sklearn.utils import check_array

from ._check import check_choice, must_be
from ._lazy import StaysLazy
from ._types import Array

__all__ = [
    "Columned",
    "Frame",
    "RowTransformer",
    "check_columns",
    "check_inputs",
    "columns_of",
    "frame_of",
    "framed",
    "has_columns",
    "refuse_inputs",
    "refuse_parameters",
    "rows_of",
    "with_labels",
    "without_names",
]


@runtime_checkable
class Frame(Protocol):
    """What pandas' frames and columns have, and those of libraries after its model: labels of rows, and their places.

    A protocol, since none of these libraries need be installed.
    """

    index: object
    # Rows by place; what a key gives is the library's own.
    iloc: Any

    def __len__(self) -> int: ...


@runtime_checkable
class Columned(Protocol):
    """What frames of any library have: columns, and rows."""

    columns: Sequence[object]

    def __len__(self) -> int: ...


class RowTransformer(StaysLazy, BaseEstimator):
    """A transformer whose output belongs to the rows of a part of its input, ``(X, y)`` say.

    scikit-learn's ``set_output`` gives an output frame the index of the input where that is a frame: ``transform`` here
    is wrapped by it as if the rows alone had been the input, and that of subclasses, which call it, is not.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Leave the subclass's own ``transform`` as it is: wrapped again, its frame would be named anew."""
        own = vars(cls).get("transform")
        super().__init_subclass__(**kwargs)
        if own is not None:
            setattr(cls, "transform", own)  # noqa: B010 (to mypy a method is no attribute to set)

    def transform(self, rows: Array, output: Array) -> Array:
        """Return ``output``, in a container where one is set, with the index of ``rows``."""
        return output


class _Named(RowTransformer):
    """Stands in for a transformer where an output has columns of another number."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def get_feature_names_out(self, input_features: object = None) -> np.ndarray:
        """Return the names of the columns."""
        return np.asarray(self.names, dtype=object)


def framed(owner: RowTransformer, rows: Array, output: Array, labels: Iterable[object]) -> Array:
    """Return ``output`` (m, c) in the container that ``owner`` or scikit-learn is set to, if any.

    With the index of ``rows``, and ``labels`` as its columns.
    """
    labels = list(labels)
    named = _Named([str(label) for label in labels])
    # What `set_output` has set.
    named.__dict__.update({key: value for key, value in vars(owner).items() if key == "_sklearn_output_config"})
    return with_labels(named.transform(rows, output), labels)


def with_labels(found: Array, labels: Iterable[object]) -> Array:
    """Return a frame that is ours with labels of any kind as its columns, where its library allows that; or ``found``.

    scikit-learn's names are strings, and so must polars' be.
    """
    if isinstance(found, Columned) and isinstance(found, Frame):
        found.columns = list(labels)
    return found


def frame_of(columns: Mapping[str, np.ndarray], index: np.ndarray | None, library: str) -> Array:
    """Return columns (n,) as a data frame of pandas, with an index, or of polars, with a column ``index`` for it."""
    check_choice(library, "library", ["pandas", "polars"])
    try:
        if library == "pandas":
            import pandas

            return pandas.DataFrame(dict(columns), index=None if index is None else list(index))
        import polars

        return polars.DataFrame({**({} if index is None else {"index": list(index)}), **columns})
    except ImportError as error:
        message = must_be(library, "installed for its frames", "no such package", f"Try `pip install {library}`.")
        raise ImportError(message) from error


def rows_of(data: object) -> object:
    """Return the part of ``(X, y)`` or of a mapping that has the rows' index, or ``data``."""
    parts: Iterable[object] = data.values() if isinstance(data, Mapping) else data if isinstance(data, tuple) else ()
    found = (rows_of(part) for part in parts)
    return next((part for part in found if isinstance(part, Frame)), data)


def has_columns(b: object) -> TypeGuard[Columned]:
    """Return whether ``b`` is a frame whose columns have names, or some of them."""
    return isinstance(b, Columned) and any(isinstance(name, str) for name in b.columns)


def check_columns(b: object, names: Sequence[str]) -> None:
    """Raise where ``b`` is a frame whose columns are not ``names`` in their order, or are 0 to p − 1 in another."""
    columns = list(b.columns) if isinstance(b, Columned) else []
    if not names or not columns:
        return
    hint = "Try `b[list(inverter.get_feature_names_out())]`, or `b.to_numpy()` to go by position."
    if not has_columns(b):
        if sorted(map(str, columns)) == sorted(map(str, range(len(names)))) and columns != list(range(len(names))):
            hint = "Try `b[sorted(b)]` for the order of the numbers, `b.to_numpy()` for that of the frame."
            raise ValueError(must_be("The columns of b", f"0 to {len(names) - 1} in order", columns[:10], hint))
        return
    if len(columns) != len(names):
        beyond, missing = [c for c in columns if c not in set(names)], [n for n in names if n not in set(columns)]
        got = f"{len(columns)} columns, with {beyond[:5]} beyond them and without {missing[:5]}"
        raise ValueError(must_be("The columns of b", f"the {len(names)} of `get_feature_names_out()`", got, hint))
    for place, (column, name) in enumerate(zip(columns, names, strict=True)):
        if column != name:
            order = ", in this order" if set(columns) == set(names) else ""
            must = f"`get_feature_names_out()`{order}"
            raise ValueError(must_be("The columns of b", must, f"{column!r} for {name!r} at {place}", hint))


def without_names(b: Columned, names: Sequence[str], *, strict: bool) -> Array:
    """Return a frame of the columns ``names`` as an array; one of others is refused where ``strict``, else returned."""
    if strict:
        check_columns(b, names)
    if not has_columns(b) or list(b.columns) != list(names):
        return b
    return check_array(b, dtype=[np.float64, np.float32])


def columns_of(data: object, place: str = "") -> dict[str, list[object]]:
    """Return the columns of each frame of several named columns within data, by its place there."""
    if isinstance(data, Mapping | tuple):
        parts = data.items() if isinstance(data, Mapping) else enumerate(data)
        return {where: found for key, part in parts for where, found in columns_of(part, f"{place}[{key!r}]").items()}
    columns = list(data.columns) if has_columns(data) else []
    return {place: columns} if len(columns) > 1 else {}


def check_inputs(data: object, fitted: Mapping[str, list[object]]) -> None:
    """Raise where a frame within data has other columns than ``fitted``, what ``columns_of`` returned at the fit.

    A module takes its inputs by position, so that columns in another order would pass.
    """
    for place, columns in columns_of(data).items():
        known = fitted.get(place, columns)
        if columns != known:
            order = ", in this order" if set(columns) == set(known) else ""
            must = f"those of the fit, {known[:10]}{order}"
            raise ValueError(must_be(f"The columns of data{place}", must, columns[:10], "Try `X[columns]`."))


def refuse_inputs(b: Array, size: int) -> None:
    """Raise for rows of another width than the parameters', with the way out of a pipeline, which passes inputs."""
    shape = tuple(np.shape(b))
    if len(shape) == 2 and shape[1] != size:
        hint = "Rows are gradients, no inputs. In a pipeline they go to its last step: `pipe[-1].transform(b)`."
        raise ValueError(must_be("b", f"of shape (k, {size})", f"shape {shape}", hint))


def refuse_parameters(b: object) -> None:
    """Raise for a gradient parameter by parameter, as ``torch.autograd.grad`` returns it, in place of rows (k, p)."""
    if scipy.sparse.issparse(b):
        # Told apart later; by keys, it is a mapping too.
        return
    parts = list(b.values()) if isinstance(b, Mapping) else b
    several = parts if isinstance(parts, list | tuple) else ()
    listed = any(isinstance(part, torch.Tensor | np.ndarray) for part in several)
    if isinstance(b, Mapping | Iterator | ValuesView | torch.nn.Module) or (listed and not _is_matrix(several)):
        got = f"a {type(b).__name__}" + (f" of {len(parts)}" if isinstance(parts, Sized) else "")
        hint = "Try `inverter.flatten(...)` of a gradient by parameters, `torch.stack(...)` of whole rows (p,)."
        raise TypeError(must_be("b", "an array or tensor of shape (k, p)", got, hint))


def _is_matrix(parts: Sequence[object]) -> bool:
    """Return whether the parts are arrays (p,) of one length, which scikit-learn takes for rows."""
    shapes = [part.shape for part in parts if isinstance(part, np.ndarray) and part.ndim == 1]
    return len(shapes) == len(parts) and len(set(shapes)) == 1
