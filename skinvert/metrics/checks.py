"""Scores as they are given: one number a training row, or one row of them for each test row."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.utils import check_array

from .._check import must_be
from .._types import Array

__all__ = ["check_row_scores", "check_scores"]


def check_scores(scores: Array, n_test: int, n_train: int) -> np.ndarray:
    """Return scores (n_test, n_train) in float64; those of shape (n_train,) serve every test row."""
    array = check_array(_array(scores), dtype=np.float64, ensure_2d=False, input_name="scores")
    if array.shape == (n_train,):
        array = np.broadcast_to(array, (n_test, n_train))
    if array.shape != (n_test, n_train):
        must = f"of shape ({n_test}, {n_train}), test rows by training rows, or ({n_train},)"
        raise ValueError(must_be("scores", must, f"shape {array.shape}"))
    return array


def check_row_scores(scores: Array, n: int) -> np.ndarray:
    """Return scores (n,) in float64, one per training row."""
    array: np.ndarray = check_array(_array(scores), dtype=np.float64, ensure_2d=False, input_name="scores")
    if array.shape != (n,):
        hint = "Of a matrix of scores try the sum over its test rows, or its diagonal." if array.ndim == 2 else ""
        raise ValueError(must_be("scores", f"of shape ({n},), one per training row", f"shape {array.shape}", hint))
    return array


def _array(scores: Array) -> Array:
    return scores.detach().cpu().numpy() if isinstance(scores, torch.Tensor) else scores
