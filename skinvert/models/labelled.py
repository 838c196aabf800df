"""Models that give their own loss from labels, as Hugging Face's do: which plain loss of the logits it is.

Such a model returns a mapping, or an object, with ``logits``, and with ``loss`` where it is given labels. Its loss is
a mean over the labels of a batch; ours is the mean over those of all the data, as torch defines it, and has every
curvature. So the plain loss of the logits is looked for that equals the model's own on every batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .._check import must_be
from .._telling import warn
from .._types import Batch
from .batches import binds, call, map_tensors, split_labels, takes
from .losses import CrossEntropy

__all__ = ["Reading", "gives_its_loss", "logits_of", "reading_of"]

IGNORED = -100
SUBCLASS = "Give `loss=`, or subclass TorchTwiceDifferentiable: `outputs` and `per_sample_loss`."


@dataclass(frozen=True)
class Reading:
    """How logits and labels meet a loss of torch's.

    Parameters
    ----------
    layout : {"as_is", "classes_last", "column"}
        Whether the classes, on the last axis, go to axis 1, or the last axis is a single column that goes.
    shifted : bool
        Whether the logits of a position are for the label of the next one.
    loss : str or None
        The loss where the model's own was identified.
    label : str or None
        The name that the model is given labels by, where it gives no logits without.
    """

    layout: str = "as_is"
    shifted: bool = False
    loss: str | None = None
    label: str | None = None

    def outputs(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits as the loss takes them."""
        if self.layout == "classes_last":
            return logits.movedim(-1, 1)
        return logits.squeeze(-1) if self.layout == "column" else logits

    def pair(self, inputs: Batch, labels: Batch) -> tuple[Batch, Batch]:
        """Return the inputs and the targets as the model and the loss take them."""
        if self.label is not None:
            inputs = {**inputs, self.label: labels}
        if self.shifted:
            # As causal language models do: the last position has no next one.
            labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        return inputs, labels

    def value(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the loss of a batch."""
        target = self.pair({}, labels)[1]
        return _LOSSES[self.loss or ""](self.outputs(logits), target)


_LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "cross_entropy": F.cross_entropy,
    "mse": lambda f, y: F.mse_loss(f, y.to(f.dtype)),
    "bce_with_logits": lambda f, y: F.binary_cross_entropy_with_logits(f, y.to(f.dtype)),
}


def gives_its_loss(module: nn.Module) -> bool:
    """Return whether a module takes labels: then it may have a loss of its own."""
    return takes(module, "labels") or takes(module, "label")


def logits_of(outputs: Batch) -> Batch:
    """Return the logits in what a model returns, or what it returns where there are none."""
    found = _entry(outputs, "logits")
    return outputs if found is None else found


def reading_of(module: nn.Module, batches: Iterable[Batch], loss: Any, decided: Reading | None) -> Reading:
    """Return how a module's logits and labels are read, judged on all ``batches`` where its own loss is to be ours.

    With a ``loss`` of the user's the first batch alone settles the layout.
    """
    left: list[Reading] | None = None if decided is None else [decided]
    batch: Batch = None
    for batch in batches:
        inputs, labels = _split(batch)
        label = _label_of(module, inputs, labels)
        own, logits = _with_labels(module, inputs, labels, label)
        if loss is not None:
            _warn_of_a_shift(logits, labels, own, loss)
            return _layout_for(logits, labels, label, batch, own)
        if own is None:
            raise ValueError(must_be("loss", "given, or the model's output to have a `loss`", "neither", SUBCLASS))
        if left is None:
            left = _candidates(logits, labels, label)
        left = [reading for reading in left if _equals(reading, logits, labels, own)]
        if not left:
            must = "the mean cross-entropy, squared error or binary cross-entropy of its logits"
            got = f"{float(own):.6g}, which is none of these, shifted by one position or not, on some batch"
            raise ValueError(must_be("The model's own loss", must, got, SUBCLASS))
    return (left or [Reading()])[0]


def _split(batch: Batch) -> tuple[Batch, Batch]:
    pair = split_labels(batch)
    if isinstance(pair, Mapping):
        hint = (
            "Name them so, or make batches pairs (inputs, targets), or subclass TorchTwiceDifferentiable: `outputs` "
            "and `per_sample_loss`."
        )
        raise ValueError(must_be("A batch that is a mapping", "one with 'labels'", sorted(map(str, pair)), hint))
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise ValueError(must_be("A batch", "a pair (inputs, targets)", type(pair).__name__, SUBCLASS))
    return pair


def _label_of(module: nn.Module, inputs: Batch, labels: Batch) -> str | None:
    """Return the name that labels must be given by for logits, or None where they are not needed for them."""
    try:
        with torch.no_grad():
            call(module, map_tensors(lambda tensor: tensor[:1], inputs))
    except (TypeError, ValueError, KeyError, RuntimeError, AttributeError):
        named = _named(inputs)
        for name in ("labels", "label"):
            if isinstance(inputs, Mapping) and (binds(module, **{**named, name: labels}) or binds(module, inputs)):
                return name
    return None


def _with_labels(module: nn.Module, inputs: Batch, labels: Batch, label: str | None) -> tuple[torch.Tensor | None, Any]:
    """Return the model's own loss of a batch, where it gives one, and its logits."""
    name = label or next((name for name in ("labels", "label") if takes(module, name)), None)
    with torch.no_grad():
        if name is None:
            outputs = call(module, inputs)
        elif isinstance(inputs, Mapping):
            outputs = call(module, {**inputs, name: labels})
        else:
            outputs = module(*(inputs if isinstance(inputs, tuple) else (inputs,)), **{name: labels})
    own = _entry(outputs, "loss")
    return (own if isinstance(own, torch.Tensor) and own.ndim == 0 else None), logits_of(outputs)


def _candidates(logits: Batch, labels: Batch, label: str | None) -> list[Reading]:
    """Return all readings that fit the shapes, the plainer first."""
    if not isinstance(logits, torch.Tensor) or not isinstance(labels, torch.Tensor):
        raise TypeError(must_be("The model's logits and labels", "tensors", type(logits).__name__, SUBCLASS))
    names = ["mse", "bce_with_logits"] if labels.is_floating_point() else ["cross_entropy", "bce_with_logits", "mse"]
    shifts = [False, True] if labels.ndim > 1 and not labels.is_floating_point() else [False]
    return [
        Reading(layout, shifted, name, label)
        for name, layout, shifted in itertools.product(names, ("classes_last", "as_is", "column"), shifts)
        if _fits(layout, logits, labels, name == "cross_entropy") and (name == "cross_entropy" or not shifted)
    ]


def _fits(layout: str, logits: torch.Tensor, labels: torch.Tensor, classes: bool) -> bool:
    """Return whether logits of a layout are for labels of these shapes."""
    shape, target = tuple(logits.shape), tuple(labels.shape)
    if layout == "classes_last":
        return classes and len(shape) > 2 and shape[:-1] == target
    if layout == "column":
        return not classes and shape == (*target, 1)
    return len(shape) > 1 and (shape[0], *shape[2:]) == target if classes else shape == target


def _layout_for(logits: Batch, labels: Batch, label: str | None, batch: Batch, own: torch.Tensor | None) -> Reading:
    """Return the layout of tokens' logits for a loss of the user's: classes go to axis 1, where torch has them."""
    if not isinstance(logits, torch.Tensor) or not isinstance(labels, torch.Tensor) or labels.is_floating_point():
        return Reading(label=label)
    last, natural = (_fits(layout, logits, labels, True) for layout in ("classes_last", "as_is"))
    if natural and not isinstance(batch, Mapping):
        return Reading(label=label)
    if last and natural:
        for layout, shifted in itertools.product(("classes_last", "as_is"), (False, True)):
            if own is not None and _equals(Reading(layout, shifted, "cross_entropy"), logits, labels, own):
                return Reading(layout, label=label)
        got = f"shape {tuple(logits.shape)} for labels {tuple(labels.shape)}, which is either"
        must = "of a shape that tells classes from positions"
        raise ValueError(must_be("The logits", must, got, SUBCLASS))
    return Reading("classes_last" if last else "as_is", label=label)


def _warn_of_a_shift(logits: Batch, labels: Batch, own: torch.Tensor | None, loss: Any) -> None:
    """Warn where a cross-entropy is given to a model whose own is that of the next position's label."""
    if own is None or not isinstance(loss, CrossEntropy) or labels.ndim < 2:
        return
    plain, shifted = (Reading("classes_last", flag, "cross_entropy") for flag in (False, True))
    if _equals(shifted, logits, labels, own) and not _equals(plain, logits, labels, own):
        message = "The model's own loss is that of the next position's label, and `loss=` is not. Try `loss=None`."
        warn(message, UserWarning)


def _equals(reading: Reading, logits: torch.Tensor, labels: torch.Tensor, own: torch.Tensor) -> bool:
    try:
        value = reading.value(logits, labels)
    except (RuntimeError, IndexError, ValueError):
        return False
    # Only rounding apart: a small term beside the loss (of a router, of its logits) is another loss.
    double = value.dtype == own.dtype == torch.float64
    rtol, atol = (1e-9, 1e-12) if double else (1e-5, 1e-6)
    # NaN on both sides: a batch whose labels are all ignored.
    return bool(torch.isclose(value, own.to(value), rtol=rtol, atol=atol, equal_nan=True))


def _entry(outputs: Batch, name: str) -> Any:
    if isinstance(outputs, Mapping):
        return outputs.get(name)
    return None if isinstance(outputs, torch.Tensor) else getattr(outputs, name, None)


def _named(inputs: Batch) -> dict[str, Any]:
    return {str(key): value for key, value in inputs.items()} if isinstance(inputs, Mapping) else {}
