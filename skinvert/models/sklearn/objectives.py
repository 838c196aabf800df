"""What each fitted scikit-learn model minimised: its module, its targets, its loss and its penalty."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import (
    GammaRegressor,
    LinearRegression,
    LogisticRegression,
    LogisticRegressionCV,
    PoissonRegressor,
    Ridge,
    SGDClassifier,
)
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from ..._check import must_be, to_plain_array
from ..._namespaces import to_numpy
from ..._types import Batch
from ..losses import BCEWithLogits, CrossEntropy, Loss, PoissonNLL
from .affine import Affine, Layers
from .losses import HalfGamma, HalfSquaredError, WeightedLogits

__all__ = ["OBJECTIVES", "FitTotals", "FittedObjective"]


@dataclass(frozen=True)
class FitTotals:
    """What the penalty and balanced class weights depend on: sums over the rows that the model was fitted on.

    Attributes
    ----------
    n : int
        Number of rows.
    weight : float
        Σ wᵢ.
    class_counts, class_weights : ndarray of shape (n_classes,)
        Rows, and Σ wᵢ, of each class; of shape (0,) for a regression.
    """

    n: int
    weight: float
    class_counts: np.ndarray
    class_weights: np.ndarray

    @classmethod
    def of(cls, weights: np.ndarray, labels: np.ndarray, n_classes: int) -> FitTotals:
        """Return the sums over rows of these weights (n,) and class indices (n,) or ()."""
        if not n_classes:
            labels = np.zeros(0, dtype=int)
        parts = weights if n_classes else labels
        counts, sums = (np.bincount(labels, w, n_classes) for w in (np.ones(len(labels)), parts))
        return cls(len(weights), float(weights.sum()), counts, sums)


class FittedObjective(ABC):
    """L of one kind of fitted model, on the scale of a mean.

    Parameters
    ----------
    model : estimator
        Fitted.
    """

    n_classes = 0

    def __init__(self, model: Any) -> None:
        self.model = model
        self.check()

    def check(self) -> None:  # noqa: B027 (most have no such setting)
        """Raise for settings whose objective is not twice differentiable, or not L."""

    def module(self) -> nn.Module:
        """Return the model's module in float64."""
        # Of a model that was fitted under `array_api_dispatch` they are of the library of its data.
        intercept = self.model.intercept_ if self.model.fit_intercept else None
        return Affine(to_numpy(self.model.coef_), to_numpy(intercept))

    def targets(self, y: Batch) -> np.ndarray:
        """Return the user's y as the loss takes it."""
        y = to_plain_array(y, "y").astype(np.float64)
        y = y.reshape(len(y), -1) if y.ndim else y
        n_outputs = len(np.atleast_2d(np.asarray(to_numpy(self.model.coef_))))
        if y.ndim != 2 or y.shape[1] != n_outputs:
            raise ValueError(must_be("y", f"of shape (n, {n_outputs}) for this model", f"shape {y.shape}"))
        return y

    def labels(self, targets: np.ndarray) -> np.ndarray:
        """Return the class indices of encoded targets; only for classifiers with class weights."""
        return targets.reshape(-1).astype(int)

    @abstractmethod
    def loss(self, totals: FitTotals) -> Loss:
        """Return the loss of one row."""

    @abstractmethod
    def ridge(self, totals: FitTotals) -> Any:
        """Return the penalty's second derivative in each coefficient: a float, or one for each output."""

    def refuse(self, setting: str, must: str, got: Any, hint: str = "") -> None:
        """Raise for a setting of the model."""
        raise ValueError(must_be(f"{setting} of a {type(self.model).__name__}", must, got, hint))


class LeastSquares(FittedObjective):
    """½ squared error, summed over the outputs; Ridge's α / (2 Σw) ‖W‖²."""

    def check(self) -> None:
        """Refuse a constrained fit."""
        if self.model.get_params(deep=False).get("positive", False):
            self.refuse("positive", "False", "True", "A constrained fit is no stationary point of L.")

    def loss(self, totals: FitTotals) -> Loss:
        """Return the half squared error."""
        return HalfSquaredError()

    def ridge(self, totals: FitTotals) -> Any:
        """Return α / Σw, per output where α is."""
        return np.asarray(self.model.get_params(deep=False).get("alpha", 0.0), dtype=np.float64) / totals.weight


class GLM(FittedObjective):
    """Half the deviance with the logarithm as link; α ‖w‖² / 2."""

    def targets(self, y: Batch) -> np.ndarray:
        """Return y (n, 1), in the range of the deviance."""
        y = super().targets(y)
        gamma = isinstance(self.model, GammaRegressor)
        if len(y) and (y.min() < 0 or (gamma and y.min() == 0)):
            raise ValueError(must_be("y", "positive" if gamma else "non-negative", f"{y.min():.3g}"))
        return y

    def loss(self, totals: FitTotals) -> Loss:
        """Return eᶠ − y f, or f + y e⁻ᶠ."""
        return HalfGamma() if isinstance(self.model, GammaRegressor) else _poisson()

    def ridge(self, totals: FitTotals) -> Any:
        """Return α."""
        return self.model.alpha


class Classification(FittedObjective):
    """What classifiers share: labels in the model's own ``classes_``."""

    def __init__(self, model: Any) -> None:
        self.classes = np.asarray(to_numpy(model.classes_))
        self.n_classes = len(self.classes)
        super().__init__(model)

    def targets(self, y: Batch) -> np.ndarray:
        """Return class indices (n,) for a softmax, 0 or 1 (n, c) for logits."""
        index = encode(y, self.classes)
        if self.is_softmax:
            return index
        if self.n_classes == 2:
            return index[:, None].astype(np.float64)
        return np.eye(self.n_classes)[index]

    def labels(self, targets: np.ndarray) -> np.ndarray:
        """Return the class indices of encoded targets."""
        one_hot = targets.ndim == 2 and targets.shape[1] > 1
        return targets.argmax(1) if one_hot else super().labels(targets)

    @property
    def is_softmax(self) -> bool:
        """Whether the outputs are the logits of a softmax."""
        return self.n_classes > 2

    def class_weight(self, counts: np.ndarray) -> np.ndarray:
        """Return c (n_classes,); ``counts`` are what "balanced" balances."""
        given, classes = self.model.class_weight, self.classes
        if not (isinstance(given, str) and given == "balanced"):
            return compute_class_weight(given, classes=classes, y=classes)
        if not (counts > 0).all():
            missing = list(classes[counts == 0])
            must = 'with rows of every class for class_weight="balanced"'
            raise ValueError(must_be("The data", must, f"none of {missing}"))
        return counts.sum() / (len(classes) * counts)


class Logistic(Classification):
    """Σ wᵢcᵢ(−log pᵢ) / Σ wᵢcᵢ + 1 / (2 C Σ wᵢcᵢ) ‖W‖²: one row of coefficients for two classes, else a softmax."""

    def check(self) -> None:
        """Refuse L1, liblinear's penalised intercept, one-versus-rest."""
        model = self.model
        if isinstance(model, LogisticRegressionCV):
            self.refuse("The model instead", "a LogisticRegression", "a search", "Try its `C_` in one.")
        settings = model.get_params(deep=False)
        penalty, ratio = settings.get("penalty", "deprecated"), model.l1_ratio
        if penalty in ("l1", "elasticnet") or (penalty == "deprecated" and ratio):
            self.refuse("penalty", "l2 or none", penalty if penalty != "deprecated" else f"l1_ratio={ratio}")
        if model.solver == "liblinear" and (model.fit_intercept or self.n_classes > 2):
            hint = 'It penalises the intercept. Try solver="lbfgs", or fit_intercept=False.'
            self.refuse("solver", "another one where there is an intercept", "'liblinear'", hint)
        if settings.get("multi_class", "deprecated") not in ("auto", "deprecated", "warn"):
            self.refuse("multi_class", "left at its default", repr(model.multi_class))

    def loss(self, totals: FitTotals) -> Loss:
        """Return the cross-entropy with class weights, which count in its mean."""
        c = self._class_weight(totals)
        if self.is_softmax:
            return CrossEntropy(nn.CrossEntropyLoss(weight=None if (c == 1).all() else torch.from_numpy(c)))
        return _logits(c[:1], c[1:], weights_count=True)

    def ridge(self, totals: FitTotals) -> Any:
        """Return 1 / (C Σ wᵢcᵢ)."""
        if self.model.get_params(deep=False).get("penalty", "deprecated") is None:
            return 0.0
        return 1.0 / (self.model.C * float(totals.class_weights @ self._class_weight(totals)))

    def _class_weight(self, totals: FitTotals) -> np.ndarray:
        # Older scikit-learn balances rows, newer weights.
        weighted = "sample_weight" in inspect.signature(compute_class_weight).parameters
        return self.class_weight(totals.class_weights if weighted else totals.class_counts)


class SGDLogistic(Classification):
    """Σ wᵢ Σ_k cᵢₖ ℓᵢₖ / Σ wᵢ + ½ α n/Σw ‖W‖²: one logit, or one a class against the rest.

    ``SGDClassifier`` divides by n, not by Σw, so that its α is relative to a weight of one.
    """

    is_softmax = False

    def check(self) -> None:
        """Refuse other losses and L1."""
        if self.model.loss != "log_loss":
            self.refuse("loss", "'log_loss'", repr(self.model.loss), "It has no second derivative everywhere.")
        if self.model.penalty not in ("l2", None):
            self.refuse("penalty", "'l2' or None", repr(self.model.penalty))

    def loss(self, totals: FitTotals) -> Loss:
        """Return the logistic loss of each logit; against the rest a class's weight is that of its own rows."""
        c = self.class_weight(totals.class_counts)
        if self.n_classes == 2:
            return _logits(c[:1], c[1:], weights_count=False)
        return _logits(np.ones_like(c), c, weights_count=False)

    def ridge(self, totals: FitTotals) -> Any:
        """Return α n / Σw."""
        return 0.0 if self.model.penalty is None else self.model.alpha * totals.n / totals.weight


class Perceptron(FittedObjective):
    """The loss that scikit-learn's back-propagation differentiates, summed over outputs; α ‖coefs‖² / (2 Σw).

    With "sgd" and "adam" every step divides the penalty by its minibatch of b rows: n/b times as much in the mean.
    """

    def module(self) -> nn.Module:
        """Return the layers."""
        return Layers(self.model.coefs_, self.model.intercepts_, self.model.activation)

    def targets(self, y: Batch) -> np.ndarray:
        """Return class indices for a softmax, 0 or 1 for logits, floats (n, c) for a regression."""
        out, n_outputs = self.model.out_activation_, self.model.n_outputs_
        if out == "softmax":
            return encode(y, self.model.classes_)
        if out == "logistic" and n_outputs == 1:
            return encode(y, self.model.classes_)[:, None].astype(np.float64)
        y = to_plain_array(y, "y").astype(np.float64)
        y = y.reshape(len(y), -1) if y.ndim else y
        if y.ndim != 2 or y.shape[1] != n_outputs:
            raise ValueError(must_be("y", f"of shape (n, {n_outputs}) for this model", f"shape {y.shape}"))
        if out == "logistic" and not np.isin(y, (0, 1)).all():
            raise ValueError(must_be("y", "0 or 1 for several labels", "other values"))
        if out == "exp" and len(y) and y.min() < 0:
            raise ValueError(must_be("y", "non-negative", f"{y.min():.3g}"))
        return y

    def loss(self, totals: FitTotals) -> Loss:
        """Return the cross-entropy, the logistic loss, the half squared error or half the Poisson deviance."""
        ones = np.ones(self.model.n_outputs_)
        return {
            "softmax": CrossEntropy,
            "logistic": lambda: _logits(ones, ones, weights_count=False),
            "identity": HalfSquaredError,
            "exp": _poisson,
        }[self.model.out_activation_]()

    def ridge(self, totals: FitTotals) -> Any:
        """Return α / Σw, times n/b for minibatches of b rows."""
        if self.model.solver == "lbfgs":
            return self.model.alpha / totals.weight
        batch_size = 200 if self.model.batch_size == "auto" else self.model.batch_size
        return self.model.alpha / totals.weight * totals.n / min(batch_size, totals.n)


OBJECTIVES: dict[type, type[FittedObjective]] = {
    LinearRegression: LeastSquares,
    Ridge: LeastSquares,
    LogisticRegression: Logistic,
    SGDClassifier: SGDLogistic,
    PoissonRegressor: GLM,
    GammaRegressor: GLM,
    MLPClassifier: Perceptron,
    MLPRegressor: Perceptron,
}


def encode(y: Batch, classes: np.ndarray) -> np.ndarray:
    """Return the indices (n,) of labels in ``classes_``."""
    y = np.asarray(y)
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    if y.ndim != 1:
        raise ValueError(must_be("y", "a 1D array of labels", f"an array of shape {y.shape}"))
    index = {label: i for i, label in enumerate(classes.tolist())}
    unknown = sorted({label for label in y.tolist() if label not in index}, key=str)
    if unknown:
        shown = ", ".join(map(repr, unknown[:5]))
        raise ValueError(must_be("y", f"labels among the model's classes_ {classes.tolist()}", shown))
    return np.array([index[label] for label in y.tolist()], dtype=np.int64)


def _logits(negative: np.ndarray, positive: np.ndarray, weights_count: bool) -> Loss:
    if (negative == 1).all() and (positive == 1).all():
        return BCEWithLogits(nn.BCEWithLogitsLoss(reduction="sum"))
    return WeightedLogits(negative, positive, weights_count)


def _poisson() -> Loss:
    return PoissonNLL(nn.PoissonNLLLoss(log_input=True, full=False, reduction="sum"))
