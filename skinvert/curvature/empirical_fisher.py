"""The empirical Fisher of the true labels."""

from __future__ import annotations

from typing import ClassVar

import torch

from .._progress import progress
from .._types import Batch
from ..models import FactoredHessian
from .columns import Columns
from .layered import Layered
from .layers import Signals

__all__ = ["EmpiricalFisher"]


class EmpiricalFisher(Layered):
    r"""E = Σᵢ wᵢ gᵢgᵢᵀ / Σᵢ wᵢ + penalty, with gᵢ = ∇ℓᵢ of the true labels, the penalty left out of gᵢ.

    Neither the Fisher nor the Gauss–Newton matrix: its size follows the residuals, and at an interpolating minimum it
    is zero.

    References
    ----------
    Kunstner, Balles & Hennig (2019), "Limitations of the empirical Fisher approximation", eq. 3.
    """

    name: ClassVar[str] = "empirical_fisher"

    def factor_of(self, batch: Batch, weights: torch.Tensor) -> torch.Tensor:
        """Return √wᵢ gᵢᵀ (m, 1, p)."""
        return (self.objective.gradients(batch) * weights.sqrt()[:, None])[:, None]

    def gradient_rows(self, verbose: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gᵢ (n, p), and wᵢ/Σw (n,)."""
        batches = progress(self.objective.batches, "per-sample gradients", verbose)
        parts = [(self.objective.gradients(batch), weights / self.objective.weight_sum) for batch, weights in batches]
        return torch.cat([rows for rows, _ in parts]), torch.cat([weights for _, weights in parts])

    def signals(self, batch: Batch, weights: torch.Tensor) -> Signals:
        """Return √wᵢ at each row's own loss ℓᵢ."""
        model = self.objective.model
        outputs = model.forward(batch)
        losses = model.per_sample_loss(outputs, batch)
        factor = FactoredHessian(torch.full_like(losses.detach(), self.objective.scale)[:, None, None])
        return Signals(losses, Columns(factor, weights.to(losses), losses.shape), model.mass(outputs, batch))
