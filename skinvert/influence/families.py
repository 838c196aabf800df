"""What a loss says of its targets: the mean that outputs stand for, and how they scatter about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from .._check import must_be
from .._types import Batch
from ..models import TorchTwiceDifferentiable
from ..models.losses.bce import Bernoulli, BernoulliOfProbabilities
from ..models.losses.cross_entropy import Categorical
from ..models.losses.mse import Gaussian
from ..models.losses.nll import LogProbabilities, Probabilities
from ..models.losses.poisson import PoissonLog, PoissonRate
from ..models.sklearn.losses import HalfGamma, UnitGaussian, WeightedLogits

__all__ = ["Family", "Mean", "family_of", "mean_of", "predicted"]

# Outputs (m, ...) to the means of the targets, of the same shape.
Mean: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Family:
    """Targets about a mean with variance φ V(mean), whose negative log-likelihood at φ = 1 is s/``scale`` + const.

    The link is the canonical one: the second derivative of s in an output is ``scale`` times V.

    Parameters
    ----------
    scale : float
        2 for (f − y)², which torch's mse does not halve.
    dispersion : float or None
        φ; None where it is estimated.
    """

    scale: float
    dispersion: float | None


FAMILIES: dict[type, Family] = {
    Gaussian: Family(2.0, None),
    UnitGaussian: Family(1.0, None),
    Bernoulli: Family(1.0, 1.0),
    WeightedLogits: Family(1.0, 1.0),
    PoissonLog: Family(1.0, 1.0),
}
MEANS: dict[type, Mean] = {
    Gaussian: torch.clone,
    UnitGaussian: torch.clone,
    Bernoulli: torch.sigmoid,
    WeightedLogits: torch.sigmoid,
    BernoulliOfProbabilities: torch.clone,
    Categorical: lambda f: f.softmax(1),
    LogProbabilities: torch.exp,
    Probabilities: torch.clone,
    PoissonLog: torch.exp,
    PoissonRate: torch.clone,
    HalfGamma: torch.exp,
}
OF_CLASSES = (Bernoulli, WeightedLogits, BernoulliOfProbabilities, Categorical, LogProbabilities, Probabilities)


def family_of(model: TorchTwiceDifferentiable, outputs: torch.Tensor, batch: Batch) -> Family:
    """Return how the targets of a batch scatter; TypeError where the loss does not say."""
    kind = _kind(model, outputs, batch)
    if kind not in FAMILIES:
        must = "squared error, a logistic loss or Poisson's of logarithms for residuals with a dispersion"
        raise TypeError(must_be("The loss", must, _loss(model), "`leverage()` takes any convex loss."))
    return FAMILIES[kind]


def mean_of(model: TorchTwiceDifferentiable, outputs: torch.Tensor, batch: Batch) -> Mean:
    """Return what makes means of the targets of outputs; TypeError where the loss does not say."""
    kind = _kind(model, outputs, batch)
    if kind not in MEANS:
        hint = 'Try scale="link", the outputs as they are.'
        raise TypeError(must_be('The loss for scale="response"', "a known likelihood", _loss(model), hint))
    return MEANS[kind]


def predicted(model: TorchTwiceDifferentiable, outputs: torch.Tensor, batch: Batch) -> Mean:
    """Return what makes predictions of real targets, one a row, of outputs: these, unless the loss has a link.

    TypeError for classes and several outputs.
    """
    kind, targets = _kind(model, outputs, batch), batch[1] if isinstance(batch, tuple) else None
    real = isinstance(targets, torch.Tensor) and targets.is_floating_point() and targets.shape == outputs.shape
    if not real or outputs[0].numel() != 1 or issubclass(kind, OF_CLASSES):
        got = f"outputs of shape {tuple(outputs.shape)} with {_loss(model)}"
        raise TypeError(must_be("The model for jackknife_plus", "a regression with one real target a row", got))
    return MEANS.get(kind, torch.clone)


def _kind(model: TorchTwiceDifferentiable, outputs: torch.Tensor, batch: Batch) -> type:
    """Return the class of the labels' distribution, or of the loss where it has none."""
    found = model.predictive(outputs, batch)
    if found is not None:
        return type(found)
    return type(model) if model.own_loss else type(model.loss)


def _loss(model: TorchTwiceDifferentiable) -> str:
    return f"the own one of a {type(model).__name__}" if model.own_loss else str(model.loss)
