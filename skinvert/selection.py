"""λ by cross-validation: one factorisation a fold serves every λ."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.linalg
import scipy.stats
import sklearn
import torch
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import check_cv
from sklearn.pipeline import Pipeline
from sklearn.utils import check_consistent_length
from sklearn.utils.metadata_routing import MetadataRequest
from sklearn.utils.validation import validate_data
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler, Subset

from ._arguments import check_fit_arguments, check_method
from ._autograd import ordinary
from ._fitting import fit_whole
from ._progress import progress
from ._validation import check_hessian_perturbation, check_sample_weight, check_shift, must_be
from .gradients import PerSampleGradient
from .inverter import HessianInverter, as_data
from .models import SklearnTwiceDifferentiable, as_model, is_model
from .scores import quadratic_path, quadratic_score

__all__ = ["HessianInverterCV", "make_quadratic_scorer"]

# Settings that HessianInverter does not have.
OWN = ("hessian_perturbations", "cv", "scoring")


class _QuadraticScorer:
    """The held-out quadratic of right-hand sides B; a class, so that it can be pickled."""

    def __init__(self, rhs: Any) -> None:
        self.rhs = rhs
        self._request = MetadataRequest(owner=repr(self))
        self._request.score.add_request(param="sample_weight", alias=None)

    def set_score_request(self, *, sample_weight: bool | str | None = None) -> _QuadraticScorer:
        """Say whether a search passes ``sample_weight`` on, as for scikit-learn's own scorers."""
        if not sklearn.get_config()["enable_metadata_routing"]:
            hint = "Try `sklearn.set_config(enable_metadata_routing=True)`."
            raise RuntimeError(must_be("Metadata routing", "enabled for set_score_request", "disabled", hint))
        self._request.score.add_request(param="sample_weight", alias=sample_weight)
        return self

    def get_metadata_routing(self) -> MetadataRequest:
        """Return what the scorer requests."""
        return self._request

    def _accept_sample_weight(self) -> bool:
        # What a search over several scorers asks each of them, where metadata are not routed.
        return True

    @ordinary
    def __call__(self, estimator: Any, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        # A search inside another.
        estimator = getattr(estimator, "best_estimator_", estimator)
        if isinstance(estimator, Pipeline):
            (X, y), estimator = _through(estimator[:-1], X, y), estimator[-1]
        if not isinstance(estimator, HessianInverter):
            must = "a HessianInverter, or a pipeline that ends in one"
            raise TypeError(must_be("The estimator to score", must, f"a {type(estimator).__name__}"))
        if self.rhs is None:
            return estimator.score(X, y, sample_weight)
        inverse = estimator._factorised("score")
        return quadratic_score(inverse, estimator._held_out(X, y, sample_weight), estimator._rows(self.rhs).tensor)

    @ordinary
    def path(self, inverter: HessianInverter, shifts: Sequence[float], test: tuple[Any, ...]) -> list[float]:
        """Return the score at each λ, on the held-out ``(X, y, sample_weight)``, from one factorisation."""
        rhs = None if self.rhs is None else inverter._rows(self.rhs).tensor
        return quadratic_path(inverter._factorised("score"), shifts, inverter._held_out(*test), rhs)

    def __repr__(self) -> str:
        got = "" if self.rhs is None else f"rhs=<{type(self.rhs).__name__} of shape {tuple(self.rhs.shape)}>"
        return f"make_quadratic_scorer({got})"


def make_quadratic_scorer(rhs: Any = None) -> Any:
    r"""Return a scorer of inverters by the held-out quadratic of one's own right-hand sides, test gradients say.

    mean_b[ bᵀz − ½ zᵀ(H̄ + R)z ], with z the fitted inverse applied to b, H̄ the held-out rows' mean GGN (or the
    inverter's own curvature where that is positive semi-definite by construction) and R the penalty's Hessian: up to a
    constant −½ the squared error of z in the norm of H̄ + R. The rows of B are none of the held-out ones, so no row's
    own curvature is left out. −inf, with a warning, where A is not positive definite.

    Parameters
    ----------
    rhs : array or tensor of shape (k, p), default=None
        B, one right-hand side per row. None is ``HessianInverter.score``: the held-out rows' own gradients.

    Returns
    -------
    callable
        ``scorer(estimator, X, y=None, sample_weight=None)``, for ``scoring=`` of ``HessianInverterCV`` and of
        scikit-learn's searches. It scores pipelines too, ``PerSampleGradient`` with its targets among their steps. With
        scikit-learn's metadata routing, ``set_score_request(sample_weight=True)`` asks a search for the weights.

    Examples
    --------
    At the exact inverse it is ½ bᵀA⁻¹b.

    >>> inverter = HessianInverter("direct").fit(np.eye(2))
    >>> make_quadratic_scorer(np.array([[1.0, 2.0]]))(inverter, np.eye(2))
    5.0
    """
    if rhs is not None and (getattr(rhs, "ndim", None) != 2 or not len(rhs)):
        got = f"shape {tuple(rhs.shape)}" if hasattr(rhs, "shape") else type(rhs).__name__
        raise ValueError(must_be("rhs", "an array or tensor of shape (k, p), k ≥ 1", got, "One row per b."))
    return _QuadraticScorer(rhs)


class HessianInverterCV(HessianInverter):
    r"""A ``HessianInverter`` that chooses λ by cross-validation, then fits on all rows.

    As ``GridSearchCV`` over ``hessian_perturbation``, but the curvature of a fold is assembled and factorised once for
    every λ, and the held-out rows' gradients and curvature are computed once.

    Parameters
    ----------
    hessian_perturbations : iterable of float, default=(1e-6, 1e-5, ..., 1e2)
        λ ≥ 0 to choose from, on the scale of the mean loss.
    cv : int, splitter or iterable of (train, test), default=5
        Folds of rows; an int takes consecutive rows, unshuffled, as ``KFold`` does.
    scoring : callable, default=None
        ``scorer(estimator, X, y)``; None is ``HessianInverter.score``. See ``make_quadratic_scorer``. Where there are
        weights it must take ``sample_weight`` by name.
    method, curvature, model, loss, weight_decay, params, blocks, batch_size, device, dtype, random_state
        As for ``HessianInverter``.
    check_residual, verbose
        As for ``HessianInverter``.

    Attributes
    ----------
    hessian_perturbation_ : float
        The λ of the highest mean score.
    best_score_ : float
        That score.
    best_index_ : int
        Its place in ``hessian_perturbations``.
    cv_results_ : dict of str to ndarray or list
        ``params``, ``param_hessian_perturbation``, ``split{i}_test_score``, ``mean_test_score``, ``std_test_score`` and
        ``rank_test_score``, one entry per λ, as ``GridSearchCV`` has them.
    n_splits_ : int
        Number of folds.

    See Also
    --------
    HessianInverter : Has the other attributes.

    Notes
    -----
    The limits of ``HessianInverter.score`` are its own. ``sample_weight`` weighs training and held-out rows.

    Examples
    --------
    >>> X = np.random.default_rng(0).standard_normal((40, 10))
    >>> HessianInverterCV([1e-3, 1e-1, 1e3]).fit(X).hessian_perturbation_
    0.1
    """

    def __init__(
        self,
        hessian_perturbations: Any = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2),
        *,
        cv: Any = 5,
        scoring: Any = None,
        method: Any = "auto",
        curvature: Any = "auto",
        model: Any = None,
        loss: Any = None,
        weight_decay: Any = 0.0,
        params: Any = None,
        blocks: Any = None,
        batch_size: int | None = None,
        device: Any = None,
        dtype: Any = None,
        random_state: Any = None,
        check_residual: bool = True,
        verbose: int = 0,
    ) -> None:
        self.hessian_perturbations = hessian_perturbations
        self.cv = cv
        self.scoring = scoring
        self.method = method
        self.curvature = curvature
        self.model = model
        self.loss = loss
        self.weight_decay = weight_decay
        self.params = params
        self.blocks = blocks
        self.batch_size = batch_size
        self.device = device
        self.dtype = dtype
        self.random_state = random_state
        self.check_residual = check_residual
        self.verbose = verbose

    @ordinary
    def fit(self, X: Any, y: Any = None, sample_weight: Any = None, groups: Any = None) -> HessianInverterCV:
        """Choose λ, and fit the inverse at it on all rows.

        Parameters
        ----------
        X : model, array of shape (n, ...) or data
            As for ``HessianInverter.fit``: a model, with its data as ``y``; else inputs for ``self.model``; else plain
            rows (n, p). Batches that are already made cannot be split into folds.
        y : data or array of shape (n, ...), default=None
            ``(X, y)``, a Dataset or a DataLoader after a model; targets after inputs.
        sample_weight : array of shape (n,), default=None
            Weights wᵢ ≥ 0.
        groups : array of shape (n,), default=None
            Labels of groups of rows, for a ``cv`` that keeps them together, such as ``GroupKFold``.

        Returns
        -------
        HessianInverterCV
            Itself.
        """
        check_method(self.method)
        check_fit_arguments(X, y, self.model)
        shifts = _check_shifts(self.hessian_perturbations)
        return fit_whole(self, lambda fresh: fresh._search(X, y, sample_weight, groups, shifts))

    def _search(self, X: Any, y: Any, sample_weight: Any, groups: Any, shifts: list[float]) -> None:
        model, data = self._model_and_data(X, y)
        n, targets = _n_rows(data)
        weights = check_sample_weight(sample_weight, n)
        folded = self._settled(model, data, weights)
        splitter = check_cv(self.cv, targets, classifier=False)
        splits = list(splitter.split(np.zeros((n, 1)), targets, groups))
        folds = progress(splits, "folds", self.verbose, len(splits))
        scores = np.array([self._fold_scores(folded, data, weights, shifts, *fold) for fold in folds]).T
        self._choose(shifts, scores)
        self._fit_at(X, y, sample_weight, shifts[self.best_index_])

    def _model_and_data(self, X: Any, y: Any) -> tuple[Any, Any]:
        """Return the model that ``fit`` is given before its data, and the data to split: rows where there is none."""
        if is_model(X):
            return X, y
        if self.model is not None:
            return None, as_data(X, y)
        rows = X.detach().cpu().numpy() if isinstance(X, torch.Tensor) else X
        checked = validate_data(self, rows, dtype=[np.float64, np.float32])
        # The folds of a frame are frames, and know its columns.
        return None, rows if hasattr(rows, "iloc") else checked

    def _settled(self, model: Any, data: Any, weights: Any) -> Any:
        """Return the model of the folds: scikit-learn's penalties are divided by the rows of the fit, not of a fold."""
        given = self.model if model is None else model
        adapted = None if given is None else as_model(given, self.loss, self.weight_decay)
        if not isinstance(adapted, SklearnTwiceDifferentiable) or adapted.totals is not None:
            return model
        adapted.settle(self._batches(adapted, data, weights))
        return adapted

    def _fold_scores(
        self, model: Any, data: Any, weights: Any, shifts: list[float], train: np.ndarray, test: np.ndarray
    ) -> list[float]:
        settings = {name: value for name, value in self.get_params(deep=False).items() if name not in OWN}
        # λ = 0 may want another factorisation than λ > 0, which is at hand then for every λ.
        inverter = HessianInverter(hessian_perturbation=0.0 if 0.0 in shifts else max(shifts), **settings)
        seen, held = _take(data, train), _take(data, test)
        part, rest = (None, None) if weights is None else (weights[train], weights[test])
        with warnings.catch_warnings():
            # Of a λ that is only where the path starts from; indefinite ones score -inf, and are warned of.
            warnings.simplefilter("ignore", scipy.linalg.LinAlgWarning)
            inverter.fit(*((model, seen) if model is not None else _pair(seen)), sample_weight=part)
        for shift in shifts:
            check_shift(shift, inverter._factorised("another λ").dtype)
        scoring = _QuadraticScorer(None) if self.scoring is None else self.scoring
        if isinstance(scoring, _QuadraticScorer):
            return scoring.path(inverter, shifts, (*_pair(held), rest))
        if not callable(scoring):
            raise TypeError(must_be("scoring", "None or a callable (estimator, X, y)", repr(scoring)))
        weighed = {} if rest is None else {"sample_weight": rest}
        if weighed and "sample_weight" not in inspect.signature(scoring).parameters:
            must = "one that takes sample_weight by name, where there are weights"
            raise TypeError(must_be("scoring", must, repr(scoring), "Try `make_quadratic_scorer()`."))
        return [float(scoring(inverter._at(shift), *_pair(held), **weighed)) for shift in shifts]

    def _choose(self, shifts: list[float], scores: np.ndarray) -> None:
        scores = np.where(np.isnan(scores), -np.inf, scores)
        mean = scores.mean(1)
        if not np.isfinite(mean).any():
            hint = f'Try λ > {max(shifts):.3g}, or curvature="ggn".'
            got = f"a score of -inf in some fold for each of {', '.join(f'{shift:.3g}' for shift in shifts)}"
            raise ValueError(must_be("hessian_perturbations", "such that one λ serves every fold", got, hint))
        with np.errstate(invalid="ignore"):
            std = scores.std(1)
        rank = scipy.stats.rankdata(-mean, method="min").astype(np.int32)
        self.cv_results_: dict[str, Any] = {
            "params": [{"hessian_perturbation": shift} for shift in shifts],
            "param_hessian_perturbation": np.ma.array(shifts),
            **{f"split{i}_test_score": column for i, column in enumerate(scores.T)},
            "mean_test_score": mean,
            "std_test_score": std,
            "rank_test_score": rank,
        }
        self.best_index_, self.n_splits_ = int(rank.argmin()), scores.shape[1]
        self.best_score_ = float(mean[self.best_index_])


def _through(steps: Pipeline, X: Any, y: Any) -> tuple[Any, Any]:
    """Return ``(X, y)`` after the steps of a pipeline, of which one may make gradients, which have no targets."""
    for _, step in steps.steps:
        inner = step
        while isinstance(inner, FrozenEstimator):
            inner = inner.estimator
        if isinstance(inner, Pipeline):
            X, y = _through(inner, X, y)
        elif isinstance(inner, PerSampleGradient):
            X, y = inner.transform(X, y), None
        elif inner is not None and inner != "passthrough":
            X = step.transform(X)
    return X, y


def _take(data: Any, rows: np.ndarray) -> Any:
    """Return the ``rows`` of data in the form that it has: a tuple, a Dataset, a DataLoader or one array."""
    if isinstance(data, tuple):
        return tuple(_take_array(part, rows) for part in data)
    if isinstance(data, DataLoader):
        return DataLoader(
            Subset(data.dataset, rows.tolist()),
            batch_size=data.batch_size,
            collate_fn=data.collate_fn,
            num_workers=data.num_workers,
        )
    return Subset(data, rows.tolist()) if isinstance(data, Dataset) else _take_array(data, rows)


def _take_array(values: Any, rows: np.ndarray) -> Any:
    if isinstance(values, Mapping):
        return {key: _take_array(part, rows) for key, part in values.items()}
    if isinstance(values, tuple):
        return tuple(_take_array(part, rows) for part in values)
    if isinstance(values, torch.Tensor):
        return values[torch.from_numpy(rows).to(values.device)]
    if hasattr(values, "iloc"):
        return values.iloc[rows]
    return [values[i] for i in rows] if isinstance(values, list) else values[rows]


def _pair(data: Any) -> tuple[Any, Any]:
    return data if isinstance(data, tuple) else (data, None)


def _n_rows(data: Any) -> tuple[int, Any]:
    """Return how many rows there are to split, and the targets where they are at hand."""
    if isinstance(data, np.ndarray) or hasattr(data, "iloc"):
        return len(data), None
    if isinstance(data, tuple) and len(data) == 2 and data[1] is not None:
        X, y = data
        inputs = X.values() if isinstance(X, Mapping) else X if isinstance(X, tuple) else [X]
        check_consistent_length(*inputs, y)
        return len(y), y.detach().cpu().numpy() if isinstance(y, torch.Tensor) else y
    dataset = data
    if isinstance(data, DataLoader) and data.batch_size is not None:
        dataset = data.dataset if type(data.sampler) in (SequentialSampler, RandomSampler) else None
    if isinstance(dataset, Dataset) and not isinstance(dataset, IterableDataset):
        return len(dataset), None  # type: ignore[arg-type]
    must = "an (X, y) tuple, a map-style Dataset, or a DataLoader of one without a sampler of its own"
    raise TypeError(must_be("Data to split into folds", must, type(data).__name__, "Batches hide their rows."))


def _check_shifts(values: Iterable[Any]) -> list[float]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(must_be("hessian_perturbations", "an iterable of λ ≥ 0", repr(values)))
    shifts = [check_hessian_perturbation(value, "HessianInverterCV") for value in values]
    if not shifts:
        raise ValueError(must_be("hessian_perturbations", "at least one λ", "none"))
    return shifts
