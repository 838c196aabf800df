"""A fitted scikit-learn model as a ``TwiceDifferentiable``: the objective that scikit-learn documents, as a mean."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import scipy.sparse
import torch
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_is_fitted, validate_data

from ..._autograd import ordinary
from ..._check import check_sample_weight, must_be
from ..._types import Batch, Device
from ..losses import Loss
from ..shared import UNFITTED
from ..sparse_rows import SparseRows
from ..torch import TorchTwiceDifferentiable
from .affine import Affine
from .objectives import OBJECTIVES, FittedObjective, FitTotals

__all__ = ["SklearnTwiceDifferentiable"]


class SklearnTwiceDifferentiable(TorchTwiceDifferentiable):
    r"""L = Σ wᵢℓᵢ / Σ wᵢ + penalty of a fitted scikit-learn model, in float64.

    =============================================  ========================  =================================
    model                                          ℓ                         penalty
    =============================================  ========================  =================================
    ``LinearRegression``, ``Ridge``                ½ ‖f − y‖²                α ‖W‖² / (2 Σw)
    ``LogisticRegression``                         −log p                    ‖W‖² / (2 C Σwc)
    ``SGDClassifier(loss="log_loss")``             −log p, of each logit     α n ‖W‖² / (2 Σw)
    ``PoissonRegressor``, ``GammaRegressor``       half the deviance         α ‖w‖² / 2
    ``MLPClassifier``, ``MLPRegressor``            −log p; ½ ‖f − y‖²        α ‖W‖² / (2 Σw), by "lbfgs"
    =============================================  ========================  =================================

    Intercepts are not penalised; an MLP's "sgd" and "adam" divide by the minibatch in place of Σw. Class weights c
    count as weights of the rows. Parameters are ``coef`` row by row, then ``intercept``; of an MLP ``coefs.0``,
    ``coefs.1`` and so on, then ``intercepts.0`` and so on.

    scikit-learn records neither n nor Σw. They are those of the rows given to ``fit``, as is what
    ``class_weight="balanced"`` balances; ``score`` keeps them. Give ``y`` where ``fit`` gets a part of the rows that
    the model was fitted on, such as a fold of a search.

    Parameters
    ----------
    model : estimator
        Fitted.
    y : array of shape (n, ...), default=None
        The targets that the model was fitted on.
    sample_weight : array of shape (n,), default=None
        The weights that it was fitted with, beside ``y``.

    Examples
    --------
    The Hessian of ½ squared error is XᵀX / n, and α / n is Ridge's.

    >>> from sklearn.linear_model import Ridge
    >>> X, y = np.array([[2.0, 0.0], [0.0, 2.0]]), np.array([1.0, 2.0])
    >>> SklearnTwiceDifferentiable(Ridge(alpha=2.0, fit_intercept=False).fit(X, y)).hessian(X, y).tolist()
    [[3.0, 0.0], [0.0, 3.0]]
    """

    @ordinary
    def __init__(self, model: Any, y: Batch = None, sample_weight: Any = None) -> None:
        self.estimator = model
        self.objective = _objective_of(model)
        self.totals: FitTotals | None = None
        # The loss may depend on the fit's totals: `adopt` puts it in its place.
        super().__init__(self.objective.module(), _Unsettled())
        if y is not None:
            targets = self.objective.targets(_plain(y))
            weights = check_sample_weight(sample_weight, len(targets))
            self.adopt(self._totals_of(targets, np.ones(len(targets)) if weights is None else weights))

    # A list is rows.
    reads_pairs_alone = True

    @ordinary
    def at_point(
        self, params: str | Iterable[str] | None = None, dtype: Any = None, device: Device = None
    ) -> SklearnTwiceDifferentiable:
        """Return a copy fixed at today's θ, settings and classes: fitting the estimator again does not reach it."""
        duplicate = super().at_point(params, dtype, device)
        assert isinstance(duplicate, SklearnTwiceDifferentiable)
        # A fit sets attributes anew; what it may write into are coefficients, and those of the module are its own.
        duplicate.estimator = copy.copy(self.estimator)
        duplicate.objective = type(self.objective)(duplicate.estimator)
        return duplicate

    def read(self, data: Batch) -> Any:
        """Return ``(X, y)`` checked as scikit-learn does, in float64, labels as indices; sparse X by rows."""
        data = super().read(data)
        if not isinstance(data, tuple) or len(data) != 2 or data[1] is None:
            must = f"an (X, y) tuple for a {type(self.estimator).__name__}"
            raise TypeError(must_be("data", must, f"a {type(data).__name__}"))
        X, y = map(_plain, data)
        X = validate_data(self.estimator, X, reset=False, dtype=np.float64, accept_sparse="csr")
        targets = self.objective.targets(y) if self.reads_targets else np.zeros(X.shape[0])
        return SparseRows(X) if scipy.sparse.issparse(X) else X, targets

    def settle(self, batches: Iterable[Batch]) -> None:
        """Take n, Σw and the class counts from encoded training data, unless they are known."""
        if self.totals is None and self.reads_targets:
            parts = [(batch[1], weights) for batch, weights in batches]
            targets, weights = (torch.cat(tensors).cpu().numpy() for tensors in zip(*parts, strict=True))
            self.adopt(self._totals_of(targets, weights.astype(np.float64)))

    def adopt(self, totals: Any) -> None:
        """Use the totals of a fit."""
        self.totals = totals
        if totals is not None and isinstance(self.loss, _Unsettled):
            self.loss = self.objective.loss(totals).to(self.dtype, self.device)

    @ordinary
    def grad(self, x: Batch, y: Batch, create_graph: bool = False) -> torch.Tensor:
        """Return the gradient (p,) of L on one batch, which stands for all the data where no other is known."""
        inputs, targets = self.read((x, y))
        inputs = inputs[:] if isinstance(inputs, SparseRows) else torch.from_numpy(inputs)
        inputs, targets = inputs.to(self.device), torch.from_numpy(targets).to(self.device)
        model = copy.copy(self)
        model.settle([((inputs, targets), torch.ones(len(targets), device=targets.device))])
        targets = targets.to(self.dtype) if targets.is_floating_point() else targets
        return super(SklearnTwiceDifferentiable, model).grad(inputs.to(self.dtype), targets, create_graph)

    @property
    def affine(self) -> bool:
        """Whether it is a linear model."""
        return type(self.module) is Affine

    def penalty_diagonal(self) -> torch.Tensor | None:
        """Return the penalty's Hessian (p,), zero for intercepts; None where there is no penalty."""
        if not self.reads_targets:
            return None
        if self.totals is None:
            raise ValueError(must_be("The model's fit", "known for its penalty", "no data yet", "Call `settle`."))
        ridge = np.asarray(self.objective.ridge(self.totals), dtype=np.float64)
        if not ridge.any():
            return None
        parts = [
            # One strength for each output lies along the rows of coef.
            np.broadcast_to(ridge[..., None] if name.startswith("coef") else 0.0, shape).reshape(-1)
            for name, shape in zip(self.layout.names, self.layout.shapes, strict=True)
        ]
        return torch.from_numpy(np.concatenate(parts)).to(self.device, self.dtype)

    def penalty_gradient(self) -> torch.Tensor:
        """Return the penalty's gradient (p,) at θ."""
        theta = torch.cat([tensor.detach().reshape(-1) for tensor in self.theta])
        diagonal = self.penalty_diagonal()
        return torch.zeros_like(theta) if diagonal is None else diagonal * theta

    def _totals_of(self, targets: np.ndarray, weights: np.ndarray) -> FitTotals:
        return FitTotals.of(weights, self.objective.labels(targets), self.objective.n_classes)


class _Unsettled(Loss):
    """Stands for the loss until the fit's totals are known."""

    def per_sample(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        raise ValueError(must_be("The model's fit", "known for its loss", "no data yet", "Call `settle`."))

    def verify(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Leave it to the loss to come."""


def _objective_of(model: Any) -> FittedObjective:
    for base in type(model).__mro__:
        if base in OBJECTIVES:
            _check_fitted(model)
            return OBJECTIVES[base](model)
    accepted = "one of " + ", ".join(kind.__name__ for kind in OBJECTIVES)
    hint = "For another differentiable model: `register_model`."
    raise TypeError(must_be("A scikit-learn model", accepted, f"a {type(model).__name__}", hint))


def _check_fitted(model: Any) -> None:
    try:
        check_is_fitted(model)
    except NotFittedError as error:
        hint = f"Call `fit(X, y)` first; {UNFITTED}"
        raise NotFittedError(must_be(f"The {type(model).__name__}", "fitted", "an unfitted model", hint)) from error


def _plain(value: Any) -> Any:
    """Return tensors, and the rows of a skorch ``SliceDataset``, as arrays."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().numpy()
    if isinstance(value, Sequence) and type(value).__module__.startswith("skorch"):
        return np.stack([np.asarray(row) for row in value])
    return value
