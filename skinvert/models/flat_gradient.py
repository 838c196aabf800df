"""The gradient of a value as one vector."""

from __future__ import annotations

import torch

from .._autograd import flat
from .._check import must_be

__all__ = ["flat_gradient"]


def flat_gradient(
    value: torch.Tensor,
    variables: list[torch.Tensor],
    direction: torch.Tensor | None = None,
    *,
    create_graph: bool = False,
    retain_graph: bool | None = None,
) -> torch.Tensor:
    """Return the gradient (p,) of ``value``; zeros for what it does not reach."""
    if not value.requires_grad:
        return torch.cat([torch.zeros_like(t).reshape(-1) for t in variables])
    try:
        parts = torch.autograd.grad(
            value,
            variables,
            direction,
            create_graph=create_graph,
            retain_graph=retain_graph,
            materialize_grads=True,
        )
    except RuntimeError as error:
        if "through the graph a second time" not in str(error):
            raise
        hint = "Is something computed from parameters kept between calls, as a `cached_property` is? Compute it anew."
        message = must_be("The model's forward pass", "one that makes its own graph", "part of an earlier one's", hint)
        raise ValueError(message) from error
    return flat(parts) if create_graph else torch.cat([part.reshape(-1) for part in parts])
