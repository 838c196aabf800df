"""What the held-out quadratic needs of rows that were not fitted: their gradients and their mean curvature."""

from __future__ import annotations

import torch

from .._check import must_be
from ..data import Batches
from ..models import TorchTwiceDifferentiable, TwiceDifferentiable
from .base import Curvature
from .build import registered
from .factored import Factored
from .fisher import gauss_newton
from .objective import Objective

__all__ = ["held_out_curvature"]


def held_out_curvature(
    name: str, model: TwiceDifferentiable, batches: Batches
) -> tuple[Factored, torch.Tensor, torch.Tensor]:
    """Return the curvature H̄ + R of held-out rows, their gradients gᵢ (m, p) and their weights (m,).

    The inverter's own curvature where it scores itself, positive semi-definite by construction, else the GGN.
    """
    if not isinstance(model, TorchTwiceDifferentiable):
        hint = "Subclass TorchTwiceDifferentiable for per-sample gradients."
        raise TypeError(must_be("score's model", "a TorchTwiceDifferentiable", type(model).__name__, hint))
    objective = Objective(model, batches)
    gradients = torch.cat([objective.gradients(batch) for batch, _ in batches])
    return _scoring(name, objective), gradients, torch.cat([weights for _, weights in batches])


def _scoring(name: str, objective: Objective) -> Factored:
    kind = registered(name)
    # A class that says no is not built: that would cost it its checks.
    if isinstance(kind, type) and issubclass(kind, Curvature) and not kind.scores_itself:
        return gauss_newton(objective)
    own = kind(objective)
    return own if isinstance(own, Factored) and own.scores_itself else gauss_newton(objective)
