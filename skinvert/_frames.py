"""Data frames: whose rows they are, whose columns, and right-hand sides that are no rows at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized, ValuesView
from typing import Any, Protocol, TypeGuard, runtime_checkable

import numpy as np
import scipy.sparse
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils import check_array

from ._types import Array
from ._validation import must_be

__all__ = [
    "Frame",
    "RowTransformer",
    "check_columns",
    "has_columns",
    "refuse_inputs",
    "refuse_parameters",
    "rows_of",
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
class _Named(Protocol):
    """What frames of any library have: names of columns."""

    columns: Sequence[object]


class RowTransformer(TransformerMixin, BaseEstimator):
    """A transformer whose output belongs to the rows of a part of its input, ``(X, y)`` say.

    scikit-learn's ``set_output`` gives an output frame the index of the input where that is a frame: ``transform`` here
    is wrapped by it as if the rows alone had been the input.
    """

    def transform(self, rows: Array, output: Array) -> Array:
        """Return ``output``, in a container where one is set, with the index of ``rows``."""
        return output


def rows_of(data: object) -> object:
    """Return the part of ``(X, y)`` or of a mapping that has the rows' index, or ``data``."""
    parts: Iterable[object] = data.values() if isinstance(data, Mapping) else data if isinstance(data, tuple) else ()
    found = (rows_of(part) for part in parts)
    return next((part for part in found if isinstance(part, Frame)), data)


def has_columns(b: object) -> TypeGuard[_Named]:
    """Return whether ``b`` is a frame whose columns have names."""
    columns = b.columns if isinstance(b, _Named) else ()
    return len(columns) > 0 and all(isinstance(name, str) for name in columns)


def check_columns(b: object, names: Sequence[str]) -> None:
    """Raise where ``b`` is a frame whose named columns are not ``names`` in their order; their number is told apart."""
    if not has_columns(b) or len(b.columns) != len(names):
        return
    columns = list(b.columns)
    for place, (column, name) in enumerate(zip(columns, names, strict=True)):
        if column != name:
            order = ", in this order" if set(columns) == set(names) else ""
            hint = "Try `b[list(inverter.get_feature_names_out())]`, or `b.to_numpy()` to go by position."
            must = f"`get_feature_names_out()`{order}"
            raise ValueError(must_be("The columns of b", must, f"{column!r} for {name!r} at {place}", hint))


def without_names(b: _Named, names: Sequence[str], *, strict: bool) -> Array:
    """Return a frame of the columns ``names`` as an array; one of others is refused where ``strict``, else returned."""
    if strict:
        check_columns(b, names)
    elif list(b.columns) != list(names):
        return b
    return check_array(b, dtype=[np.float64, np.float32])


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
