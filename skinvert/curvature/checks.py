"""What the first pass over the data refuses: rows that are not alone, and losses that are not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeAlias

import torch
from torch import nn

from .._check import must_be
from .._memory import naming_memory
from .._telling import warn
from .._types import Batch
from ..models import TorchTwiceDifferentiable, leading_length, map_tensors
from ..models.plain_functions import refuse_frequencies

__all__ = ["check_layers", "check_rows_alone", "check_rows_without_others", "explain_not_finite", "forward_or_tell"]

# A batch to what must be each row's own of it.
Of: TypeAlias = Callable[[Batch], torch.Tensor]

SQUEEZE = "Does a `squeeze()` drop the rows' own dimension? Try `squeeze(-1)`."


def check_layers(model: TorchTwiceDifferentiable) -> None:
    """Raise for a layer whose gradient on one row depends on the other rows."""
    for name, module in model.module.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.scale_grad_by_freq:
            raise ValueError(refuse_frequencies(f"{type(module).__name__} {name!r}"))


class Forward(Protocol):
    """A model, or what stands for one."""

    def forward(self, batch: Batch) -> Batch:
        """Return the outputs on a batch."""


def forward_or_tell(model: Forward, batch: Batch) -> Batch:
    """Return ``model.forward(batch)``; what it raises is told with the shapes of the batch."""
    try:
        # An export with fixed shapes asserts them.
        with naming_memory("The forward pass", "Try a smaller batch_size."):
            return model.forward(batch)
    except (RuntimeError, IndexError, NotImplementedError, AssertionError) as error:
        shapes: list[str] = []
        map_tensors(lambda tensor: shapes.append(f"{tuple(tensor.shape)} {tensor.dtype}"), batch)
        hint = str(error)
        if "same dtype" in hint:
            hint += ". All parameters are computed with in one dtype: cast to that of a weight, not to a fixed one."
        message = must_be("The data", "what the model takes", f"a batch of {', '.join(shapes)}", hint)
        raise ValueError(message) from error


def check_rows_alone(model: TorchTwiceDifferentiable, outputs: Batch, batch: Batch) -> None:
    """Raise where a row's output is random, or depends on the other rows: then no per-sample loss exists.

    The first row, one in the middle and the last are tried alone: a recurrent layer that takes the rows for its steps
    shows the first one nothing of the others.
    """
    m = leading_length(batch)
    for together, of in _compared(model, outputs, batch):
        if not together.is_floating_point() or together.ndim == 0:
            continue
        with torch.no_grad():
            tolerance = _tolerance(together)
            if _differ(of(batch), together, tolerance):
                hint = "Dropout must take `training=self.training`."
                raise ValueError(_not_one("the same on every call", hint))
            for i in sorted({0, m // 2, m - 1}):
                _check_alone(_alone(of, batch, i), together, i, tolerance)


def check_rows_without_others(
    model: TorchTwiceDifferentiable, outputs: Batch, batch: Batch, index: int, first: int
) -> None:
    """Raise where every other row of a batch, given without the rest, has other outputs: a branch may be taken late.

    Of a batch of one row this is a second call. One row alone may stand at a jump (an ``argmax``, a rounding), where
    the shape of a product decides: that is told, not refused.

    Parameters
    ----------
    model : TorchTwiceDifferentiable
        At a fixed point θ.
    outputs, batch : outputs and batch
        The outputs as they were on all of the batch.
    index, first : int
        The place of the batch among the batches, and of its first row in the data.
    """
    m = leading_length(batch)
    # The other half from batch to batch.
    start = index % 2 if m > 1 else 0
    for together, of in _compared(model, outputs, batch):
        if not together.is_floating_point() or together.ndim == 0:
            continue
        with torch.no_grad():
            # Contiguous, as what a loader yields: a model may take a `view`.
            found = of(map_tensors(lambda tensor: tensor[start::2].contiguous(), batch))
            rows = (start + 2 * _rows_that_differ(found, together[start::2])).tolist()
        if rows:
            hint = (
                f"{_named(first, rows)} of the data, in batch {index}, without the others of the batch: a branch on "
                "values that draws at random, or mixes rows?"
            )
            told = _not_one("one row's own and the same on every call, in every batch", hint)
            if len(rows) > 1 or m < 3:
                raise ValueError(told)
            warn(told, UserWarning)


def explain_not_finite(model: TorchTwiceDifferentiable, batch: Batch, index: int, rows: slice) -> str:
    """Return the message for a loss or gradient that is not finite: which batch, and where it begins."""
    got = f"NaN or infinity in batch {index} (rows {rows.start} to {rows.stop - 1})"
    bad = [name for name, tensor in model.module.named_parameters() if not bool(torch.isfinite(tensor).all())]
    if bad:
        return must_be("The gradient of the loss", "finite", got, f"Look at the parameters: {bad[0]} is not finite.")
    with torch.no_grad(), _first_not_finite(model.module) as found:
        outputs = model.forward(batch)
        losses = model.per_sample_loss(outputs, batch)
    hint = "Try dtype=torch.float64, or look at these rows."
    if found:
        return must_be(
            "The gradient of the loss", "finite", f"{got}: the first layer with such an output is {found[0]}", hint
        )
    wrong = (~torch.isfinite(losses)).nonzero().flatten()
    if len(wrong):
        return must_be("The loss", "finite", f"{got}: that of row {rows.start + int(wrong[0])}", hint)
    return must_be("The gradient of the loss", "finite", f"{got}, though the loss is finite", hint)


def _compared(model: TorchTwiceDifferentiable, outputs: Batch, batch: Batch) -> Iterator[tuple[torch.Tensor, Of]]:
    """Yield what must be each row's own: the outputs where they are a tensor, and a subclass's own losses."""
    if isinstance(outputs, torch.Tensor):
        yield outputs, lambda rows: forward_or_tell(model, rows)
    if model.own_loss or not isinstance(outputs, torch.Tensor):
        yield (
            model.per_sample_loss(outputs, batch),
            lambda rows: model.per_sample_loss(forward_or_tell(model, rows), rows),
        )


def _check_alone(alone: torch.Tensor, together: torch.Tensor, i: int, tolerance: torch.Tensor) -> None:
    if alone.ndim != together.ndim:
        must = f"of shape {(1, *together.shape[1:])} for one row"
        raise ValueError(must_be("The model's outputs in eval mode", must, f"shape {tuple(alone.shape)}", SQUEEZE))
    if _differ(alone, together[i : i + 1], tolerance):
        hint = (
            f"Row {i} alone gives other outputs than in its batch (batch statistics? a recurrent or attention layer "
            "without `batch_first=True`?)."
        )
        raise ValueError(_not_one("one row's own", hint))


def _rows_that_differ(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Return the places of the rows that are not the same up to rounding; all where even the shapes differ."""
    if found.shape != expected.shape:
        return torch.arange(len(expected), device="cpu")
    gaps = (found - expected.detach()).abs().reshape(len(expected), -1)
    return (gaps > _tolerance(expected)).any(1).nonzero().flatten().cpu()


def _tolerance(outputs: torch.Tensor) -> torch.Tensor:
    return 1e3 * torch.finfo(outputs.dtype).eps * outputs.detach().abs().max().clamp(min=1)


def _named(first: int, rows: list[int]) -> str:
    listed = ", ".join(str(first + i) for i in rows[:3]) + (" and more" if len(rows) > 3 else "")
    return f"{'Rows' if len(rows) > 1 else 'Row'} {listed}"


def _alone(of: Of, batch: Batch, i: int) -> torch.Tensor:
    try:
        return of(map_tensors(lambda tensor: tensor[i : i + 1], batch))
    except (RuntimeError, IndexError, NotImplementedError, TypeError, ValueError, AssertionError) as error:
        must = "able to take a batch of one row"
        raise ValueError(must_be("The model", must, f"{str(error).rstrip('.')} for row {i} alone", SQUEEZE)) from error


def _differ(found: torch.Tensor, expected: torch.Tensor, tolerance: torch.Tensor) -> bool:
    return found.shape != expected.shape or bool((found - expected).abs().max() > tolerance)


def _not_one(must: str, hint: str) -> str:
    return must_be("The model's outputs in eval mode", must, "different outputs", hint)


@contextmanager
def _first_not_finite(module: nn.Module) -> Iterator[list[str]]:
    """Collect the layers whose output is not finite, in the order in which they end."""
    found: list[str] = []
    names = {child: name for name, child in module.named_modules()}

    def look(child: nn.Module, _: object, result: Batch) -> None:
        outputs: list[torch.Tensor] = []
        map_tensors(lambda tensor: outputs.append(tensor), result)
        if any(tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()) for tensor in outputs):
            found.append(f"{names[child] or 'the model'} ({type(child).__name__})")

    handles = [child.register_forward_hook(look) for child in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
