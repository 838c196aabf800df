"""The linear datamodeling score: how well sums of scores rank the outcomes of training on random subsets."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from sklearn.utils import check_array, check_random_state

from .._check import check_number, must_be
from .._types import Array, RandomState
from .checks import check_scores
from .measurement import Measurement
from .ranks import Ranked, spearman
from .trainers import Estimator, Train, retraining

__all__ = ["DatamodelingScore", "Retrainings", "linear_datamodeling_score", "retrain_subsets"]


class Retrainings(NamedTuple):
    """Models trained on random subsets, as measured: unpacks as ``subsets, outcomes``.

    Attributes
    ----------
    subsets : ndarray of bool of shape (n_subsets, n_train)
        Which training rows each model saw.
    outcomes : ndarray of shape (n_subsets, n_test)
        What was measured of it on each test row.
    """

    subsets: np.ndarray
    outcomes: np.ndarray


@dataclass(frozen=True)
class DatamodelingScore:
    """The linear datamodeling score, with what a bootstrap says of it.

    Attributes
    ----------
    mean : float
        The score: the mean of ``per_row``, in [-1, 1].
    per_row : ndarray of shape (n_test,)
        Spearman's correlation of each test row; NaN where all outcomes of a row are equal.
    interval : tuple of float
        Of the mean.
    difference : float or None
        The mean less that of ``compare``.
    difference_interval : tuple of float or None
        Of the difference, from the same resamples for both.
    """

    mean: float
    per_row: np.ndarray
    interval: tuple[float, float]
    difference: float | None = None
    difference_interval: tuple[float, float] | None = None


def retrain_subsets(
    trainer: Estimator | Train,
    X: Array,
    y: Array,
    X_test: Array,
    y_test: Array,
    *,
    n_subsets: int = 100,
    fraction: float = 0.5,
    measurement: str | Measurement = "loss",
    loss: object = None,
    sample_weight: object = None,
    full: object = None,
    random_state: RandomState = None,
    n_jobs: int | None = None,
    verbose: int = 0,
) -> Retrainings:
    """Train on random subsets of the training rows and measure each model on each test row.

    The retrainings serve any number of score matrices: see ``linear_datamodeling_score``. The rows outside a subset are
    removed as in ``leave_one_out``, with 1/n and the penalty unchanged. Every model is trained from the start: one that
    began at the full model would know the rows that it must not see.

    Parameters
    ----------
    trainer, X, y, X_test, y_test, measurement, loss, sample_weight
        As for ``leave_one_out``. Of a trainer that draws, such as one of networks from random weights, outcomes that
        are averaged over several models a subset are less noisy: let a callable return them, and ``measurement``
        average.
    n_subsets : int, default=100
        How many.
    fraction : float, default=0.5
        Of the training rows that a subset has, in (0, 1); drawn without replacement, all subsets of one size.
    full : fitted model, default=None
        Trained on all rows; only the scale of ``"loss"`` is taken from it. None trains it.
    random_state : int, RandomState or None, default=None
        Draws the subsets.
    n_jobs : int, default=None
        Retrainings at once, as joblib counts them.
    verbose : int, default=0
        1 shows a progress bar.

    Returns
    -------
    Retrainings
        ``subsets`` (n_subsets, n_train) and ``outcomes`` (n_subsets, n_test).

    Examples
    --------
    >>> from sklearn.linear_model import LinearRegression
    >>> X, y = np.ones((4, 1)), np.array([0.0, 1.0, 2.0, 3.0])
    >>> model = LinearRegression(fit_intercept=False)  # of the mean
    >>> subsets, outcomes = retrain_subsets(model, X, y, X[:1], y[:1], n_subsets=2, random_state=0)
    >>> np.allclose(outcomes[:, 0], 0.5 * (subsets @ y / 2) ** 2)
    True
    """
    check_number(n_subsets, "n_subsets", low=1, integer=True)
    process = retraining(trainer, X, y, sample_weight, full, warm_start=False)
    n = process.n_samples
    size = round(check_number(fraction, "fraction", low=0.0, high=1.0) * n)
    if not 0 < size < n:
        raise ValueError(must_be("fraction", f"such that a subset has 1 to {n - 1} of {n} rows", fraction))
    generator = check_random_state(random_state)
    subsets = np.zeros((n_subsets, n), dtype=bool)
    for subset in subsets:
        subset[generator.permutation(n)[:size]] = True
    _, outcomes = process.measure(
        subsets, n_subsets, measurement, loss, (X_test, y_test), n_jobs=n_jobs, verbose=verbose
    )
    return Retrainings(subsets, outcomes)


def linear_datamodeling_score(
    scores: Array,
    subsets: Array,
    outcomes: Array,
    *,
    compare: Array = None,
    resample: str = "both",
    n_bootstraps: int = 1000,
    confidence_level: float = 0.95,
    random_state: RandomState = None,
) -> DatamodelingScore:
    r"""Return how well sums of scores rank the outcomes of training on subsets.

    Entry (i, j) of the scores predicts the change of test row i's measurement when training row j is removed, so that
    subset S is predicted to have −Σ_{j∈S} s_ij, up to a constant of i. The score is the mean over the test rows of
    Spearman's correlation, over the subsets, of that with the outcomes: positive for scores that are of use.

    Parameters
    ----------
    scores : array of shape (n_test, n_train) or (n_train,)
        One row serves every test row.
    subsets : array of bool of shape (n_subsets, n_train)
        As ``retrain_subsets`` returns them.
    outcomes : array of shape (n_subsets, n_test)
        As ``retrain_subsets`` returns them.
    compare : array of shape (n_test, n_train) or (n_train,), default=None
        Other scores, to which the difference is returned: the bootstrap is paired.
    resample : {"both", "rows", "subsets"}, default="both"
        What the bootstrap draws again: test rows, subsets, or both. The test rows share the subsets, so that rows alone
        make an interval for these retrainings only. Both together are on the safe side: noise that a row and a subset
        have of their own counts up to three times in the variance.
    n_bootstraps : int, default=1000
        How often.
    confidence_level : float, default=0.95
        Of the intervals: percentiles of the bootstrap, moved so that its mean is the score. They are of the score over
        as many subsets and test rows; over more subsets it is a little higher, as rank correlations are.
    random_state : int, RandomState or None, default=None
        Of the bootstrap.

    Returns
    -------
    DatamodelingScore
        ``mean``, ``per_row``, ``interval``, ``difference``, ``difference_interval``.

    References
    ----------
    Park, Georgiev, Ilyas, Leclerc & Madry (2023), "TRAK: Attributing model behavior at scale", section 2;
    Owen (2007), "The pigeonhole bootstrap", for the bootstrap of rows and columns together.

    Examples
    --------
    Outcomes that are the sum of what each row takes off the loss:

    >>> rng = np.random.default_rng(0)
    >>> scores, subsets = rng.standard_normal((3, 8)), rng.random((20, 8)) < 0.5
    >>> linear_datamodeling_score(scores, subsets, -(subsets @ scores.T)).mean
    1.0
    >>> linear_datamodeling_score(-scores, subsets, -(subsets @ scores.T), compare=scores).difference
    -2.0
    """
    if resample not in ("both", "rows", "subsets"):
        raise ValueError(must_be("resample", '"both", "rows" or "subsets"', repr(resample)))
    check_number(n_bootstraps, "n_bootstraps", low=1, integer=True)
    level = check_number(confidence_level, "confidence_level", low=0.0, high=1.0)
    subsets, outcomes = _check_retrainings(subsets, outcomes)
    actual = Ranked(outcomes.T)
    given = [scores] if compare is None else [scores, compare]
    predicted = [_predicted(matrix, subsets, outcomes.shape[1]) for matrix in given]
    per_row = [spearman(each, actual) for each in predicted]
    if np.isnan(per_row[0]).all():
        raise ValueError(must_be("The outcomes", "different between subsets for some test row", "constant ones"))
    generator = check_random_state(random_state)
    means = np.array([_resampled(predicted, actual, resample, generator) for _ in range(n_bootstraps)])
    found = [float(np.nanmean(row)) for row in per_row]
    interval = _interval(means[:, 0], found[0], level)
    if compare is None:
        return DatamodelingScore(found[0], per_row[0], interval)
    difference = found[0] - found[1]
    other = _interval(means[:, 0] - means[:, 1], difference, level)
    return DatamodelingScore(found[0], per_row[0], interval, difference, other)


def _check_retrainings(subsets: Array, outcomes: Array) -> tuple[np.ndarray, np.ndarray]:
    subsets = check_array(subsets, dtype=None, input_name="subsets")
    outcomes = check_array(outcomes, dtype=np.float64, ensure_min_samples=2, input_name="outcomes")
    if subsets.dtype != bool and not np.isin(subsets, (0, 1)).all():
        hint = "Row s says of each training row whether model s saw it."
        raise ValueError(must_be("subsets", "of booleans", f"dtype {subsets.dtype}", hint))
    if len(subsets) != len(outcomes):
        raise ValueError(must_be("outcomes", f"of {len(subsets)} rows, one per subset", len(outcomes)))
    return subsets.astype(np.float64), outcomes


def _predicted(scores: Array, subsets: np.ndarray, n_test: int) -> Ranked:
    scores = check_scores(scores, n_test, subsets.shape[1])
    # Scores are of removal: a row in the subset takes its score off.
    return Ranked(-scores @ subsets.T)


def _resampled(predicted: list[Ranked], actual: Ranked, resample: str, generator: np.random.RandomState) -> list[float]:
    """Return the mean correlation of each prediction in one bootstrap sample."""
    t, m = actual.levels.shape
    columns = np.ones(m) if resample == "rows" else np.bincount(generator.randint(m, size=m), minlength=m)
    rows = np.arange(t) if resample == "subsets" else generator.randint(t, size=t)
    with warnings.catch_warnings():
        # A resample whose outcomes are all equal says nothing, and is left out.
        warnings.simplefilter("ignore", RuntimeWarning)
        return [float(np.nanmean(spearman(each, actual, columns.astype(np.float64))[rows])) for each in predicted]


def _interval(values: np.ndarray, found: float, level: float) -> tuple[float, float]:
    """Return the percentiles of a bootstrap about what was found.

    A resample repeats subsets, which lowers a rank correlation near 1 by more than its spread.
    """
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2]) - np.nanmean(values) + found
    return float(low), float(high)
