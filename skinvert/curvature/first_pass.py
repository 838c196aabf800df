"""What is found out during the first pass over the data: leaks, changed inputs, lost accuracy, unreached parameters."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch

from .._check import must_be
from .._telling import warn
from .._types import Batch
from ..models import TorchTwiceDifferentiable, map_tensors

__all__ = ["FirstPass", "warn_of_unreached"]


class FirstPass:
    """The forward passes, losses and gradients of a model that is seen for the first time.

    Parameters
    ----------
    model : TorchTwiceDifferentiable
        At a fixed point θ.

    Attributes
    ----------
    reached : list of bool
        For each selected parameter whether a loss has depended on it so far.
    """

    def __init__(self, model: TorchTwiceDifferentiable) -> None:
        self.model, self.watch, self.started = model, model.watch, False
        self.reached = [False] * len(model.theta)

    def forward(self, batch: Batch) -> Batch:
        """Return the outputs on a batch, which stays as it is."""
        given = map_tensors(torch.clone, batch)
        outputs = self.model.forward(given)
        if not self.model.writes_inputs and not _same(given, batch):
            self.model.writes_inputs = True
        return outputs

    def losses(self, outputs: Batch, batch: Batch) -> torch.Tensor:
        """Return the losses (m,) of the rows; raise where they are no function of outputs and targets alone."""
        given = map_tensors(torch.clone, batch)
        with nullcontext() if self.watch is None or self.started else self.watch.over_loss():
            losses = self.model.per_sample_loss(outputs, given)
        self.started = True
        if self.watch is not None:
            # On every batch: a branch may be taken late.
            self.watch.check(losses)
        if not _same(given, batch):
            raise ValueError(must_be("The loss", "one that leaves its targets as they are", "changed targets"))
        _check_dtype(losses, self.model.dtype)
        return losses

    def gradient(self, value: torch.Tensor) -> torch.Tensor:
        """Return the flat gradient (p,) of a scalar, zero where it does not reach."""
        theta = self.model.theta
        parts: Sequence[torch.Tensor | None] = [None] * len(theta)
        if value.requires_grad:
            try:
                parts = torch.autograd.grad(value, theta, allow_unused=True)
            except RuntimeError as error:
                hint = (
                    "Checkpoints want `use_reentrant=False`, and nothing computed from parameters may be kept between "
                    "calls, as a `cached_property` is."
                )
                message = must_be("The model's backward pass", "one for `torch.autograd.grad`", f"{error}", hint)
                raise ValueError(message) from error
        self.reached = [seen or part is not None for seen, part in zip(self.reached, parts, strict=True)]
        flat = [torch.zeros_like(t) if part is None else part for t, part in zip(theta, parts, strict=True)]
        return torch.cat([part.reshape(-1) for part in flat]).detach()


def warn_of_unreached(names: Sequence[str]) -> None:
    """Name the selected parameters that no loss depends on: their derivatives are zeros that nobody meant."""
    if names:
        listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        hint = "Their curvature is that of the penalty alone. Leave them out with `params`, or look for a `detach`."
        must, got = "reached by the loss of at least one row", f"no loss that depends on {listed}"
        warn(must_be("The selected parameters", must, got, hint), UserWarning)


def _check_dtype(losses: torch.Tensor, dtype: torch.dtype) -> None:
    if not losses.is_floating_point() or losses.dtype.itemsize < dtype.itemsize:
        hint = "Remove casts and `torch.autocast` from the loss and from the model's forward pass, or leave dtype=None."
        raise ValueError(must_be("The per-sample losses", f"in {dtype}, as θ is", losses.dtype, hint))


def _same(one: Batch, other: Batch) -> bool:
    before: list[torch.Tensor] = []
    after: list[torch.Tensor] = []
    map_tensors(before.append, one)
    map_tensors(after.append, other)
    return len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
