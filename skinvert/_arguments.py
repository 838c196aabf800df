"""What ``fit`` was given, told where it is none of its forms: a model with data, or plain rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch.utils.data import DataLoader, Dataset

from ._validation import must_be
from .methods.base import Method
from .models import as_model, is_model
from .results import InversionMethod

__all__ = ["check_fit_arguments", "check_method"]

FIRST = "The first argument of fit"


def check_method(method: Any) -> None:
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


def check_fit_arguments(X: Any, y: Any, model: Any) -> None:
    """Raise where ``fit(X, y)`` is neither ``fit(model, data)`` nor, with or without ``model``, rows and targets."""
    if is_model(X):
        return
    if is_model(y):
        got = f"a {type(X).__name__}, and the model second"
        raise TypeError(must_be(FIRST, "the model", got, "Try `fit(model, (X, y))`."))
    if callable(X) and not hasattr(X, "__array__"):
        # Which says what a model is.
        as_model(X)
    if model is not None:
        return
    # A sparse matrix by keys is a mapping too.
    if _is_data(y) or (isinstance(X, Mapping | str | bytes) and not scipy.sparse.issparse(X)):
        as_model(X)
    if _is_data(X):
        hint = "Try `fit(model, data)`, or `HessianInverter(model=model).fit(X, y)`."
        raise TypeError(must_be(FIRST, "a model, or plain rows (n, p)", f"data, a {type(X).__name__}", hint))


def _is_data(value: Any) -> bool:
    """Return whether ``value`` is data for a model, which no plain rows or targets could be."""
    if isinstance(value, tuple):
        return any(isinstance(part, np.ndarray | torch.Tensor | Mapping) or hasattr(part, "iloc") for part in value)
    return isinstance(value, DataLoader | Dataset | Iterator)
