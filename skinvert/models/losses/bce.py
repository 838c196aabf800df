"""Binary cross-entropy, of logits and of probabilities."""

from __future__ import annotations

import torch
from torch import nn

from .base import Outputs, check_same_shape, check_unit_interval
from .module import ModuleLoss
from .output_hessians import DiagonalHessian, OutputHessian
from .predictive import IndependentLabels

__all__ = ["BCE", "BCEWithLogits", "Bernoulli", "BernoulliOfProbabilities"]


class Bernoulli(IndependentLabels):
    """Logits of one label each: s = 1."""

    def fisher(self) -> OutputHessian:
        """Return ω p (1 − p)."""
        return DiagonalHessian(self.f.sigmoid() * (-self.f).sigmoid() * self.weight)

    def score(self, f: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Return p − y."""
        p = f.sigmoid()
        return p - (u < p).to(f.dtype)


class BCEWithLogits(ModuleLoss):
    """``nn.BCEWithLogitsLoss``: −w (c y log p + (1 − y) log(1 − p)) of each logit, w its weight, c its pos_weight."""

    name = "bce_with_logits"
    modules = (nn.BCEWithLogitsLoss,)
    module: nn.BCEWithLogitsLoss

    def closed_form(self, f: torch.Tensor, y: torch.Tensor) -> OutputHessian:
        """Return the Fisher: the label counts by what it weighs alone."""
        return self.distribution(f, y).fisher()

    def distribution(self, f: torch.Tensor, y: torch.Tensor) -> Bernoulli:
        """Return a label for each logit, of weight w (1 + (c − 1) y)."""
        weight = torch.ones_like(f)
        if self.module.pos_weight is not None:
            weight = weight * (1 + (self.module.pos_weight - 1) * y)
        return Bernoulli(f, weight if self.module.weight is None else weight * self.module.weight)

    def check_targets(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Raise for targets of another shape, or that are no probabilities."""
        check_same_shape(output, target)
        check_unit_interval(output, target)


class BernoulliOfProbabilities(IndependentLabels):
    """Probabilities of one label each: s = 1."""

    def fisher(self) -> OutputHessian:
        """Return ω / f + ω / (1 − f), without the term of a label that is never drawn."""
        f = self.f
        terms = torch.where(f > 0, 1 / f, 0.0) + torch.where(f < 1, 1 / (1 - f), 0.0)
        return DiagonalHessian(self.weight * terms)

    def score(self, f: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Return (f − y) / (f (1 − f)): 1 / f or 1 / (1 − f), of what is drawn alone."""
        return torch.where(u < f, -1 / f, 1 / (1 - f))


class BCE(ModuleLoss):
    """``nn.BCELoss``: −w (y log f + (1 − y) log(1 − f)) of each probability f."""

    name = "bce"
    modules = (nn.BCELoss,)
    module: nn.BCELoss

    def distribution(self, f: torch.Tensor, y: torch.Tensor) -> BernoulliOfProbabilities:
        """Return a label for each probability, of weight w."""
        weight = torch.ones_like(f)
        return BernoulliOfProbabilities(f, weight if self.module.weight is None else weight * self.module.weight)

    def check_targets(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Raise for targets of another shape, or that are no probabilities."""
        check_same_shape(output, target)
        check_unit_interval(output, target)

    @property
    def takes(self) -> Outputs:
        """What the outputs are."""
        return "probabilities"
