"""How measurements change as the features of training rows do: the mixed derivative ∂x∂θ of their losses."""

from __future__ import annotations

import torch

from .._check import must_be
from .._types import Batch
from .fitted import Fitted
from .sides import RowSide, Side

__all__ = ["feature_influence"]


def feature_influence(fitted: Fitted, rows: torch.Tensor, test: Side) -> torch.Tensor:
    """Return −(wⱼ/Σw) ∂/∂xⱼ (gⱼ(xⱼ)ᵀ A⁻¹ ∇vᵢ) (n_test, m, *shape), ``rows`` (m,) ascending."""
    training, found = fitted.training, []
    chosen = list(fitted.remove().chosen(rows))
    for _, gradients in test.gradients(fitted.most):
        X = fitted.solve(gradients)
        found.append(torch.cat([_derivatives(training, batch, shares, X) for batch, shares in chosen], dim=1))
    return torch.cat(found)


def _derivatives(training: RowSide, batch: Batch, shares: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    """Return the derivatives (k, m, *shape) along each row of X by the inputs of the rows of a batch."""
    inputs, targets = batch
    if not isinstance(inputs, torch.Tensor) or not inputs.is_floating_point():
        got = f"of {inputs.dtype}" if isinstance(inputs, torch.Tensor) else f"a {type(inputs).__name__}"
        raise TypeError(must_be("The inputs for feature_influence", "one tensor of floats", got))
    free, model = inputs.clone().requires_grad_(True), training.model
    # A forward pass may write into its inputs.
    losses = training.measurement.of(model)(model.forward((free * 1, targets)), (free, targets))
    gradient = model.gradient_of((losses * shares).sum(), create_graph=True)
    parts = (
        [torch.autograd.grad(gradient, free, x, retain_graph=True, materialize_grads=True)[0] for x in X]
        if gradient.requires_grad
        else [torch.zeros_like(inputs) for _ in X]
    )
    return -torch.stack(parts).detach()
