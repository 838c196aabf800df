"""Training on some of the rows, so that the rest is removed as scores mean it: weight 0, 1/n and penalty unchanged."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from sklearn.base import clone, is_classifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import (
    ElasticNet,
    GammaRegressor,
    HuberRegressor,
    LogisticRegression,
    LogisticRegressionCV,
    Perceptron,
    PoissonRegressor,
    SGDClassifier,
    SGDRegressor,
    TweedieRegressor,
)
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import Pipeline
from sklearn.utils.parallel import Parallel, delayed

from .._check import check_sample_weight, must_be
from .._progress import closing_bars, progress
from .._telling import warn
from .._types import Array
from ..data import as_pair, count, take
from ..models import is_model
from .measurement import Measurement, RowLoss, as_measurement, measured

__all__ = ["Estimator", "Retraining", "Train", "retraining", "warn_of_no_change"]

# (X, y, sample_weight) -> fitted model
Train: TypeAlias = Callable[[Array, Array, np.ndarray], object]

# Their objective is a mean over the rows with the penalty alpha beside it: over fewer rows each row counts more
# against the penalty. Weighted by Σw, or, for SGD, by the rows whatever their weights.
WEIGHTED_MEANS = (PoissonRegressor, GammaRegressor, TweedieRegressor, ElasticNet)
MEANS = (SGDClassifier, SGDRegressor)
# `warm_start` begins at the last solution. (Of forests and boosting it adds trees.)
STARTS = (LogisticRegression, HuberRegressor, Perceptron, MLPClassifier, MLPRegressor, *WEIGHTED_MEANS, *MEANS)


@runtime_checkable
class Estimator(Protocol):
    """What scikit-learn clones and fits."""

    def fit(self, X: Array, y: Array) -> object:
        """Return the fitted model."""

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the settings."""


class Retraining(ABC):
    """A way to train on rows ``kept`` of training data, and the model trained on all of them.

    Attributes
    ----------
    full : model
        Trained on all rows.
    n_samples : int
        n.
    """

    full: object

    def __init__(self, X: Array, y: Array, sample_weight: np.ndarray | None) -> None:
        self.X, self.y, self.sample_weight = X, y, sample_weight
        self.n_samples = count((X, y))[0]

    @abstractmethod
    def on(self, kept: np.ndarray) -> object:
        """Return a model trained on the rows where ``kept`` (n,) is True."""

    def with_all_classes(self, kept: np.ndarray) -> np.ndarray:
        """Return ``kept`` (n,); raise where a model of those rows alone has no loss on rows of a class left out."""
        return kept

    def measure(
        self,
        kept: Iterable[np.ndarray],
        total: int,
        measurement: str | Measurement,
        loss: object,
        test: tuple[Array, Array],
        *,
        n_jobs: int | None,
        verbose: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the measurement of the full model (n_test,), and of each of ``total`` retrained ones, a row each."""
        measure = as_measurement(measurement, loss, self.full, self.X, self.y, self.sample_weight)
        before = measured(measure, self.full, *test)
        if isinstance(measure, RowLoss):
            kept = map(self.with_all_classes, kept)
        jobs = (delayed(_outcome)(self, rows, measure, test) for rows in kept)
        found: Iterator[np.ndarray] = Parallel(n_jobs=n_jobs, return_as="generator")(jobs)
        with closing_bars():
            outcomes = list(progress(found, "retraining", verbose, total))
        return before, np.reshape(outcomes, (total, len(before)))


class _Weighted(Retraining):
    """A callable that is given all rows, and 0 as the weight of those that are removed."""

    def __init__(self, train: Train, X: Array, y: Array, sample_weight: np.ndarray | None, full: object) -> None:
        super().__init__(X, y, sample_weight)
        self.train = train
        self.full = self.on(np.ones(self.n_samples, dtype=bool)) if full is None else full

    def on(self, kept: np.ndarray) -> object:
        weights = kept.astype(np.float64) if self.sample_weight is None else kept * self.sample_weight
        return self.train(self.X, self.y, weights)


class _Dropping(Retraining):
    """An estimator that is fitted to the rows that are kept."""

    def __init__(
        self, estimator: Any, X: Array, y: Array, sample_weight: np.ndarray | None, full: object, warm_start: bool
    ) -> None:
        super().__init__(X, y, sample_weight)
        self.estimator = clone(estimator)
        self.full = self._fitted(clone(estimator), np.ones(self.n_samples, dtype=bool)) if full is None else full
        self.starts = warm_start and type(_last(self.full)) is type(_last(estimator)) and _starts(self.estimator)

    def on(self, kept: np.ndarray) -> object:
        model = clone(self.estimator)
        if self.starts:
            # The trainer's settings and steps: those of the full model may be others, a fitted scaler in place of one.
            settings = {**_last(model).get_params(deep=False), "warm_start": True}
            start = copy.deepcopy(_last(self.full)).set_params(**settings)
            model = model.set_params(**{model.steps[-1][0]: start}) if isinstance(model, Pipeline) else start
        self._keep_penalty(_last(model), kept)
        return self._fitted(model, kept)

    def with_all_classes(self, kept: np.ndarray) -> np.ndarray:
        """Raise where a classifier would not know a class."""
        if not is_classifier(self.estimator):
            return kept
        labels = np.asarray(self.y)
        lost = np.setdiff1d(labels, labels[kept])
        if len(lost):
            hint = "Leave a row of each, or measure what needs no probability of it."
            raise ValueError(must_be("The rows left", "of every class", f"none of {lost.tolist()}", hint))
        return kept

    def _fitted(self, model: Any, kept: np.ndarray) -> object:
        rows = np.flatnonzero(kept)
        X, y = as_pair(take((self.X, self.y), rows))
        weights: dict[str, np.ndarray] = {}
        if self.sample_weight is not None:
            name = f"{model.steps[-1][0]}__sample_weight" if isinstance(model, Pipeline) else "sample_weight"
            weights = {name: self.sample_weight[rows]}
        return model.fit(X, y, **weights)

    def _keep_penalty(self, model: Any, kept: np.ndarray) -> None:
        """Scale a penalty beside a mean as much as the mean's denominator shrinks."""
        if isinstance(model, WEIGHTED_MEANS) and self.sample_weight is not None:
            share = self.sample_weight[kept].sum() / self.sample_weight.sum()
        elif isinstance(model, (*WEIGHTED_MEANS, *MEANS)) or _takes_minibatches(model, int(kept.sum())):
            share = kept.mean()
        else:
            return
        model.set_params(alpha=_last(self.estimator).get_params(deep=False)["alpha"] / share)


def retraining(
    trainer: Estimator | Train, X: Array, y: Array, sample_weight: object, full: object, warm_start: bool
) -> Retraining:
    """Return how to retrain what a user calls a trainer: an estimator to clone and fit, or a callable."""
    weights = check_sample_weight(sample_weight, count((X, y))[0])
    if isinstance(trainer, type):
        raise TypeError(must_be("trainer", "an instance", f"the class {trainer.__name__}"))
    if isinstance(trainer, Estimator):
        return _Dropping(trainer, X, y, weights, full, warm_start)
    if callable(trainer) and not is_model(trainer):
        return _Weighted(trainer, X, y, weights, full)
    must = "an estimator with `fit`, or a callable (X, y, sample_weight) -> fitted model"
    hint = "A torch module does not train itself: write the function that does."
    raise TypeError(must_be("trainer", must, f"a {type(trainer).__name__}", hint))


def warn_of_no_change(changes: np.ndarray, rows: np.ndarray, retraining: Retraining) -> None:
    """Warn where a retraining without one of ``rows`` ended where it began, at the solution for all: by its tolerance.

    Without a row of weight 0 that is where it should end.
    """
    weights = retraining.sample_weight
    counts = np.ones(len(rows), dtype=bool) if weights is None else weights[rows] > 0
    still = int((counts & (changes == 0).all(axis=1)).sum())
    if still and isinstance(retraining, _Dropping) and retraining.starts:
        message = (
            f"{still} of {len(changes)} retrainings ended where they began, at the solution for all rows: the "
            "estimator's tolerance is above what a row changes. Try a smaller `tol`, 1e-10 say, and a larger "
            "`max_iter`."
        )
        warn(message, ConvergenceWarning)


def _outcome(
    retraining: Retraining, kept: np.ndarray, measurement: Measurement, test: tuple[Array, Array]
) -> np.ndarray:
    return measured(measurement, retraining.on(kept), *test)


def _last(model: Any) -> Any:
    return model.steps[-1][1] if isinstance(model, Pipeline) else model


def _starts(estimator: object) -> bool:
    last = _last(estimator)
    return isinstance(last, STARTS) and not isinstance(last, LogisticRegressionCV)


def _takes_minibatches(model: object, n_kept: int) -> bool:
    """Return whether it is a perceptron whose penalty stands beside the mean of a minibatch of a fixed size."""
    if not isinstance(model, MLPClassifier | MLPRegressor) or model.solver == "lbfgs":
        return False
    return n_kept > (200 if model.batch_size == "auto" else model.batch_size)
