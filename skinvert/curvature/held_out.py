"""What the held-out quadratic needs of rows that were not fitted: their gradients and their mean curvature."""

from __future__ import annotations

from typing import Any

import torch

from .._validation import must_be
from ..data import Batches
from ..models import TorchTwiceDifferentiable
from .base import Objective
from .fisher import EmpiricalFisher, Fisher
from .ggn import GGN
from .rows import gradient_rows

__all__ = ["held_out_curvature"]


def held_out_curvature(
    name: str, model: Any, batches: Batches
) -> tuple[GGN | EmpiricalFisher, torch.Tensor, torch.Tensor]:
    """Return the curvature H̄ + R of held-out rows, their gradients gᵢ (m, p) and their weights (m,).

    The GGN, or the inverter's own curvature where that is positive semi-definite by construction.
    """
    if not isinstance(model, TorchTwiceDifferentiable):
        hint = "Subclass TorchTwiceDifferentiable for per-sample gradients."
        raise TypeError(must_be("score's model", "a TorchTwiceDifferentiable", type(model).__name__, hint))
    objective = Objective(model, batches)
    kinds: dict[str, type[GGN] | type[EmpiricalFisher]] = {"fisher": Fisher, "empirical_fisher": EmpiricalFisher}
    curvature = kinds.get(name, GGN)(objective)
    gradients = torch.cat([objective.scale * gradient_rows(model, batch) for batch, _ in batches])
    return curvature, gradients, torch.cat([weights for _, weights in batches])
