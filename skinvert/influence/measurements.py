"""What is measured on test rows: one value a row, or one of all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeAlias

import torch

from .._check import check_choice, must_be
from .._types import Batch
from ..curvature import RowValues
from ..data import Batches
from ..models import Margin, TorchTwiceDifferentiable, map_tensors, margin_of

__all__ = ["Measurement", "RowMeasurement", "SetMeasurement", "all_outputs", "check_row_by_row", "measurement_of"]

NAMES = ("loss", "margin", "logit")


class Measurement(Protocol):
    """(outputs, targets) -> one value a row (m,), or one number of all the rows, of which ``outputs`` are all."""

    def __call__(self, outputs: torch.Tensor, targets: torch.Tensor, /) -> torch.Tensor:
        """Return it, differentiable in the outputs."""


@dataclass(frozen=True)
class RowMeasurement:
    """One value of each row's own.

    Parameters
    ----------
    name : str
        Tells it from others.
    values : callable
        (model, outputs, batch) -> (m,), differentiable.
    """

    name: str
    values: Callable[[TorchTwiceDifferentiable, torch.Tensor, Batch], torch.Tensor]

    def of(self, model: TorchTwiceDifferentiable) -> RowValues:
        """Return the values (outputs, batch) -> (m,) of a model."""
        return partial(self.values, model)


@dataclass(frozen=True)
class SetMeasurement:
    """Numbers of all the rows together.

    Parameters
    ----------
    functions : sequence of callable
        (outputs, targets) -> a number, differentiable.
    """

    functions: Sequence[Measurement]


Chosen: TypeAlias = RowMeasurement | SetMeasurement


def check_row_by_row(measurement: object, score_rtol: float | None) -> None:
    """Raise where the scores of some test rows are not those of all, or are known of all together."""
    if not isinstance(measurement, str) or score_rtol is not None:
        must = "of a row, by name, and score_rtol None, for Dask arrays"
        raise ValueError(must_be("measurement", must, repr(measurement), "Each block of rows is scored alone."))
    check_choice(measurement, "measurement", NAMES)


def measurement_of(
    measurement: str | Measurement | Sequence[Measurement], model: TorchTwiceDifferentiable, scale: float, rows: Batches
) -> Chosen:
    """Return which a measurement is of test ``rows``: a callable's values tell.

    ``scale`` is κ, which makes a row's numerator its loss on the scale of L.
    """
    if isinstance(measurement, str):
        return _named(check_choice(measurement, "measurement", NAMES, "Or a callable."), model, scale)
    if callable(measurement):
        return _told(measurement, model, rows)
    listed = [each for each in measurement if callable(each)] if isinstance(measurement, list | tuple) else []
    if not listed or len(listed) < len(measurement):
        must = f"one of {', '.join(map(repr, NAMES))}, a callable (outputs, targets), or a list of such"
        raise TypeError(must_be("measurement", must, repr(measurement)))
    return SetMeasurement(listed)


def all_outputs(model: TorchTwiceDifferentiable, rows: Batches) -> tuple[torch.Tensor, torch.Tensor]:
    """Return outputs and targets of all rows, without a graph."""
    with torch.no_grad():
        found = [(model.forward(map_tensors(torch.clone, batch)).detach(), batch[1]) for batch, _ in rows]
    odd = [part for pair in found for part in pair if not isinstance(part, torch.Tensor)]
    if odd:
        got = f"a {type(odd[0]).__name__}"
        raise TypeError(must_be("Outputs and targets for a callable measurement", "a tensor each", got))
    outputs, targets = zip(*found, strict=True)
    return torch.cat(outputs), torch.cat(targets)


def _named(name: str, model: TorchTwiceDifferentiable, scale: float) -> RowMeasurement:
    if name == "loss":
        return RowMeasurement("loss", lambda at, outputs, batch: scale * at.per_sample_loss(outputs, batch))
    if model.own_loss or model.loss is None:
        hint = "Give a callable (outputs, targets)."
        raise TypeError(must_be(f"measurement for a {type(model).__name__}", "'loss' or a callable", repr(name), hint))
    margin = margin_of(model)

    def checked(_: TorchTwiceDifferentiable, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        margin.check(outputs.detach(), batch[1])
        return margin.per_sample(outputs, batch[1]) if name == "margin" else _logit(margin, outputs, batch[1])

    return RowMeasurement(name, checked)


def _logit(margin: Margin, outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the true class's logit, of probabilities their logarithm; one logit with the sign of the class."""
    if outputs.ndim == 1 or outputs.shape[1] == 1:
        return margin.per_sample(outputs, target)
    f = outputs.log() if margin.of == "probabilities" else outputs
    return f.gather(1, target.long()[:, None])[:, 0]


def _told(measurement: Measurement, model: TorchTwiceDifferentiable, rows: Batches) -> Chosen:
    """Return which measurement a callable is, by its values on all the rows: it may know how many they are."""
    outputs, targets = all_outputs(model, rows)
    found = measurement(outputs.requires_grad_(True), targets)
    if not isinstance(found, torch.Tensor):
        raise TypeError(must_be("What measurement returns", "a tensor", type(found).__name__))
    if found.ndim == 0:
        return SetMeasurement([measurement])
    if found.shape != outputs.shape[:1]:
        must, got = f"a number, or one value a row, of shape ({len(outputs)},)", f"shape {tuple(found.shape)}"
        raise ValueError(must_be("What measurement returns", must, got))
    alone = measurement(outputs[:1], targets[:1])
    if not torch.allclose(alone, found[:1], rtol=1e-3):
        hint = "For one number of all rows return a number."
        raise ValueError(must_be("A row's measurement", "of this row alone", "one that other rows change", hint))
    if not found.requires_grad:
        hint = "Its gradient is not recorded (`.detach()`, `torch.no_grad()`, numpy?)."
        raise ValueError(must_be("What measurement returns", "differentiable in the outputs", "a constant", hint))
    return RowMeasurement(f"measurement {id(measurement)}", lambda _, f, rows: measurement(f, rows[1]))
