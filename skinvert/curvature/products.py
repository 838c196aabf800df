"""Derivatives along rows, by one kept graph: Jᵀu and J v without forward mode."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch

from .._autograd import flat

__all__ = ["Products", "flat_products", "forward_products"]

# Rows (k, ...) to rows (k, ...).
Products: TypeAlias = Callable[[torch.Tensor], torch.Tensor]


def flat_products(value: torch.Tensor, variables: list[torch.Tensor]) -> Products:
    """Return the function that differentiates ``value`` along each row of V: (k, numel) -> (k, p).

    Row by row over one kept graph, which works for every network; on an accelerator in batches of rows, where the
    network allows it.
    """
    if not value.requires_grad:
        size = sum(t.numel() for t in variables)
        return lambda V: V.new_zeros(len(V), size)
    return _FlatProducts(value, variables)


def forward_products(outputs: torch.Tensor, theta: list[torch.Tensor]) -> Products:
    """Return V (k, p) -> J V (k, m, c), by differentiating Jᵀu along V: no forward mode needed."""
    if not outputs.requires_grad:
        # This batch reaches none of the parameters.
        return lambda V: V.new_zeros(len(V), len(outputs), outputs[:1].numel())
    dummy = torch.zeros_like(outputs, requires_grad=True)
    pulled = torch.autograd.grad(outputs, theta, dummy, create_graph=True, materialize_grads=True)
    along = flat_products(flat(pulled), [dummy])
    return lambda V: along(V).reshape(len(V), len(outputs), -1)


class _FlatProducts:
    def __init__(self, value: torch.Tensor, variables: list[torch.Tensor]) -> None:
        self.value, self.variables = value, variables
        self.batched = value.device.type != "cpu"
        # Numbers of rows at which a batch was found right: a batching rule may be wrong for one of them alone.
        self.sound: set[int] = set()

    def __call__(self, V: torch.Tensor) -> torch.Tensor:
        if self.batched and len(V) > 1:
            try:
                parts = [self._grad(rows, True) for rows in torch.split(V, 64)]
                self.batched = all(
                    self._agree(rows, part) for rows, part in zip(torch.split(V, 64), parts, strict=True)
                )
            except RuntimeError:
                # Some layers have no batching rule.
                self.batched = False
            if self.batched:
                return torch.cat(parts)
        return torch.stack([self._grad(v, False) for v in V]) if len(V) else self._empty(V)

    def _agree(self, V: torch.Tensor, products: torch.Tensor) -> bool:
        """Return whether a random mixture of the products is that of the mixture."""
        if len(V) in self.sound:
            return True
        generator = torch.Generator("cpu").manual_seed(0)
        mixture = torch.randn(len(V), generator=generator, dtype=torch.float64, device="cpu").to(V)
        error = (mixture @ products - self._grad(mixture @ V, False)).norm()
        size = (mixture * products.norm(dim=1)).norm()
        if not bool(error <= math.sqrt(torch.finfo(V.dtype).eps) * size):
            return False
        self.sound.add(len(V))
        return True

    def _grad(self, v: torch.Tensor, batched: bool) -> torch.Tensor:
        lead = v.shape[:-1]
        parts = torch.autograd.grad(
            self.value,
            self.variables,
            v.reshape(*lead, *self.value.shape),
            retain_graph=True,
            is_grads_batched=batched,
            allow_unused=True,
        )
        rows = [
            v.new_zeros(*lead, variable.numel()) if part is None else part.reshape(*lead, -1)
            for part, variable in zip(parts, self.variables, strict=True)
        ]
        return torch.cat(rows, dim=-1).detach()

    def _empty(self, V: torch.Tensor) -> torch.Tensor:
        return V.new_zeros(0, sum(variable.numel() for variable in self.variables))
