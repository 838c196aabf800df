"""Squared error."""

from __future__ import annotations

import math

import torch
from torch import nn

from .module import ModuleLoss
from .output_hessians import DiagonalHessian, OutputHessian
from .predictive import IndependentLabels

__all__ = ["MSE", "Gaussian"]


class Gaussian(IndependentLabels):
    """Squared error (f − y)²: unit variance, s = 2."""

    def fisher(self) -> OutputHessian:
        """Return 2 for each output."""
        return DiagonalHessian(2.0 * self.weight)

    def score(self, f: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Return √2 (y − f)."""
        return math.sqrt(2) * torch.special.ndtri(u)


class MSE(ModuleLoss):
    """``nn.MSELoss``: (f − y)² of each output."""

    name = "mse"
    squares_residuals = True
    modules = (nn.MSELoss,)
    module: nn.MSELoss

    def closed_form(self, f: torch.Tensor, y: torch.Tensor) -> OutputHessian:
        """Return 2."""
        return self.distribution(f, y).fisher()

    def distribution(self, f: torch.Tensor, y: torch.Tensor) -> Gaussian:
        """Return a Gaussian of unit variance about each output."""
        return Gaussian(f)
