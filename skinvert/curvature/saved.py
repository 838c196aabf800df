"""How many bytes autograd saves for a backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

__all__ = ["UNKNOWN", "counted"]

# More than there is.
UNKNOWN = 2**62
T = TypeVar("T")


def counted(compute: Callable[[], T]) -> tuple[T, int]:
    """Return what is computed, and the bytes that autograd saved of it; ``UNKNOWN`` where it bears no such count."""
    sizes: list[int] = []

    def count(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.coalesce().values().nbytes if tensor.layout == torch.sparse_coo else tensor.nbytes)
        # Itself it would hold the graph that holds it, for ever.
        return tensor.detach()

    try:
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            return compute(), sum(sizes)
    except RuntimeError as error:
        # A transform of `torch.func` inside.
        if "saved tensor hooks" not in str(error):
            raise
        return compute(), UNKNOWN
