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
from .products import Products, Share, both_passes, flat_products, forward_products

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

    def graph(self, batch: Batch, weights: torch.Tensor) -> Products:
        """Return the products Σ wᵢ gᵢ(gᵢᵀv) over one batch: along the losses, and back, with no row's gradient made."""
        losses, theta, eps = self.objective.losses(batch), self.objective.model.theta, self.objective.eps
        along, back = forward_products(losses[:, None], theta, eps), flat_products(losses, theta, eps)
        return lambda V: back(along(V)[..., 0] * weights)

    def share(self, batch: Batch, weights: torch.Tensor, many: bool) -> Products:
        """Return the products by the operations of both passes, where they have rules; else ``graph``."""
        passes = None
        if many and self._has_rules:
            name, proven = self._known(batch)
            passes = both_passes(lambda: self.objective.losses(batch), self.objective.model.theta, proven)
            self._has_rules = passes is not None
            self._proven |= set() if passes is None else {name}
        if passes is None:
            return self.graph(batch, weights)
        return Share(lambda V: passes.through(V, lambda U: U * weights[:, None]), passes.nbytes, alone=True)

    def gradient_rows(self, verbose: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the gᵢ (n, p), and wᵢ/Σw (n,)."""
        rows = torch.empty(self.n_samples, self.size, dtype=self.dtype, device=self.device)
        shares: list[torch.Tensor] = []
        start = 0
        for batch, weights in progress(self.objective.batches, "per-sample gradients", verbose):
            # Not joined at the end: n p numbers are held once.
            rows[start : start + len(weights)] = self.objective.gradients(batch)
            shares.append(weights / self.objective.weight_sum)
            start += len(weights)
        return rows[:start], torch.cat(shares)

    def signals(self, batch: Batch, weights: torch.Tensor) -> Signals:
        """Return √wᵢ at each row's own loss ℓᵢ."""
        model = self.objective.model
        outputs = model.forward(batch)
        losses = model.per_sample_loss(outputs, batch)
        factor = FactoredHessian(torch.full_like(losses.detach(), self.objective.scale)[:, None, None])
        return Signals(losses, Columns(factor, weights.to(losses), losses.shape), model.mass(outputs, batch))
