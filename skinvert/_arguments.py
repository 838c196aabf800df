"""What ``fit`` and ``path`` were given, told where it is none of their forms: a model with data, plain rows, many λ."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping
from typing import Protocol, runtime_checkable

import numpy as np
import scipy.sparse

from ._check import check_hessian_perturbation, must_be
from .data import is_data
from .methods.base import Method
from .models import as_model, is_model
from .results import InversionMethod

__all__ = ["check_fit_arguments", "check_fits_rows", "check_method", "check_shifts", "refuse_model_settings"]

FIRST = "The first argument of fit"


@runtime_checkable
class _Array(Protocol):
    """What NumPy makes an array of."""

    def __array__(self) -> np.ndarray: ...


def check_method(method: object) -> None:
    """Raise unless ``method`` is a name or a ``Method``; a model in its place is told where it goes."""
    if isinstance(method, str | InversionMethod | Method):
        return
    hint, got = "", repr(method)
    if isinstance(method, type) and issubclass(method, Method):
        hint = f"Try an instance of it: `{method.__name__}()`."
    elif is_model(method):
        got = f"a model, a {type(method).__name__}"
        hint = "A model goes with its data: try `HessianInverter(loss=...).fit(model, data)`."
    raise TypeError(must_be("method", "a registered name or a Method instance", got, hint))


def check_fit_arguments(X: object, y: object, model: object) -> None:
    """Raise where ``fit(X, y)`` is neither ``fit(model, data)`` nor, with or without ``model``, rows and targets."""
    if is_model(X):
        return
    if is_model(y):
        got = f"a {type(X).__name__}, and the model second"
        raise TypeError(must_be(FIRST, "the model", got, "Try `fit(model, (X, y))`."))
    if callable(X) and not isinstance(X, _Array):
        # Which says what a model is.
        as_model(X)
    if model is not None:
        return
    # A sparse matrix by keys is a mapping too.
    if is_data(y) or (isinstance(X, Mapping | str | bytes) and not scipy.sparse.issparse(X)):
        as_model(X)
    if is_data(X):
        hint = "Try `fit(model, data)`, or `HessianInverter(model=model).fit(X, y)`."
        raise TypeError(must_be(FIRST, "a model, or plain rows (n, p)", f"data, a {type(X).__name__}", hint))


def refuse_model_settings(loss: object, weight_decay: object, params: object) -> None:
    """Raise where rows that came with targets have settings of a model, which is missing then."""
    for name, given, default in (("loss", loss, None), ("weight_decay", weight_decay, 0.0), ("params", params, None)):
        if given is not None and given != default:
            hint = "They have no model: is `model=` missing?"
            raise ValueError(must_be(f"{name} for plain rows", repr(default), repr(given), hint))


def check_fits_rows(X: object, model: object) -> None:
    """Raise where ``fit_transform`` is given a model: its inputs are no right-hand sides."""
    if model is not None or is_model(X):
        hint = "Try `fit(X, y)`, then `transform(PerSampleGradient(model, loss=...).fit_transform(X, y))`."
        raise TypeError(must_be("fit_transform", "called on plain rows", "a model", hint))


def check_shifts(hessian_perturbations: Iterable[float]) -> list[float]:
    """Return several λ, each checked; a single one in their place is told so."""
    if isinstance(hessian_perturbations, numbers.Number | str):
        hint = "Try a list of them."
        raise TypeError(must_be("hessian_perturbations", "several λ", repr(hessian_perturbations), hint))
    return [check_hessian_perturbation(shift, "path") for shift in hessian_perturbations]
