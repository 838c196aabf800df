"""Products with the Hessian by differences of gradients, for models whose second derivatives autograd gets wrong."""

from __future__ import annotations

import copy

import torch

from .._types import Batch
from ..models import TorchTwiceDifferentiable, doubled, map_tensors
from ..models.second_derivative import constant_entries
from ..models.structural_copy import structural_copy

__all__ = ["DifferencedGradient"]


class DifferencedGradient:
    r"""H v ≈ (g(θ + hv) − g(θ − hv)) / 2h in float64: two gradient passes a row, right to some nine digits.

    Parameters
    ----------
    model : TorchTwiceDifferentiable
        In float64, at θ. What its gradient takes as constants stays where it is, and has products of zero.

    References
    ----------
    Nocedal & Wright (2006), "Numerical Optimization", sec. 8.1 (central differences, and the length of the step).
    """

    def __init__(self, model: TorchTwiceDifferentiable) -> None:
        self.model = model
        self.theta = torch.cat([tensor.detach().reshape(-1) for tensor in model.theta])

    def gradient(self, batch: Batch, weights: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
        """Return ∇ Σ wᵢsᵢ (p,) of a batch at ``theta`` (p,)."""
        leaves = [part.clone().requires_grad_(True) for part in self.model.layout.split(theta)]
        swapped = {id(own): leaf for own, leaf in zip(self.model.theta, leaves, strict=True)}
        # A module of its own: threads may share the model.
        near = copy.copy(self.model)
        near.module = structural_copy(self.model.module, lambda tensor: swapped.get(id(tensor), tensor))
        near.theta = leaves
        losses = near.per_sample_loss(near.forward(map_tensors(torch.clone, batch)), batch)
        gradient: torch.Tensor = near.gradient_of((losses * weights).sum())
        return gradient.detach()

    def products(self, batch: Batch, weights: torch.Tensor, V: torch.Tensor) -> torch.Tensor:
        """Return the products with the rows of V (k, p), in its dtype."""
        batch = doubled(batch)
        moves = ~constant_entries(self.model, map_tensors(torch.clone, batch))
        rows = [moves * self._product(batch, weights.double(), moves * v) for v in V.double()]
        return torch.stack(rows).to(V.dtype) if rows else V.clone()

    def _product(self, batch: Batch, weights: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        size = float(v.norm())
        if size == 0:
            return torch.zeros_like(v)
        # The cube root of eps weighs truncation against rounding.
        step = torch.finfo(v.dtype).eps ** (1 / 3) * max(1.0, float(self.theta.norm())) / size
        ahead = self.gradient(batch, weights, self.theta + step * v)
        behind = self.gradient(batch, weights, self.theta - step * v)
        product: torch.Tensor = (ahead - behind) / (2 * step)
        return product
