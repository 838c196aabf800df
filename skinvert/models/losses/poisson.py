"""The negative log-likelihood of counts, of logarithms of rates or of rates."""

from __future__ import annotations

import scipy.stats
import torch
from torch import nn

from ..._check import must_be
from .base import check_same_shape
from .module import ModuleLoss
from .output_hessians import DiagonalHessian, OutputHessian
from .predictive import IndependentLabels

__all__ = ["PoissonLog", "PoissonNLL", "PoissonRate"]


class PoissonLog(IndependentLabels):
    """Logarithms of rates: s = 1."""

    def fisher(self) -> OutputHessian:
        """Return the rates."""
        return DiagonalHessian(self.f.exp())

    def score(self, f: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Return rate − y."""
        rate = f.exp()
        return rate - _counts(rate, u)


class PoissonRate(IndependentLabels):
    """Rates themselves, to which the loss adds its ``eps``: s = 1."""

    def __init__(self, f: torch.Tensor, eps: float) -> None:
        super().__init__(f)
        self.eps = eps
        if bool((f < 0).any()):
            hint = 'Try log_input=True, or curvature="ggn".'
            raise ValueError(must_be("The rates of poisson_nll", "non-negative", f"{float(f.min()):.3g}", hint))

    def fisher(self) -> OutputHessian:
        """Return E[y] / (f + eps)²."""
        return DiagonalHessian(self.f / (self.f + self.eps).square())

    def score(self, f: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Return (rate − y) / (f + eps)."""
        return (f - _counts(f, u)) / (f + self.eps)


class PoissonNLL(ModuleLoss):
    """``nn.PoissonNLLLoss``: eᶠ − y f of logarithms f; f − y log(f + eps) of rates f, with ``log_input=False``."""

    name = "poisson_nll"
    modules = (nn.PoissonNLLLoss,)
    module: nn.PoissonNLLLoss

    def closed_form(self, f: torch.Tensor, y: torch.Tensor) -> OutputHessian:
        """Return eᶠ, or y / (f + eps)²."""
        return DiagonalHessian(f.exp() if self.module.log_input else y / (f + self.module.eps).square())

    def distribution(self, f: torch.Tensor, y: torch.Tensor) -> PoissonLog | PoissonRate:
        """Return a count for each output."""
        return PoissonLog(f) if self.module.log_input else PoissonRate(f, self.module.eps)

    def check_targets(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Raise for targets of another shape, or below zero."""
        check_same_shape(output, target)
        y = target.to(output.dtype)
        if y.numel() and y.min() < 0:
            raise ValueError(must_be("y", "non-negative for poisson_nll", f"{y.min():.3g}"))


def _counts(rate: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Return counts (m, r, c), by the inverse of the distribution function."""
    rates = rate.expand(u.shape).double().cpu().numpy()
    return torch.from_numpy(scipy.stats.poisson.ppf(u.double().cpu().numpy(), rates)).to(rate)
