"""What is measured of a retrained model on each test row: its loss, or what the user asks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch

from .._autograd import ordinary
from .._check import must_be
from .._types import Array
from ..curvature import Objective
from ..data import batches_of, count
from ..models import TorchTwiceDifferentiable, as_model

__all__ = ["Measurement", "RowLoss", "as_measurement", "measured"]

# (model, X_test, y_test) -> (n_test,)
Measurement: TypeAlias = Callable[[Any, Array, Array], Array]


class RowLoss:
    r"""The loss ℓᵢ of each row of a model, on the scale of a training loss whose terms a fit has settled.

    ℓᵢ = κ sᵢ, with the loss sᵢ of a single row and κ as in ``PerSampleGradient``, whose rows are its gradients: 1/c for
    ``mse`` over c outputs, the mean class weight for a weighted cross-entropy. The penalty is left out.

    Parameters
    ----------
    loss : str, torch loss module, Loss or callable, default=None
        Of a bare module, as for ``HessianInverter``; other models bring their own.

    Attributes
    ----------
    scale_ : float
        κ.

    Examples
    --------
    >>> from sklearn.linear_model import Ridge
    >>> X, y = np.eye(2), np.array([1.0, 3.0])
    >>> model = Ridge(fit_intercept=False).fit(X, y)  # its coefficients are y / 2
    >>> RowLoss().fit(model, X, y)(model, X, y)
    array([0.125, 1.125])
    """

    def __init__(self, loss: object = None) -> None:
        self.loss = loss

    @ordinary
    def fit(self, model: object, X: Array, y: Array, sample_weight: object = None) -> RowLoss:
        """Record κ, and what else the loss of one row takes from the training rows (class counts), of a model."""
        adapted = self._adapted(model)
        objective = Objective(adapted, batches_of(adapted, (X, y), sample_weight=sample_weight, hold=False))
        self.scale_, self._totals = objective.scale, adapted.totals
        return self

    @ordinary
    def __call__(self, model: object, X: Array, y: Array) -> np.ndarray:
        """Return ℓ (m,) of rows ``X, y``, in float64, at the parameters of ``model``."""
        adapted = self._adapted(model)
        adapted.adopt(self._totals)
        batches = batches_of(adapted, (X, y), needs_row_order=True, hold=False)
        parts = [adapted.per_sample_loss(adapted.forward(batch), batch).detach() for batch, _ in batches]
        return self.scale_ * torch.cat(parts).double().cpu().numpy()

    def _adapted(self, model: object) -> TorchTwiceDifferentiable:
        adapted = as_model(model, self.loss)
        if not isinstance(adapted, TorchTwiceDifferentiable):
            hint = "Try a callable: measurement=lambda model, X, y: ..., one number a row."
            got = f"a {type(adapted).__name__}"
            raise TypeError(must_be('The model for measurement="loss"', "one with per-sample losses", got, hint))
        return adapted.at_point()


def as_measurement(
    measurement: str | Measurement, loss: object, model: object, X: Array, y: Array, sample_weight: np.ndarray | None
) -> Measurement:
    """Return what ``measurement`` names, settled by the model trained on all rows; a callable as it is."""
    if isinstance(measurement, str) and measurement == "loss":
        return RowLoss(loss).fit(model, X, y, sample_weight)
    if not callable(measurement):
        must = '"loss", or a callable (model, X_test, y_test) -> (n_test,)'
        raise ValueError(must_be("measurement", must, repr(measurement)))
    if loss is not None:
        raise ValueError(must_be("loss", "None beside a measurement of one's own", repr(loss)))
    return measurement


def measured(measurement: Measurement, model: object, X_test: Array, y_test: Array) -> np.ndarray:
    """Return the measurement of a model on the test rows (n_test,) in float64, checked."""
    values = measurement(model, X_test, y_test)
    values = np.asarray(values.detach().cpu() if isinstance(values, torch.Tensor) else values, dtype=np.float64)
    expected = (count((X_test, y_test))[0],)
    if values.shape != expected:
        must = f"of shape {expected}, one number per test row"
        raise ValueError(must_be("The measurement", must, f"shape {values.shape}"))
    if not np.isfinite(values).all():
        hint = "Did the retrained model diverge, or lose a class?"
        raise ValueError(must_be("The measurement", "finite", "NaN or infinity", hint))
    return values
