"""A trained model that ``clone`` shares, for a model inside a ``param_grid``."""

from __future__ import annotations

from typing import Any

from sklearn.base import BaseEstimator

__all__ = ["UNFITTED", "SharedModel"]

UNFITTED = (
    "`clone` of a fitted model is unfitted: inside a `param_grid` try `SharedModel(model)` or `FrozenEstimator(model)`."
)


class SharedModel(BaseEstimator):
    """A trained model as a value that scikit-learn neither copies nor resets.

    A search clones the values of its ``param_grid``: a module would be copied, a fitted estimator would come back
    unfitted. ``SharedModel(model)`` is its own clone; for estimators scikit-learn's ``FrozenEstimator`` is as good.

    Parameters
    ----------
    model : nn.Module, skorch net, fitted scikit-learn model or TwiceDifferentiable
        The model.

    Examples
    --------
    >>> import torch
    >>> from sklearn.base import clone
    >>> shared = SharedModel(torch.nn.Linear(1, 1))
    >>> clone({"model": [shared]}["model"], safe=False)[0].model is shared.model
    True
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the model; never its own parameters, which would let a search change it."""
        return {"model": self.model}

    def __sklearn_clone__(self) -> SharedModel:
        """Share it."""
        return self

    def __sklearn_is_fitted__(self) -> bool:
        """Say that there is nothing to fit."""
        return True
