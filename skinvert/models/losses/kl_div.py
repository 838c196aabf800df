"""The Kullback–Leibler divergence from log-probabilities."""

from __future__ import annotations

import torch
from torch import nn

from .module import ModuleLoss
from .output_hessians import DiagonalHessian, OutputHessian

__all__ = ["KLDiv"]


class KLDiv(ModuleLoss):
    """``nn.KLDivLoss``: y (log y − f) of each output, linear in them.

    It has no name as ``loss=``: torch's default ``reduction``, a mean over the outputs too, is no divergence.
    """

    modules = (nn.KLDivLoss,)
    module: nn.KLDivLoss

    def closed_form(self, f: torch.Tensor, y: torch.Tensor) -> OutputHessian:
        """Return zero."""
        return DiagonalHessian(torch.zeros_like(f))
