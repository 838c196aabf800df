"""How many bytes autograd saves for a backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

__all__ = ["Saved", "counted"]


@dataclass
class Saved:
    """The bytes so far."""

    nbytes: int = 0

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count a tensor that is saved, and return it."""
        whole = tensor.coalesce().values() if tensor.layout == torch.sparse_coo else tensor
        self.nbytes += whole.nbytes
        return tensor


@contextmanager
def counted() -> Iterator[Saved]:
    """Count what autograd saves while the context lasts."""
    saved = Saved()
    with torch.autograd.graph.saved_tensors_hooks(saved.add, lambda tensor: tensor):
        yield saved
