"""Losses that are quadratic near zero and linear further out."""

from __future__ import annotations

import torch
from torch import nn

from .module import ModuleLoss
from .output_hessians import DiagonalHessian, OutputHessian

__all__ = ["Huber", "SmoothL1"]


class Huber(ModuleLoss):
    """``nn.HuberLoss``: ½ (f − y)² where |f − y| < δ, else δ (|f − y| − ½ δ)."""

    name = "huber"
    modules = (nn.HuberLoss,)
    module: nn.HuberLoss

    def closed_form(self, f: torch.Tensor, y: torch.Tensor) -> OutputHessian:
        """Return 1 where it is quadratic."""
        return DiagonalHessian(((f - y).abs() < self.module.delta).to(f.dtype))


class SmoothL1(ModuleLoss):
    """``nn.SmoothL1Loss``: Huber's with δ = β, over β."""

    name = "smooth_l1"
    modules = (nn.SmoothL1Loss,)
    module: nn.SmoothL1Loss

    def closed_form(self, f: torch.Tensor, y: torch.Tensor) -> OutputHessian | None:
        """Return 1 / β where it is quadratic; None for the absolute error, β = 0."""
        beta = self.module.beta
        return DiagonalHessian(((f - y).abs() < beta).to(f.dtype) / beta) if beta > 0 else None
