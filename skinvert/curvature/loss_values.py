"""The user's own loss on every batch, and across batches, against the losses of single rows."""

from __future__ import annotations

import torch

from ..models import TorchTwiceDifferentiable, map_tensors

__all__ = ["LossValues"]


class LossValues:
    """Holds a loss to what its single rows make, batch by batch, as a pass over the data goes on.

    A callable that weighs classes is a plain mean on a batch of one class: so the first row of a batch is also put
    beside that of the batch before. One row is kept, never a batch.

    Parameters
    ----------
    model : TorchTwiceDifferentiable
        Its loss is asked.
    """

    def __init__(self, model: TorchTwiceDifferentiable) -> None:
        self.model = model
        # Outputs, targets and loss of one row.
        self._before: tuple[object, object, object] | None = None

    def add(self, outputs: object, batch: object, losses: torch.Tensor) -> None:
        """Raise unless the loss of the batch is what these losses (m,) of its rows make."""
        if not isinstance(outputs, torch.Tensor) or not isinstance(batch, tuple) or not len(losses):
            return
        values = (outputs.detach(), batch[1], losses.detach())
        self.model.verify_loss(*values)
        # Cloned: a view would keep the whole batch.
        row = map_tensors(lambda tensor: tensor[:1].clone() if tensor.ndim else tensor, values)
        if self._before is not None and _shapes(row) == _shapes(self._before):
            self.model.verify_loss(*_joined(self._before, row))
        self._before = row


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
