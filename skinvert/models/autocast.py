"""Forward passes under ``torch.autocast``: bfloat16 where it is safe, with results in the dtype of the parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, MutableMapping
from typing import Any

import torch

from .._check import must_be
from .._types import Batch
from .batches import rebuilt

__all__ = ["computed_in", "resolve_autocast"]


def resolve_autocast(autocast: object, dtype: torch.dtype, device: torch.device) -> torch.dtype | None:
    """Return the dtype that a setting names, for a model in ``dtype``; None for None."""
    if autocast is None:
        return None
    if autocast not in ("bfloat16", torch.bfloat16):
        # Float16 would need each loss scaled: its smallest number is 6e-8.
        raise ValueError(must_be("autocast", "None or 'bfloat16'", repr(autocast)))
    if dtype != torch.float32:
        hint = "Try dtype=torch.float32, or leave autocast out."
        raise ValueError(must_be("The model's dtype for autocast", "torch.float32", dtype, hint))
    if not torch.amp.is_autocast_available(device.type):
        raise ValueError(must_be("The device for autocast", "one that `torch.autocast` knows", device.type))
    return torch.bfloat16


def computed_in(autocast: torch.dtype, device: torch.device, dtype: torch.dtype, compute: Callable[[], Batch]) -> Any:
    """Return what ``compute`` returns under autocast, its floating tensors in ``dtype``."""
    # Not cached: a cast weight would outlive the graph that it belongs to.
    with torch.autocast(device.type, dtype=autocast, cache_enabled=False):
        outputs = compute()
    return _cast(outputs, dtype)


def _cast(outputs: Batch, dtype: torch.dtype) -> Batch:
    if isinstance(outputs, torch.Tensor):
        return outputs.to(dtype) if outputs.is_floating_point() else outputs
    if isinstance(outputs, MutableMapping):
        # Of its own class: a model's output may be read by attribute.
        named = copy.copy(outputs)
        named.update({name: _cast(value, dtype) for name, value in outputs.items()})
        return named
    if isinstance(outputs, tuple | list):
        return rebuilt(outputs, [_cast(part, dtype) for part in outputs])
    return outputs
