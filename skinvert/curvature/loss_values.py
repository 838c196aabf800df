"""The user's own loss on every batch, and across batches, against the losses of single rows."""

from __future__ import annotations

from itertools import pairwise

import torch

from .._distributed import Ranks
from ..models import TorchTwiceDifferentiable, map_tensors

__all__ = ["LossValues"]

# Outputs, targets and loss of one row.
Row = tuple[object, object, object]


class LossValues:
    """Holds a loss to what its single rows make, batch by batch, as a pass over the data goes on.

    A callable that weighs classes is a plain mean on a batch of one class, or on a process's rows of one: so the first
    row of a batch is also put beside that of the batch before, and one of each process beside one of the next. One row
    is kept, never a batch.

    Parameters
    ----------
    model : TorchTwiceDifferentiable
        Its loss is asked.
    """

    def __init__(self, model: TorchTwiceDifferentiable) -> None:
        self.model = model
        self._before: Row | None = None

    def add(self, outputs: object, batch: object, losses: torch.Tensor) -> None:
        """Raise unless the loss of the batch is what these losses (m,) of its rows make."""
        if not isinstance(outputs, torch.Tensor) or not isinstance(batch, tuple) or not len(losses):
            return
        values = (outputs.detach(), batch[1], losses.detach())
        self.model.verify_loss(*values)
        # Cloned: a view would keep the whole batch.
        row = map_tensors(lambda tensor: tensor[:1].clone() if tensor.ndim else tensor, values)
        if self._before is not None:
            self._verify_both(self._before, row)
        self._before = row

    def over(self, ranks: Ranks) -> None:
        """Raise on all ranks unless the loss of a row of each, and one of the next, is what both make."""
        step, device = "the loss of rows of all ranks", self.model.device
        ranks.meet(step)
        own = None if self._before is None else map_tensors(lambda tensor: tensor.cpu(), self._before)
        found = [row for row in ranks.gathered(own, step) if row is not None]
        rows = [map_tensors(lambda tensor: tensor.to(device), row) for row in found]

        def verify() -> list[torch.Tensor]:
            for one, other in pairwise(rows):
                self._verify_both(one, other)
            return []

        ranks.own(step, verify)

    def _verify_both(self, one: Row, other: Row) -> None:
        if _shapes(one) == _shapes(other):
            self.model.verify_loss(*_joined(one, other))


def _shapes(row: object) -> list[torch.Size]:
    shapes: list[torch.Size] = []
    map_tensors(lambda tensor: shapes.append(tensor.shape), row)
    return shapes


def _joined(a: object, b: object) -> tuple[torch.Tensor, object, torch.Tensor]:
    """Return two rows of one structure as a batch; a scalar is shared, and so that of the first."""
    seconds: list[torch.Tensor] = []
    map_tensors(lambda tensor: seconds.append(tensor), b)
    rest = iter(seconds)
    outputs, targets, losses = map_tensors(lambda tensor: _both(tensor, next(rest)), a)
    return outputs, targets, losses


def _both(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.cat([a, b]) if a.ndim else a
