"""The modules of scikit-learn's models, with its names, shapes and order of parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse
import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["Affine", "Layers"]

ACTIVATIONS = {"identity": nn.Identity, "logistic": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}


class Affine(nn.Module):
    """Z = X coefᵀ + intercept: ``nn.Linear`` in scikit-learn's words, in float64.

    Parameters
    ----------
    coef : array of shape (c, d) or (d,)
        Dense or sparse.
    intercept : array of shape (c,), float or None
        None where there is none to train.
    """

    def __init__(self, coef: Any, intercept: Any = None) -> None:
        super().__init__()
        coef = np.atleast_2d(coef.toarray() if scipy.sparse.issparse(coef) else coef)
        self.coef = _parameter(coef)
        self.register_parameter("intercept", None)
        if intercept is not None:
            self.intercept = _parameter(np.broadcast_to(intercept, len(coef)))

    @property
    def weight(self) -> torch.Tensor:
        """The weights (c, d), as ``nn.Linear`` calls them."""
        return self.coef

    @property
    def bias(self) -> torch.Tensor | None:
        """The biases (c,), as ``nn.Linear`` calls them."""
        return self.intercept

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return Z (m, c)."""
        return F.linear(x, self.coef, self.intercept)


class Layers(nn.Module):
    """A multi-layer perceptron up to its last activation: all ``coefs`` (in, out) first, then all ``intercepts``.

    Parameters
    ----------
    coefs, intercepts : sequence of arrays
        As a fitted ``MLPClassifier`` has them.
    activation : {"identity", "logistic", "tanh", "relu"}
        Between the layers.
    """

    def __init__(self, coefs: Sequence[Any], intercepts: Sequence[Any], activation: str) -> None:
        super().__init__()
        self.coefs = nn.ParameterList([_parameter(coef) for coef in coefs])
        self.intercepts = nn.ParameterList([_parameter(intercept) for intercept in intercepts])
        self.activation = ACTIVATIONS[activation]()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the last layer's values (m, c)."""
        last = len(self.coefs) - 1
        for i, (coef, intercept) in enumerate(zip(self.coefs, self.intercepts, strict=True)):
            x = x @ coef + intercept
            x = x if i == last else self.activation(x)
        return x


def _parameter(value: Any) -> nn.Parameter:
    # A copy: the user's model may go on training in place.
    return nn.Parameter(torch.from_numpy(np.array(value, dtype=np.float64, order="C", copy=True)))
