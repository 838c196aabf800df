"""λ by cross-validation: one factorisation a fold serves every λ."""

from __future__ import annotations

import inspect
import numbers
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Self

import numpy as np
import scipy.linalg
import scipy.stats
from sklearn.model_selection import BaseCrossValidator, BaseShuffleSplit, check_cv
from sklearn.utils import check_array

from .._arguments import check_fit_arguments, check_method
from .._autograd import ordinary
from .._callbacks import TakesCallbacks, followed
from .._check import check_sample_weight, check_shift, must_be
from .._fitting import fit_whole
from .._frames import Columned, Frame
from .._namespaces import to_numpy
from .._progress import progress, say
from .._schema import check_fields
from .._types import (
    Array,
    Autocast,
    Data,
    Decay,
    Device,
    DType,
    Globs,
    LossLike,
    Partition,
    RandomState,
    State,
    TrainedModel,
)
from ..answers import check_container, setting_fields
from ..curvature import Sampled
from ..data import as_data, as_pair, batches_of, count, take
from ..files import UNSAVED, savable
from ..inverter import HessianInverter
from ..methods.base import Method
from ..models import SklearnTwiceDifferentiable, as_model, is_model
from ..persistence import left_out, require_present
from ..perturbation import check_perturbation, resolve, share_of
from .chosen import ChosenInverter
from .scorer import QuadraticScorer

__all__ = ["HessianInverterCV"]

# Settings that HessianInverter does not have.
OWN = ("hessian_perturbations", "cv", "scoring")
# Of `cv_results_`.
COLUMN = "param_hessian_perturbation"
# What a file holds beside the settings.
FITTED = {
    "inverter_": "state",
    "cv_results_": "plain",
    "best_index_": "int",
    "best_score_": "float",
    "n_splits_": "int",
    "_sklearn_output_config": "plain",
}


@savable
class HessianInverterCV(TakesCallbacks, ChosenInverter):
    r"""A ``HessianInverter`` that chooses λ by cross-validation, then fits on all rows.

    As ``GridSearchCV`` over ``hessian_perturbation``, but the curvature of a fold is assembled and factorised once for
    every λ, and the held-out rows' gradients and curvature are computed once.

    Parameters
    ----------
    hessian_perturbations : iterable of float or str, default=(1e-6, 1e-5, ..., 1e2)
        λ ≥ 0 to choose from, on the scale of the mean loss; or shares of the mean eigenvalue, ``"1e-2 rel"``, of each
        fold's own H, and then of that of all rows. Both may stand in one grid.
    cv : int, splitter or iterable of (train, test), default=5
        Folds of rows; an int takes consecutive rows, unshuffled, as ``KFold`` does.
    scoring : callable, default=None
        ``scorer(estimator, X, y)``; None is ``HessianInverter.score``. See ``make_quadratic_scorer``. Where there are
        weights it must take ``sample_weight`` by name.
    method, curvature, model, loss, weight_decay, params, blocks, batch_size, device, dtype, autocast
        As for ``HessianInverter``.
    random_state, check_residual, verbose
        As for ``HessianInverter``.

    Attributes
    ----------
    inverter_ : HessianInverter
        Fitted on all rows, at the λ of the highest mean score. Its attributes are this estimator's too.
    hessian_perturbation_ : float
        That λ.
    best_score_ : float
        The score at it.
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
        hessian_perturbations: Iterable[float | str] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2),
        *,
        cv: int | BaseCrossValidator | BaseShuffleSplit | Iterable[tuple[np.ndarray, np.ndarray]] = 5,
        scoring: Callable[..., float] | None = None,
        method: str | Method = "auto",
        curvature: str | Sampled = "auto",
        model: TrainedModel | None = None,
        loss: LossLike | None = None,
        weight_decay: Decay = 0.0,
        params: Globs = None,
        blocks: Partition = None,
        batch_size: int | None = None,
        device: Device = None,
        dtype: DType = None,
        autocast: Autocast = None,
        random_state: RandomState = None,
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
        self.autocast = autocast
        self.random_state = random_state
        self.check_residual = check_residual
        self.verbose = verbose

    @followed
    @ordinary
    def fit(
        self,
        X: TrainedModel | Data,
        y: Data | None = None,
        sample_weight: Array | None = None,
        groups: Array | None = None,
    ) -> HessianInverterCV:
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
        fit_whole(self, lambda fresh: fresh._search(X, y, sample_weight, groups, shifts))
        return self

    def _search(self, X: object, y: object, sample_weight: object, groups: object, shifts: list[float | str]) -> None:
        model, data = self._model_and_data(X, y)
        n, targets = count(data)
        weights = check_sample_weight(sample_weight, n)
        folded = self._settled(model, data, weights)
        splitter = check_cv(require_present(self.cv, "cv"), targets, classifier=False)
        splits = list(splitter.split(np.zeros((n, 1)), targets, groups))
        folds = progress(splits, "folds", self.verbose, len(splits))
        scores = np.array([self._fold_scores(folded, data, weights, shifts, *fold) for fold in folds]).T
        self._choose(shifts, scores)
        self.inverter_ = self._inverter(shifts[self.best_index_]).fit(X, y, sample_weight)

    def _model_and_data(self, X: object, y: object) -> tuple[object, object]:
        """Return the model that ``fit`` is given before its data, and the data to split: rows where there is none."""
        if is_model(X):
            return X, y
        if self.model is not None:
            return None, as_data(X, y)
        rows = to_numpy(X)
        checked = check_array(rows, dtype=[np.float64, np.float32], estimator=self, input_name="X")
        # The folds of a frame are frames, and know its columns.
        return None, rows if isinstance(rows, Frame | Columned) else checked

    def _settled(self, model: object, data: object, weights: np.ndarray | None) -> object:
        """Return the model of the folds: scikit-learn's penalties are divided by the rows of the fit, not of a fold."""
        given = require_present(self.model if model is None else model, "model")
        if given is None:
            return None
        adapted = as_model(given, require_present(self.loss, "loss"), self.weight_decay)
        if not isinstance(adapted, SklearnTwiceDifferentiable) or adapted.totals is not None:
            return model
        adapted.settle(batches_of(adapted, data, batch_size=self.batch_size, sample_weight=weights))
        return adapted

    def _inverter(self, shift: float | str) -> HessianInverter:
        settings = {name: value for name, value in self.get_params(deep=False).items() if name not in OWN}
        return HessianInverter(hessian_perturbation=shift, **settings)

    def _fold_scores(
        self,
        model: object,
        data: object,
        weights: np.ndarray | None,
        settings: list[float | str],
        train: np.ndarray,
        test: np.ndarray,
    ) -> list[float]:
        inverter = self._inverter(_first(settings))
        seen, held = take(data, train), take(data, test)
        part, rest = (None, None) if weights is None else (weights[train], weights[test])
        with warnings.catch_warnings():
            # Of a λ that is only where the path starts from; indefinite ones score -inf, and are warned of.
            warnings.simplefilter("ignore", scipy.linalg.LinAlgWarning)
            inverter.fit(*((model, seen) if model is not None else as_pair(seen)), sample_weight=part)
        shifts = _resolved(settings, inverter)
        for shift in shifts:
            check_shift(shift, inverter._factorised("another λ").dtype)
        scoring = QuadraticScorer(None) if self.scoring is None else require_present(self.scoring, "scoring")
        if isinstance(scoring, QuadraticScorer):
            return scoring.path(inverter, shifts, (*as_pair(held), rest))
        if not callable(scoring):
            raise TypeError(must_be("scoring", "None or a callable (estimator, X, y)", repr(scoring)))
        weighed = {} if rest is None else {"sample_weight": rest}
        if weighed and "sample_weight" not in inspect.signature(scoring).parameters:
            must = "one that takes sample_weight by name, where there are weights"
            raise TypeError(must_be("scoring", must, repr(scoring), "Try `make_quadratic_scorer()`."))
        return [float(scoring(inverter._at(shift), *as_pair(held), **weighed)) for shift in shifts]

    def _choose(self, shifts: list[float | str], scores: np.ndarray) -> None:
        scores = np.where(np.isnan(scores), -np.inf, scores)
        mean = scores.mean(1)
        if not np.isfinite(mean).any():
            told = [shift if isinstance(shift, str) else f"{shift:.3g}" for shift in shifts]
            largest = max([shift for shift in shifts if not isinstance(shift, str)], default=None)
            hint = f'Try {"a larger λ" if largest is None else f"λ > {largest:.3g}"}, or curvature="ggn".'
            got = f"a score of -inf in some fold for each of {', '.join(told)}"
            raise ValueError(must_be("hessian_perturbations", "such that one λ serves every fold", got, hint))
        with np.errstate(invalid="ignore"):
            std = scores.std(1)
        rank = scipy.stats.rankdata(-mean, method="min").astype(np.int32)
        self.cv_results_: State = {
            "params": [{"hessian_perturbation": shift} for shift in shifts],
            COLUMN: _masked(shifts),
            **{f"split{i}_test_score": column for i, column in enumerate(scores.T)},
            "mean_test_score": mean,
            "std_test_score": std,
            "rank_test_score": rank,
        }
        self.best_index_, self.n_splits_ = int(rank.argmin()), scores.shape[1]
        self.best_score_ = float(mean[self.best_index_])
        spread = f"{self.best_score_:.4g} ± {std[self.best_index_]:.2g} over {self.n_splits_} folds"
        say(f"λ = {shifts[self.best_index_]} of {len(shifts)}: the highest mean score, {spread}", self.verbose)

    def _facts(self) -> Mapping[str, object]:
        if "inverter_" not in vars(self):
            return {}
        chosen = f"{len(self.cv_results_['params'])} values by {self.n_splits_} folds, score {self.best_score_:.4g}"
        return {**self.inverter_._facts(), "λ chosen from": chosen}

    # -- files -----------------------------------------------------------------------------------------------------

    def _file_state(self) -> State:
        state = {name: value for name, value in self.__getstate__().items() if name not in UNSAVED}
        # Splitters and scorers are code; shifts may be any iterable.
        state["cv"] = int(self.cv) if isinstance(self.cv, numbers.Integral) else left_out(self.cv)
        state["scoring"] = left_out(self.scoring)
        state["hessian_perturbations"] = [entry["hessian_perturbation"] for entry in self.cv_results_["params"]]
        # The same settings again, as an array of objects where strings are among them, which no file holds.
        results = {name: value for name, value in self.cv_results_.items() if name != COLUMN}
        return {**state, "cv_results_": results, "inverter_": self.inverter_._file_state()}

    @classmethod
    def _file_fields(cls) -> tuple[Mapping[str, str], frozenset[str]]:
        return {**setting_fields(cls), **FITTED}, frozenset({"_sklearn_output_config"})

    @classmethod
    def _restored(cls, state: State) -> Self:
        inner, results = state["inverter_"], state["cv_results_"]
        check_fields(
            HessianInverter.__name__, HessianInverter._file_fields()[0], inner, HessianInverter._file_fields()[1]
        )
        check_container(state)
        state["inverter_"] = inverter = HessianInverter._restored(inner)
        chosen = results["params"][state["best_index_"]]["hessian_perturbation"]
        # A share of the mean eigenvalue is known by its name alone: H is not in a file.
        own = inverter.hessian_perturbation if isinstance(chosen, str) else inverter.hessian_perturbation_
        if chosen != own:
            raise ValueError(must_be("The λ chosen", f"that of the inverse, {own}", chosen))
        settings = [entry["hessian_perturbation"] for entry in results["params"]]
        state["cv_results_"] = {"params": results["params"], COLUMN: _masked(settings), **results}
        return super()._restored(state)


def _first(settings: list[float | str]) -> float | str:
    """Return the setting to factorise a fold at: 0 where it is asked for, else the largest, a number if there is one.

    λ = 0 may want another factorisation than λ > 0, which is at hand then for every λ.
    """
    numbers_of = [setting for setting in settings if not isinstance(setting, str)]
    if numbers_of:
        return 0.0 if 0.0 in numbers_of else max(numbers_of)
    return max([setting for setting in settings if isinstance(setting, str)], key=share_of)


def _resolved(settings: list[float | str], inverter: HessianInverter) -> list[float]:
    """Return λ for each setting, over the H of a fitted inverter."""
    first = inverter.hessian_perturbation
    if not isinstance(first, str):
        return resolve(settings, inverter.curvature_, inverter.random_state)
    # It knows the mean eigenvalue already.
    mean = inverter.hessian_perturbation_ / share_of(first)
    return [share_of(setting) * mean if isinstance(setting, str) else setting for setting in settings]


def _masked(settings: list[float | str]) -> np.ma.MaskedArray:
    mixed = any(isinstance(setting, str) for setting in settings)
    return np.ma.array(settings, dtype=object if mixed else np.float64)


def _check_shifts(values: object) -> list[float | str]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(must_be("hessian_perturbations", "an iterable of λ ≥ 0", repr(values)))
    shifts = [check_perturbation(value, "HessianInverterCV") for value in values]
    if not shifts:
        raise ValueError(must_be("hessian_perturbations", "at least one λ", "none"))
    return shifts
