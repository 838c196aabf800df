"""Data frames: whose rows they are, whose columns, and right-hand sides that are no rows at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, ValuesView
from typing import Any

import numpy as np
import scipy.sparse
import torch
from sklearn.base import BaseEstimator, TransformerMixin

from ._validation import must_be

__all__ = [
    "RowTransformer",
    "check_columns",
    "check_inputs",
    "columns_of",
    "has_columns",
    "refuse_parameters",
    "rows_of",
]


class RowTransformer(TransformerMixin, BaseEstimator):
    """A transformer whose output belongs to the rows of a part of its input, ``(X, y)`` say.

    scikit-learn's ``set_output`` gives an output frame the index of the input where that is a frame: ``transform`` here
    is wrapped by it as if the rows alone had been the input.
    """

    def transform(self, rows: Any, output: Any) -> Any:
        """Return ``output``, in a container where one is set, with the index of ``rows``."""
        return output


def rows_of(data: Any) -> Any:
    """Return the part of ``(X, y)`` or of a mapping that has the rows' index, or ``data``."""
    parts: Iterable[Any] = data.values() if isinstance(data, Mapping) else data if isinstance(data, tuple) else ()
    found = (rows_of(part) for part in parts)
    return next((part for part in found if hasattr(part, "index") and hasattr(part, "iloc")), data)


def has_columns(b: Any) -> bool:
    """Return whether ``b`` is a frame whose columns have names, or some of them."""
    return any(isinstance(name, str) for name in getattr(b, "columns", ()))


def check_columns(b: Any, names: Sequence[str]) -> None:
    """Raise where ``b`` is a frame whose columns are not ``names`` in their order, or are 0 to p − 1 in another."""
    columns = list(getattr(b, "columns", ()))
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


def columns_of(data: Any, place: str = "") -> dict[str, list[str]]:
    """Return the columns of each frame of several named columns within data, by its place there."""
    if isinstance(data, Mapping | tuple):
        parts = data.items() if isinstance(data, Mapping) else enumerate(data)
        return {where: found for key, part in parts for where, found in columns_of(part, f"{place}[{key!r}]").items()}
    columns = list(data.columns) if hasattr(data, "iloc") and has_columns(data) else []
    return {place: columns} if len(columns) > 1 else {}


def check_inputs(data: Any, fitted: Mapping[str, list[str]]) -> None:
    """Raise where a frame within data has other columns than ``fitted``, what ``columns_of`` returned at the fit.

    A module takes its inputs by position, so that columns in another order would pass.
    """
    for place, columns in columns_of(data).items():
        known = fitted.get(place, columns)
        if columns != known:
            order = ", in this order" if set(columns) == set(known) else ""
            must = f"those of the fit, {known[:10]}{order}"
            raise ValueError(must_be(f"The columns of data{place}", must, columns[:10], "Try `X[columns]`."))


def refuse_parameters(b: Any) -> None:
    """Raise for a gradient parameter by parameter, as ``torch.autograd.grad`` returns it, in place of rows (k, p)."""
    if scipy.sparse.issparse(b):
        # Told apart later; by keys, it is a mapping too.
        return
    parts = list(b.values()) if isinstance(b, Mapping) else b
    listed = isinstance(parts, list | tuple) and any(isinstance(part, torch.Tensor | np.ndarray) for part in parts)
    if isinstance(b, Mapping | Iterator | ValuesView | torch.nn.Module) or (listed and not _is_matrix(parts)):
        got = f"a {type(b).__name__}" + (f" of {len(parts)}" if hasattr(parts, "__len__") else "")
        hint = "Try `inverter.flatten(...)` of a gradient by parameters, `torch.stack(...)` of whole rows (p,)."
        raise TypeError(must_be("b", "an array or tensor of shape (k, p)", got, hint))


def _is_matrix(parts: Sequence[Any]) -> bool:
    """Return whether the parts are arrays (p,) of one length, which scikit-learn takes for rows."""
    return all(isinstance(part, np.ndarray) and part.ndim == 1 and part.shape == parts[0].shape for part in parts)
