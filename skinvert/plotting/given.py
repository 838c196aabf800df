"""What displays are given: numbers of any kind of array, and what they ask of an influence function."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from sklearn.utils import check_array

from .._check import must_be
from .._types import Array
from ..inverter import HessianInverter

__all__ = ["Influence", "TopRows", "check_same_shape", "finite", "plain"]


class TopRows(Protocol):
    """What ``top`` returns."""

    @property
    def rows(self) -> Array:
        """Training rows (n_test, k)."""

    @property
    def scores(self) -> Array:
        """What removing each of them does (n_test, k)."""


class Influence(Protocol):
    """A fitted ``InfluenceFunction``, whose room imports this one."""

    inverter_: HessianInverter
    n_samples_: int
    index_: np.ndarray

    @property
    def measurement(self) -> object:
        """What is measured on test rows."""

    def transform(self, X: object, y: object = None) -> Array:
        """Return scores (n_test, n_train)."""

    def self_influence(self) -> Array:
        """Return the diagonal (n_train,) of the training rows' scores."""

    def _largest(self, data: object, k: int, harmful: bool) -> TopRows:
        """Return the k rows that help or harm most, by their places."""


def plain(values: Array) -> Array:
    """Return an array of a tensor; else what was given."""
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else values


def finite(values: Array, name: str) -> np.ndarray:
    """Return finite numbers in float64, whatever their shape."""
    found: np.ndarray = check_array(
        plain(values), dtype=np.float64, ensure_2d=False, allow_nd=True, input_name=name, ensure_min_samples=1
    )
    return found


def check_same_shape(a: np.ndarray, b: np.ndarray, names: tuple[str, str]) -> None:
    """Raise unless both have one shape."""
    if a.shape != b.shape:
        raise ValueError(must_be(names[0], f"of the shape of {names[1]}, {b.shape}", f"shape {a.shape}"))
