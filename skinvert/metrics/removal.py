"""The removal curve: what becomes of the test rows when the rows of the highest scores are removed together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from .._check import check_number, must_be
from .._types import Array
from .checks import check_row_scores
from .measurement import Measurement
from .trainers import Estimator, Train, retraining

__all__ = ["RemovalCurve", "removal_curve"]


class RemovalCurve(NamedTuple):
    """What was measured after each removal: unpacks as ``n_removed, changes``.

    Attributes
    ----------
    n_removed : ndarray of int of shape (n_fractions,)
        How many rows were removed.
    changes : ndarray of shape (n_fractions, n_test)
        Retrained − full, of each test row; ``changes.mean(1)`` is the curve.
    """

    n_removed: np.ndarray
    changes: np.ndarray


def removal_curve(
    scores: Array,
    trainer: Estimator | Train,
    X: Array,
    y: Array,
    X_test: Array,
    y_test: Array,
    *,
    fractions: Iterable[float] = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5),
    measurement: str | Measurement = "loss",
    loss: object = None,
    sample_weight: object = None,
    full: object = None,
    n_jobs: int | None = None,
    verbose: int = 0,
) -> RemovalCurve:
    """Remove the rows of the highest scores, retrain, and measure, for several numbers of rows.

    With the sum of a score matrix over test rows, the more a curve rises the better were the helpful rows found; with
    its negative, the more it falls. The curve of ``baselines.random_scores`` is what any rows would do.

    Parameters
    ----------
    scores : array of shape (n,)
        One per training row; of equal ones the first rows go first.
    trainer, X, y, X_test, y_test, measurement, loss, sample_weight, full, n_jobs, verbose
        As for ``leave_one_out``; every model is trained from the start.
    fractions : iterable of float
        Of the training rows, each in [0, 1).

    Returns
    -------
    RemovalCurve
        ``n_removed`` (n_fractions,) and ``changes`` (n_fractions, n_test).

    Examples
    --------
    The mean of 0, 1 and 5 is 2; without the 5 it is ½, farther from 2 by 1.5.

    >>> from sklearn.linear_model import LinearRegression
    >>> X, y = np.ones((3, 1)), np.array([0.0, 1.0, 5.0])
    >>> model = LinearRegression(fit_intercept=False)
    >>> n_removed, changes = removal_curve(y, model, X, y, X[:1], np.array([2.0]), fractions=[0, 1 / 3])
    >>> n_removed, changes
    (array([0, 1]), array([[0.   ],
                           [1.125]]))
    """
    process = retraining(trainer, X, y, sample_weight, full, warm_start=False)
    n = process.n_samples
    order = np.argsort(-check_row_scores(scores, n), kind="stable")
    sizes = np.array([round(check_number(f, "A fraction", low=0.0, high=1.0) * n) for f in fractions], dtype=np.intp)
    if not len(sizes) or sizes.max() >= n:
        raise ValueError(must_be("fractions", "one or more, each leaving a row", f"{sizes} of {n} rows removed"))
    kept = (_all_but(order[:size], n) for size in sizes)
    before, outcomes = process.measure(
        kept, len(sizes), measurement, loss, (X_test, y_test), n_jobs=n_jobs, verbose=verbose
    )
    return RemovalCurve(sizes, outcomes - before)


def _all_but(removed: np.ndarray, n: int) -> np.ndarray:
    kept = np.ones(n, dtype=bool)
    kept[removed] = False
    return kept
