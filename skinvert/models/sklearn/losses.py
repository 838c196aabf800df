"""The losses that scikit-learn has and torch has not: halves, class weights on one logit, the Gamma deviance."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from ..losses import DiagonalHessian, Loss, OutputHessian
from ..losses.predictive import IndependentLabels

__all__ = ["HalfGamma", "HalfSquaredError", "UnitGaussian", "WeightedLogits"]


class UnitGaussian(IndependentLabels):
    """Half squared error ½ (f − y)²: unit variance, s = 1."""

    def fisher(self) -> OutputHessian:
        """Return 1 for each output."""
        return DiagonalHessian(self.weight)

    def score(self, f: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Return y − f."""
        return torch.special.ndtri(u)


class HalfSquaredError(Loss):
    """s = ½ Σ (f − y)² over the outputs."""

    squares_residuals = True

    def per_sample(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return s (m,)."""
        return 0.5 * (output - target).square().sum(1)

    def output_hessian(self, output: torch.Tensor, target: torch.Tensor) -> OutputHessian:
        """Return the identity."""
        return self.predictive(output.detach(), target).fisher()

    def predictive(self, output: torch.Tensor, target: torch.Tensor) -> UnitGaussian:
        """Return a Gaussian of unit variance about each output."""
        return UnitGaussian(output)


class HalfGamma(Loss):
    """s = Σ f + y e⁻ᶠ: half the Gamma deviance of y and the mean eᶠ, up to what does not depend on f."""

    def per_sample(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return s (m,)."""
        return (output + target * torch.exp(-output)).sum(1)

    def output_hessian(self, output: torch.Tensor, target: torch.Tensor) -> OutputHessian:
        """Return y e⁻ᶠ on the diagonal."""
        return DiagonalHessian(target * torch.exp(-output.detach()))


class WeightedLogits(Loss):
    """s = Σ c (log(1 + eᶠ) − y f) over the logits, c = c₁ where y = 1 and c₀ where y = 0.

    Parameters
    ----------
    negative, positive : tensor of shape (c,)
        c₀ and c₁ of each logit.
    weights_count : bool
        Whether the weights are part of the denominator of L, as in a weighted mean.
    """

    def __init__(self, negative: np.ndarray, positive: np.ndarray, weights_count: bool) -> None:
        self.negative, self.positive = torch.as_tensor(negative, device="cpu"), torch.as_tensor(positive, device="cpu")
        self.weights_count = weights_count

    def per_sample(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return s (m,)."""
        return (self._weights(target) * (F.softplus(output) - target * output)).sum(1)

    def mass(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return c (m,), or 1."""
        return self._weights(target).sum(1) if self.weights_count else super().mass(output, target)

    def output_hessian(self, output: torch.Tensor, target: torch.Tensor) -> OutputHessian:
        """Return c p (1 − p) on the diagonal."""
        f = output.detach()
        return DiagonalHessian(self._weights(target) * f.sigmoid() * (-f).sigmoid())

    def _weights(self, target: torch.Tensor) -> torch.Tensor:
        return torch.where(target > 0.5, self.positive, self.negative)
