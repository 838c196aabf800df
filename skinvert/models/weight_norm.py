"""Weight normalisation in plain operations: torch's fused kernel takes its norms as constants in the second backward.

w = g v / ‖v‖, with the norms over all dimensions but one.
"""

from __future__ import annotations

import functools
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.weight_norm import WeightNorm

from .._types import Batch

__all__ = ["plain_hook", "plain_parametrization"]


class PlainWeightNorm(nn.Module):
    """The parametrization w = g v / ‖v‖; a ``dim`` of -1 is one norm for all, as torch keeps it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, g: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return w."""
        return _normalised(g, v, self.dim)


class PlainHook:
    """The pre-forward hook of ``torch.nn.utils.weight_norm``."""

    def __init__(self, name: str, dim: int) -> None:
        self.name, self.dim = name, dim

    def __call__(self, module: nn.Module, inputs: Batch) -> None:
        """Put w where the layer looks for it."""
        g, v = attrgetter(f"{self.name}_g", f"{self.name}_v")(module)
        setattr(module, self.name, _normalised(g, v, self.dim))


def plain_parametrization(module: nn.Module) -> nn.Module | None:
    """Return what stands in for torch's parametrization, or None where ``module`` is no such."""
    # By name first: the class has no public one, and making it takes time.
    if type(module).__name__ != "_WeightNorm" or not isinstance(module, _fused()):
        return None
    settings: Any = module
    return PlainWeightNorm(settings.dim)


def plain_hook(hook: Any) -> PlainHook | None:
    """Return what stands in for the hook of the deprecated ``weight_norm``, or None where ``hook`` is no such."""
    return PlainHook(hook.name, hook.dim) if type(hook) is WeightNorm else None


@functools.cache
def _fused() -> type:
    holder: Any = nn.Module()
    with torch.inference_mode(False), torch.no_grad():
        holder.weight = nn.Parameter(torch.ones(1, 1, device="cpu"))
        return type(parametrizations.weight_norm(holder).parametrizations["weight"][0])


def _normalised(g: torch.Tensor, v: torch.Tensor, dim: int) -> torch.Tensor:
    if dim == -1:
        return v * (g / v.square().sum().sqrt())
    others = [i for i in range(v.ndim) if i != dim % v.ndim]
    norms = v.square().sum(others, keepdim=True).sqrt() if others else v.abs()
    return v * (g / norms)
