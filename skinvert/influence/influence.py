"""``InfluenceFunction``: what removing a training row does to what is measured on test rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from sklearn.base import clone
from sklearn.frozen import FrozenEstimator
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted

from .._autograd import ordinary
from .._callbacks import TakesCallbacks, followed
from .._check import check_choice, check_number, must_be
from .._checkpoint import NOWHERE, Checkpoint
from .._fitting import as_it_is, fit_whole
from .._frames import (
    Columned,
    Frame,
    RowTransformer,
    check_inputs,
    columns_of,
    framed,
    rows_of,
    with_labels,
)
from .._lazy import is_lazy, over_rows
from .._shown import Shown
from .._types import Array, Data, Indices, State, TrainedModel
from ..checkpoint import check_path
from ..data import as_data, check_form, check_row_order, holds_tensors
from ..files import Whole
from ..inverter import HessianInverter
from ..models import is_model
from ..plotting import report
from ..selection import HessianInverterCV
from .effects import check_groups, check_indices, group_effect, group_labels, outputs_without, self_influence
from .features import feature_influence
from .fitted import Fitted
from .jobs import with_own_checkpoint
from .largest import Largest
from .matrix import Matrix
from .measurements import Measurement, check_row_by_row
from .normalized import NORMS
from .output import Out, destination
from .sides import moved
from .statistics import RowStatistics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["InfluenceFunction", "Top"]

REMOVALS = ("first_order", "newton")


class Top(NamedTuple):
    """The training rows that matter most to each test row.

    Parameters
    ----------
    rows : array or tensor of int, shape (n_test, k)
        Which, the first first.
    scores : array or tensor of shape (n_test, k)
        What removing each of them does.
    """

    rows: Array
    scores: Array


class InfluenceFunction(TakesCallbacks, Shown, Matrix, RowStatistics, RowTransformer):
    r"""Predict what removing each training row does to what is measured on test rows.

    ``fit(model, data)``, or ``fit(X, y)`` with the inverter's ``model`` set; ``transform((X_test, y_test))`` is the
    matrix (n_test, n_train) whose entry (i, j) is the predicted change of test row i's measurement when training row j
    is removed. Positive: removal raises the loss, so the row helps. Nothing is left to rescale: 1/n is in it.

    *Removed* is a row's weight set to zero in L = Σ wᵢℓᵢ / Σ wᵢ + penalty, the denominator and the penalty as they
    were: what dropping a row from a sum of losses at a fixed penalty does, scikit-learn's ``C``. To first order the
    parameters change by A⁻¹ wⱼgⱼ/Σw, A = H + λI, and the measurement vᵢ by ∇vᵢᵀ A⁻¹ wⱼgⱼ/Σw.

    Parameters
    ----------
    inverter : HessianInverter, HessianInverterCV or FrozenEstimator of a fitted one, default=None
        How A is inverted; cloned into ``inverter_`` and fitted. None is ``HessianInverter()``, for a model that brings
        its loss. ``FrozenEstimator(inverter)`` is taken as it was fitted, with its own model and data; ``fit`` refuses
        data that are seen to be others.
    removal : {"first_order", "newton"}, default="first_order"
        ``"first_order"`` leaves H as it is: it underestimates rows that the model hangs on (high leverage), by half
        or more where n is not much larger than p. ``"newton"`` takes the row's own curvature out of H and measures at
        the parameters that result: nearly what retraining gives, at a solve for each output of each row, and a forward
        pass over the test rows for each row. Give λ > 0 for a network: along what its data do not determine, the bias
        of a dead unit say, steps are long at λ = 0, and the outputs there are nothing that retraining gives.
    measurement : str, callable or list of callables, default="loss"
        What is measured: ``"loss"`` is ℓ on the scale of L, without the penalty; ``"margin"`` log(p/(1 − p)) of the
        true class; ``"logit"`` its logit. A callable (outputs, targets) gives one value a row, or one number of all
        the test rows (``AUROC``, ``WorstGroupLoss``, …), which is one row of scores; a list of such, a row each.
    normalize : {None, "cosine", "relatif", "l_relatif"}, default=None
        Scores of first order divided by √(gᵢᵀA⁻¹gᵢ · bⱼᵀA⁻¹bⱼ), ‖A⁻¹bⱼ‖ or √(bⱼᵀA⁻¹bⱼ), with bⱼ = wⱼgⱼ/Σw: they rank
        rows by what they say beside how unusual they are, and predict no retraining.
    score_rtol : float, default=None
        Solve until the error bound of each test row's scores (of each training row's, where these are fewer) is below
        this share of their root mean square, whatever the method; ``np.inf`` bounds alone. Scores are then in float64,
        and ``score_error_`` is known, at the price of some exact products in float64 for each solved row.
    batch_size : int, default=None
        Test rows per pass; results do not depend on it. Training rows come as the inverter's ``batch_size`` says.
    memory : int, default=None
        Bytes for the solutions that are held at once; None is scikit-learn's ``working_memory``.
    checkpoint : str or Path, default=None
        A file to which ``transform``, ``top``, ``group_effect`` and ``self_influence`` write what they have done, at
        most every second and for at most 5 % of their time, and from which the same call goes on after an interruption,
        a kill too, to the same result. It is removed once there is a result, and a file of any other job (another fit,
        other rows, settings or versions) is refused. In a folder that exists each job has its own file, and so has the
        fit of an inverter whose method has checkpoints and which has none itself; a file serves scores alone.
    verbose : int, default=0
        1 says on stderr what is computed, and shows progress bars.

    Attributes
    ----------
    inverter_ : HessianInverter
        The fitted inverter; of one model.
    members_ : list of InfluenceFunction
        One a model: scores are their mean. ``[self]`` of one model.
    n_samples_ : int
        Number of training rows.
    index_ : ndarray of shape (n_train,)
        Labels of the training rows: the index of their frame, or 0, …, n − 1.

    Methods
    -------
    fit(X, y=None, sample_weight=None)
        Fit the inverter of a model and its training data.
    transform(X, y=None)
        The scores (n_test, n_train) of test data.
    top(X, y=None, k=10)
        The training rows that matter most to each test row.
    self_influence()
        What removing a training row does to its own measurement.
    group_effect(groups, X, y=None)
        What removing groups of rows does.
    feature_influence(rows, X, y=None)
        How measurements change as the features of training rows do.
    removed_parameters(rows), predict_without(rows, X)
        The parameters, and the outputs, without some rows: unlearning.
    leverage(), diagnostics(), loo_predict(), jackknife_plus(X)
        What regressions call these, for the price of one fit.
    report(X, y=None)
        One figure.
    score(X, y=None)
        The held-out quadratic, for searches over λ.

    References
    ----------
    Koh & Liang (2017), "Understanding black-box predictions via influence functions"; the sign here is that of removal.
    Barshan, Brunet & Dziugaite (2020), "RelatIF: Identifying explanatory training examples via relative influence",
    eqs. 5 and 8, for ``normalize``.

    Examples
    --------
    The mean of two numbers under squared error, θ = 2: without the 3 it is 1, and the loss at 3 rises from 1 to 4.

    >>> from sklearn.linear_model import LinearRegression
    >>> X, y = np.ones((2, 1)), np.array([1.0, 3.0])
    >>> model = LinearRegression(fit_intercept=False).fit(X, y)
    >>> newton = InfluenceFunction(removal="newton").fit(model, (X, y))
    >>> newton.transform((X, y)).round(6).tolist()  # of ½ (f - y)²
    [[1.5, -0.5], [-0.5, 1.5]]
    >>> InfluenceFunction().fit(model, (X, y)).transform((X, y)).round(6).tolist()
    [[0.5, -0.5], [-0.5, 0.5]]
    """

    inverter_: HessianInverter

    def __init__(
        self,
        inverter: HessianInverter | HessianInverterCV | FrozenEstimator | None = None,
        *,
        removal: str = "first_order",
        measurement: str | Measurement | Sequence[Measurement] = "loss",
        normalize: str | None = None,
        score_rtol: float | None = None,
        batch_size: int | None = None,
        memory: int | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        verbose: int = 0,
    ) -> None:
        self.inverter = inverter
        self.removal = removal
        self.measurement = measurement
        self.normalize = normalize
        self.score_rtol = score_rtol
        self.batch_size = batch_size
        self.memory = memory
        self.checkpoint = checkpoint
        self.verbose = verbose

    # -- fit -------------------------------------------------------------------------------------------------------

    @followed
    @ordinary
    def fit(
        self, X: TrainedModel | Sequence[TrainedModel] | Data, y: Data | None = None, sample_weight: Array | None = None
    ) -> InfluenceFunction:
        """Fit the inverter.

        Parameters
        ----------
        X : model, list of models, array of shape (n, ...) or data
            A model, or an ensemble, with its training data as ``y``; else the inputs for the inverter's ``model``.
        y : data or array of shape (n, ...), default=None
            As ``HessianInverter.fit`` takes them. The order of the rows is that of the scores' columns: a DataLoader
            with a sampler of its own is refused, one that shuffles is read in the data set's order.
        sample_weight : array of shape (n,), default=None
            Weights wᵢ ≥ 0.

        Returns
        -------
        InfluenceFunction
            Itself.
        """
        self._check()
        fit_whole(self, lambda fresh: fresh._fit(X, y, sample_weight))
        return self

    def _check(self) -> None:
        check_path(self.checkpoint)
        check_choice(self.removal, "removal", REMOVALS)
        check_choice(self.normalize, "normalize", NORMS)
        if self.normalize is not None and self.removal != "first_order":
            raise ValueError(must_be("normalize", 'None for removal="newton"', repr(self.normalize)))
        for name in ("batch_size", "memory"):
            if vars(self)[name] is not None:
                check_number(vars(self)[name], name, owner="InfluenceFunction", low=1, integer=True)
        if self.score_rtol is not None:
            if self.score_rtol != np.inf:
                check_number(self.score_rtol, "score_rtol", owner="InfluenceFunction", low=0.0)
            if self.removal != "first_order" or self.normalize is not None:
                must = 'None but for removal="first_order" and normalize=None: other scores have no bound'
                raise ValueError(must_be("score_rtol", must, repr(self.score_rtol)))

    def _fit(self, X: object, y: object, sample_weight: object) -> None:
        if isinstance(X, list | tuple) and X and all(map(is_model, X)):
            self.members_ = [clone(self)._fit_one(model, y, sample_weight) for model in X]
            self.n_samples_, self.index_ = self.members_[0].n_samples_, self.members_[0].index_
        else:
            self._fit_one(X, y, sample_weight)

    def _fit_one(self, X: object, y: object, sample_weight: object) -> InfluenceFunction:
        if isinstance(self.inverter, FrozenEstimator):
            fitted = _checked(self.inverter.estimator)
            check_is_fitted(fitted)
        else:
            fitted = clone(HessianInverter() if self.inverter is None else _checked(self.inverter))
            check_row_order(y if is_model(X) else as_data(X, y))
            with with_own_checkpoint(fitted, self.checkpoint):
                fitted.fit(X, y, sample_weight=sample_weight)
        self.inverter_ = fitted.inverter_ if isinstance(fitted, HessianInverterCV) else fitted
        own, data = self._fitted(), y if is_model(X) else as_data(X, y)
        self.n_samples_ = own.objective.batches.n_samples
        if isinstance(self.inverter, FrozenEstimator) and not own.is_of(data, sample_weight):
            # The labels of the rows that are scored: those of the fit.
            data = vars(self.inverter_).get("_data")
        rows = rows_of(data)
        self.index_ = np.asarray(rows.index if isinstance(rows, Frame) else range(self.n_samples_), dtype=object)
        return self

    # -- scores ----------------------------------------------------------------------------------------------------

    @ordinary
    def transform(self, X: Data, y: Data | None = None, *, out: Out = None) -> Array:
        """Return the scores of test data, ``(X, y)`` as a tuple or two arguments (or a Dataset, a DataLoader, batches).

        Parameters
        ----------
        X, y : data
            n_test rows, as ``fit`` takes them.
        out : path ending in .npy, or array of shape (n_test, n_train), default=None
            Where the scores go, block by block, in place of memory: a memmap, a Zarr or HDF5 array of float32 or
            float64, or a file. The same call goes on with the file of an interrupted one; what it holds beside it,
            ``.npy.json``, says whose it is.

        Returns
        -------
        array or tensor of shape (n_test, n_train)
            Entry (i, j): the predicted change of measurement i when training row j is removed. An array for arrays, a
            tensor on the model's device for tensors. A frame, where ``set_output`` asks for one, has the index of X and
            the training rows' as its columns (as strings in polars). Of a measurement of all rows together, one row.
            With ``out`` this, or the file's memmap: such a file is its own checkpoint. Dask arrays give a lazy one,
            whose blocks of test rows are computed one by one: ``scores.to_zarr(path)``, say, on as many workers as
            there are.
        """
        if is_lazy((X, y)):
            return self._lazily(X if y is None else (X, y), out)
        data = self._test_data(X, y)
        if self._of_one_file(out):
            return self._labelled(self._matrix(data, out), data)
        with self._job("transform", data) as checkpoint:
            scores = self._mean(lambda member, part: member._matrix(data, checkpoint=part), checkpoint)
            if out is None:
                return self._labelled(self._back(scores, data), data)
            shape = (len(scores), self.n_samples_)
            job = partial(self._scores_of, self._pairs(data))
            target = destination(out, shape, scores.dtype, scores.device, job)
            target.write(slice(None), slice(None), scores)
            return self._labelled(target.close(), data)

    def _labelled(self, scores: Array, data: object) -> Array:
        return with_labels(super().transform(rows_of(data), scores), self.index_)

    def _lazily(self, data: object, out: Out) -> Array:
        """Return the scores of test data in Dask arrays."""
        fitted = self._members()[0]._fitted()
        if out is not None:
            hint = "What `transform` returns has `to_zarr` and `to_npy_stack`."
            raise ValueError(must_be("out", "None for Dask arrays", type(out).__name__, hint))
        check_form(data)
        check_row_by_row(self.measurement, self.score_rtol)
        if self.checkpoint is not None and not os.path.isdir(self.checkpoint):
            hint = "Each block of test rows is a job of its own."
            raise ValueError(must_be("checkpoint for Dask arrays", "None or a folder", repr(self.checkpoint), hint))
        name = str(fitted.model.dtype).removeprefix("torch.")
        return over_rows(as_it_is(self), "transform", data, self.n_samples_, np.dtype(name))

    @property
    def score_error_(self) -> np.ndarray:
        """Bounds (n_test, n_train) of the errors of the last ``transform``'s scores, where ``score_rtol`` is given.

        ``|score − gᵢᵀA⁻¹bⱼ|`` ≤ this, of the exact A in float64 and of the gradients as they were computed. NaN where A
        has no positive lower bound that is known (see ``HessianInverter.quadratic``), and where a file had the scores.
        """
        found = [vars(member).get("_bounds") for member in self._members()]
        known = [bounds.matrix() for bounds in found if bounds is not None]
        if len(known) < len(found):
            message = "score_error_ comes with `transform`, where score_rtol is given"
            raise AttributeError(message)
        return torch.stack(known).mean(0).cpu().numpy()

    @ordinary
    def self_influence(self) -> Array:
        """Return (n_train,) the diagonal of ``transform`` of the training rows: what removing a row does to its own.

        Large where a row is unlike the others, mislabelled for instance.
        """
        check_is_fitted(self, "n_samples_")
        with self._job("self_influence") as checkpoint:
            found = self._mean(lambda member, part: self_influence(member._fitted(), part), checkpoint)
            return self._back(found, None)

    @ordinary
    def top(self, X: Data, y: Data | None = None, *, k: int = 10, harmful: bool = False) -> Top:
        """Return the k training rows whose removal raises each test row's measurement most; the matrix is not held.

        Parameters
        ----------
        X, y : data
            n_test rows.
        k : int, default=10
            How many; at most n_train.
        harmful : bool, default=False
            Those whose removal lowers it most, in place of these.

        Returns
        -------
        Top
            ``rows`` (n_test, k) and ``scores`` (n_test, k), the most first. Two frames, where ``set_output`` asks for
            them, with the index of X: ``rows`` are then labels of training rows, of ``index_``, not places.
        """
        data = self._test_data(X, y)
        with self._job("top", data, k=k, harmful=harmful) as checkpoint:
            rows, scores = self._largest(data, k, harmful, checkpoint)
            columns = range(rows.shape[1])
            labels = self._framed(self._labels_at(rows), data, columns)
            found = self._framed(self._back(scores, data), data, columns)
            return Top(labels if isinstance(labels, Columned) else self._back(rows, data), found)

    def _largest(self, data: object, k: int, harmful: bool, checkpoint: Checkpoint = NOWHERE) -> Top:
        """Return what ``top`` does, by places, as tensors, whatever ``set_output`` asks for."""
        k = min(check_number(k, "k", low=1, integer=True), self.n_samples_)
        sign = -1 if harmful else 1
        if len(self._members()) > 1:
            scores = self._mean(lambda member, part: member._matrix(data, checkpoint=part), checkpoint)
            found = Largest(k, sign, scores.dtype, (len(scores), self.n_samples_))
            found.take((slice(0, len(scores)), slice(0, self.n_samples_), scores))
        else:
            found = self._largest_of_one(data, k, sign, checkpoint)
        scores, rows = found.found()
        return Top(rows, scores)

    @ordinary
    def group_effect(self, groups: Array | Sequence[Indices], X: Data, y: Data | None = None) -> Array:
        """Return the predicted changes (n_test, n_groups) when all rows of a group are removed together.

        Parameters
        ----------
        groups : array of shape (n_train,), or list of arrays of int
            Labels of the training rows, one group a label, in sorted order, and missing ones (NaN, None) the last; or
            the rows of each group, which may overlap.
        X, y : data
            n_test rows.

        Returns
        -------
        array or tensor of shape (n_test, n_groups)
            To first order the sums of the rows' scores; by ``removal="newton"`` each group's own curvature is taken
            out of H as a whole. A frame, where ``set_output`` asks for one, has the index of X, and the groups' labels,
            or 0 to n_groups − 1, as its columns.
        """
        data = self._test_data(X, y)
        members = check_groups(groups, self.n_samples_)
        with self._job("group_effect", data, groups=members) as checkpoint:
            effects = self._mean(lambda member, part: _group_effect(member, members, data, part), checkpoint)
            return self._framed(self._back(effects, data), data, group_labels(groups, members))

    # -- parameters ------------------------------------------------------------------------------------------------

    @ordinary
    def removed_parameters(self, rows: Indices) -> State:
        """Return the parameters that training without ``rows`` (an int, or ints) is predicted to give.

        One step of unlearning: ``model.load_state_dict(influence.removed_parameters(rows), strict=False)``.

        Returns
        -------
        dict of str to tensor
            The selected parameters by name, new tensors on the model's device.
        """
        if len(self._members()) > 1:
            hint = "Try `influence.members_[0].removed_parameters(rows)`."
            raise TypeError(must_be("removed_parameters", "asked of one model", "an ensemble", hint))
        fitted = self._fitted()
        near = moved(fitted.model, fitted.remove().step(check_indices(rows, self.n_samples_)))
        return dict(zip(near.layout.names, (tensor.detach() for tensor in near.theta), strict=True))

    @ordinary
    def predict_without(self, rows: Indices, X: Data, y: Data | None = None) -> Array:
        """Return the model's outputs (n_test, c) on test data at ``removed_parameters(rows)``; of an ensemble the mean.

        Outputs are the module's own: logits, where its loss takes these. Targets do not count: X alone will do, a list
        too for a model of scikit-learn or a pipeline; of other models a list is batches.
        """
        data = self._test_data(X, y)
        chosen = check_indices(rows, self.n_samples_)
        return self._back(self._mean(lambda member, _: outputs_without(member._fitted(), chosen, data)), data)

    @ordinary
    def feature_influence(self, rows: Indices, X: Data, y: Data | None = None) -> Array:
        """Return the derivatives ``(n_test, m, *shape)`` of each test measurement by the inputs of m training ``rows``.

        −(wⱼ/Σw) ∂/∂xⱼ (gⱼ(xⱼ)ᵀ A⁻¹ ∇vᵢ): how the measurement changes as the features of a training row do, the model
        trained anew and A held. Inputs must be one tensor of floats.

        References
        ----------
        Koh & Liang (2017), "Understanding black-box predictions via influence functions", eq. 5.
        """
        data = self._test_data(X, y)
        chosen = check_indices(rows, self.n_samples_)
        return self._back(self._mean(lambda member, _: _feature_influence(member, chosen, data)), data)

    def report(
        self,
        X: Data,
        y: Data | None = None,
        *,
        n_rows: int = 3,
        k: int = 5,
        train: tuple[Array, Array] | None = None,
        image_shape: tuple[int, ...] | None = None,
    ) -> Figure:
        """Return one figure: self-influence, the spectrum up to 1,000 parameters, what helps and harms some test rows.

        Parameters
        ----------
        X, y : data
            Test rows.
        n_rows, k : int, default=3 and 5
            How many of them, the first, are shown, and how many helpful and harmful training rows of each.
        train : tuple (X, y), default=None
            The training rows, for pictures of them.
        image_shape : tuple of int, default=None
            Of a row of X as a picture: (8, 8), say. Without it scores are bars, named by the training rows' index.

        Returns
        -------
        matplotlib Figure
            Needs matplotlib, ``pip install "skinvert[plot]"``.
        """
        self._alone("report")
        return report(self, X, y, n_rows=n_rows, k=k, train=train, image_shape=image_shape)

    def score(self, X: Data, y: Data | None = None, sample_weight: Array | None = None) -> float:
        """Return ``HessianInverter.score``, the held-out quadratic: for searches over λ; of an ensemble the mean."""
        check_is_fitted(self, "n_samples_")
        return float(np.mean([member.inverter_.score(X, y, sample_weight) for member in self._members()]))

    def __getstate__(self) -> State:
        """Keep the inverter with its model and data, which scores are made of; a pickle is as large as these."""
        state = dict(super().__getstate__())
        if "inverter_" in state:
            state["inverter_"] = Whole(state["inverter_"])
        return state

    def get_feature_names_out(self, input_features: object = None) -> np.ndarray:
        """Return the names of the columns: the training rows' labels, ``index_``, as strings."""
        check_is_fitted(self, "n_samples_")
        return np.array([str(label) for label in self.index_], dtype=object)

    def __sklearn_tags__(self) -> Tags:
        """Say that a target is needed; ``array_api_support`` is False as for ``PerSampleGradient``."""
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.no_validation = True
        return tags

    # -- helpers ---------------------------------------------------------------------------------------------------

    def _facts(self) -> Mapping[str, object]:
        if "n_samples_" not in vars(self):
            return {}
        first = self._members()[0]
        own = {"removal": self.removal, "measurement": self.measurement, "models": len(self._members())}
        return {**first.inverter_._facts(), **own}

    def _members(self) -> list[InfluenceFunction]:
        check_is_fitted(self, "n_samples_")
        return vars(self).get("members_", [self])

    def _fitted(self) -> Fitted:
        check_is_fitted(self, "inverter_")
        return Fitted(self.inverter_, self.removal, self.measurement, self.batch_size, self.memory, self.verbose)

    def _mean(
        self, of: Callable[[InfluenceFunction, Checkpoint], torch.Tensor], checkpoint: Checkpoint = NOWHERE
    ) -> torch.Tensor:
        members = self._members()
        parts = [checkpoint if len(members) == 1 else checkpoint.within(f"model {i}") for i in range(len(members))]
        found = [of(member, part) for member, part in zip(members, parts, strict=True)]
        return found[0] if len(found) == 1 else torch.stack(found).mean(0)

    def _test_data(self, X: object, y: object) -> object:
        check_is_fitted(self, "n_samples_")
        if is_model(X):
            raise TypeError(must_be("Test data", "data", f"a {type(X).__name__}", "The model is that of `fit`."))
        data = X if y is None else (X, y)
        known = columns_of(vars(self._members()[0].inverter_).get("_data"))
        check_inputs((data,) if isinstance(data, Columned) else data, known)
        return data

    def _framed(self, found: Array, data: object, labels: Iterable[object]) -> Array:
        return framed(self, rows_of(data), found, labels)

    def _labels_at(self, places: torch.Tensor) -> np.ndarray:
        """Return the labels of training rows: whole numbers where all are."""
        whole = all(isinstance(label, int | np.integer) for label in self.index_)
        labels: np.ndarray = self.index_[places.cpu().numpy()]
        return labels.astype(np.int64) if whole else labels

    def _back(self, found: torch.Tensor, data: object) -> Array:
        tensors = data is not None and holds_tensors(data)
        return found if tensors else found.detach().cpu().numpy()


def _checked(inverter: object) -> HessianInverter | HessianInverterCV:
    if not isinstance(inverter, HessianInverter | HessianInverterCV):
        must = "a HessianInverter, a HessianInverterCV or a FrozenEstimator of a fitted one"
        raise TypeError(must_be("inverter", must, repr(inverter)[:80], "Try `HessianInverter(method, ...)`."))
    return inverter


def _group_effect(
    member: InfluenceFunction, groups: list[torch.Tensor], data: object, checkpoint: Checkpoint
) -> torch.Tensor:
    fitted = member._fitted()
    return group_effect(fitted, groups, fitted.test(data), checkpoint)


def _feature_influence(member: InfluenceFunction, rows: torch.Tensor, data: object) -> torch.Tensor:
    fitted = member._fitted()
    return feature_influence(fitted, rows, fitted.test(data))
