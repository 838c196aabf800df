"""Leave-one-out by retraining: what the removal of a row does, as scores predict it."""

from __future__ import annotations

import numpy as np
from sklearn.utils import column_or_1d

from .._check import must_be
from .._types import Array
from .measurement import Measurement
from .trainers import Estimator, Train, retraining, warn_of_no_change

__all__ = ["leave_one_out"]


def leave_one_out(
    trainer: Estimator | Train,
    X: Array,
    y: Array,
    X_test: Array,
    y_test: Array,
    *,
    rows: Array = None,
    measurement: str | Measurement = "loss",
    loss: object = None,
    sample_weight: object = None,
    full: object = None,
    warm_start: bool = True,
    n_jobs: int | None = None,
    verbose: int = 0,
) -> np.ndarray:
    r"""Return by how much a measurement of each test row changes when the model is trained without each training row.

    *Without* row j is what influence functions predict: its weight is 0, with 1/n and the penalty unchanged, so that
    the model minimises (1/n) Σ_{i≠j} ℓᵢ + penalty. Entry (i, j) is retrained − full: positive where the removal raises
    the loss, that is, where row j helps.

    Parameters
    ----------
    trainer : estimator or callable
        A scikit-learn estimator is cloned and fitted to the other rows. That is the removal above where the objective
        is a sum at a fixed penalty (``LogisticRegression`` and ``SVC`` at fixed ``C``, ``Ridge``, ``MLPClassifier``
        with ``lbfgs``). Where it is a mean beside a penalty (``PoissonRegressor``, ``GammaRegressor``,
        ``TweedieRegressor``, ``SGDClassifier``, ``ElasticNet``, perceptrons on minibatches) ``alpha`` grows by n / (n −
        1), so that it is that too. Of other estimators, and of those within a search, this is known only if their
        objective is a sum. All steps of a pipeline are refitted: put a fitted one that scores take as given
        into a ``FrozenEstimator``. Class weights "balanced" follow the rows that are left.

        A callable ``train(X, y, sample_weight)`` returns a fitted model: a module, say. It is given all rows, with
        weight 0 on those removed, and should minimise Σ wᵢℓᵢ / n + penalty with n = ``len(X)``. An average by Σ wᵢ
        keeps 1/n no more than a fit to fewer rows does: its penalty then counts (n − 1)/n as much as it should.
    X, y : array, tensor, frame or sparse matrix of shape (n, ...), and targets of shape (n, ...)
        The training rows.
    X_test, y_test : array, tensor, frame or sparse matrix of shape (n_test, ...), and targets of shape (n_test, ...)
        The test rows.
    rows : array of int of shape (n_rows,), default=None
        Which rows to leave out, each alone; None is every one.
    measurement : "loss" or callable, default="loss"
        ``"loss"`` is each row's own (see ``RowLoss``); or ``measurement(model, X_test, y_test)`` → (n_test,).
    loss : str, torch loss module, Loss or callable, default=None
        Of a bare module, as for ``HessianInverter``.
    sample_weight : array of shape (n,), default=None
        Weights of the full fit.
    full : fitted model, default=None
        Trained on all rows, the one that the scores are of; None trains it.
    warm_start : bool, default=True
        Begin at the full model, where the estimator has a ``warm_start`` that means so (not forests). Solvers stop by
        their tolerance: ``tol`` must be far below what one row does to the gradient, 1e-8 say. A model with many minima
        stays near the full one's.
    n_jobs : int, default=None
        Retrainings at once, as joblib counts them.
    verbose : int, default=0
        1 shows a progress bar.

    Returns
    -------
    ndarray of shape (n_test, n_rows)
        The changes, in float64.

    Warns
    -----
    ConvergenceWarning
        Where retrainings ended where they began.

    Examples
    --------
    The mean of the other rows, and the change of ½(y − mean)² from 0:

    >>> from sklearn.linear_model import LinearRegression
    >>> X, y = np.ones((3, 1)), np.array([0.0, 1.0, 2.0])
    >>> leave_one_out(LinearRegression(fit_intercept=False), X, y, X[:1], np.array([1.0]))
    array([[0.125, 0.   , 0.125]])
    """
    process = retraining(trainer, X, y, sample_weight, full, warm_start)
    chosen = _check_rows(rows, process.n_samples)
    everyone = np.arange(process.n_samples)
    before, outcomes = process.measure(
        (everyone != row for row in chosen),
        len(chosen),
        measurement,
        loss,
        (X_test, y_test),
        n_jobs=n_jobs,
        verbose=verbose,
    )
    warn_of_no_change(outcomes - before, chosen, process)
    return (outcomes - before).T


def _check_rows(rows: Array, n_samples: int) -> np.ndarray:
    if rows is None:
        return np.arange(n_samples)
    chosen: np.ndarray = column_or_1d(rows)
    if len(chosen) and chosen.dtype.kind not in "iu":
        raise TypeError(must_be("rows", "indices of training rows", f"dtype {chosen.dtype}"))
    if not len(chosen) or chosen.min() < 0 or chosen.max() >= n_samples:
        got = f"{chosen.min()} to {chosen.max()}" if len(chosen) else "none"
        raise ValueError(must_be("rows", f"one or more in the range [0, {n_samples - 1}]", got))
    return chosen
