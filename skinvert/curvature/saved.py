"""How many bytes autograd keeps for a backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TypeVar

import torch

from ..models.leaks import refuses_hooks

__all__ = ["UNKNOWN", "counted"]

# More than there is.
UNKNOWN = 2**62
T = TypeVar("T")


def counted(compute: Callable[[], T]) -> tuple[T, int]:
    """Return what is computed, and the bytes that autograd still saves of it.

    A graph that was given up on the way counts for nothing. ``UNKNOWN`` where the computation bears no such count.
    """
    sizes: list[tuple[weakref.ref[torch.Tensor], int]] = []

    def count(tensor: torch.Tensor) -> torch.Tensor:
        # Itself it would hold the graph that holds it, for ever; this one lives as long as the graph.
        held = tensor.detach()
        size = tensor.coalesce().values().nbytes if tensor.layout == torch.sparse_coo else tensor.nbytes
        sizes.append((weakref.ref(held), size))
        return held

    try:
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            found = compute()
        return found, sum(size for held, size in sizes if held() is not None)
    except (RuntimeError, ValueError) as error:
        # A transform of `torch.func` inside; told as a ValueError where a loss is tried.
        if not refuses_hooks(error):
            raise
        return compute(), UNKNOWN
