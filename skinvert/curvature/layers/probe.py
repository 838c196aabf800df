"""The probe of a few samples: which layers' calls explain their gradients, and along which axis the samples lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest

import torch

from ..._types import Batch
from ...models import leading_length, map_tensors
from .found import Layers, layers_of
from .kinds import Inputs, Layer
from .recording import Captured, PulledBack, captured, slack

__all__ = ["probe"]


def probe(curvature: PulledBack) -> tuple[Layers, int]:
    """Return the layers whose calls explain their gradients, why the others do not, and the bytes that a sample takes.

    On one sample, on that sample twice, and on a few: which axis grows with the samples is that of the samples,
    whatever the lengths; and Σ gₜaₜᵀ must be the derivative by the weights, which it is not where the model uses them
    outside the layer too.
    """
    found = layers_of(curvature.objective.model)
    batch, weights = next(iter(curvature.objective.batches))
    unit = torch.ones_like(weights[:1])
    one = map_tensors(lambda tensor: tensor[:1], batch)
    twice = map_tensors(lambda tensor: torch.cat((tensor[:1], tensor[:1])), batch)
    few = min(8, leading_length(batch))
    parts = [(one, 1), (twice, 2)] + ([(map_tensors(lambda tensor: tensor[:few], batch), few)] if few > 1 else [])
    found, *known = _with_axes(curvature, found, (one, unit), (twice, unit.repeat(2)))
    size = 1
    for (part, m), seen in zip_longest(parts, known):
        found, size = _verified(curvature, found, part, unit.repeat(m), size, seen)
    return found, size


def _with_axes(
    curvature: PulledBack, found: Layers, one: tuple[Batch, torch.Tensor], twice: tuple[Batch, torch.Tensor]
) -> tuple[Layers, Captured, Captured]:
    """Return the layers with the axis of their samples, twice as long for twice the samples, and the calls on both."""
    first, second = (captured(curvature, found.layers, found.attentions, *part) for part in (one, twice))
    layers: list[Layer] = []
    reasons: dict[str, str] = {}
    for layer, a, b in zip(found.layers, first.calls, second.calls, strict=True):
        axes = {_axis(x.input.shape, y.input.shape) for x, y in zip(a, b, strict=False)}
        axis = axes.pop() if len(axes) == 1 and len(a) == len(b) else None
        if not a:
            why = "without a gradient, or under torch.func" if layer.name in first.called else "never called as a layer"
            reasons.update(dict.fromkeys(layer.names, why))
        elif axis is None:
            why = f"sees an input {tuple(a[0].input.shape)} of one sample and {tuple(b[0].input.shape)} of two"
            reasons.update(dict.fromkeys(layer.names, why))
        else:
            layers.append(replace(layer, axis=max(0, axis), shared=axis < 0))
    left = [layer for layer in layers if not set(layer.names) & set(reasons)]
    return found.without(reasons)._replace(layers=left), first, second


def _axis(one: Sequence[int], two: Sequence[int]) -> int | None:
    """Return the axis along which an input grows with the samples; −1 where it does not grow, None where unclear."""
    if len(one) != len(two):
        return None
    grown = [k for k, (a, b) in enumerate(zip(one, two, strict=True)) if a != b]
    if not grown:
        return -1
    return grown[0] if len(grown) == 1 and two[grown[0]] == 2 * one[grown[0]] else None


def _verified(
    curvature: PulledBack, found: Layers, part: Batch, weights: torch.Tensor, size: int, known: Captured | None = None
) -> tuple[Layers, int]:
    """Return the layers whose calls on a part of the data explain their gradients, and the bytes of one sample.

    Those calls are ``known`` where nothing was found out about the layers since.
    """
    seen, reasons = _watched(curvature, found, part, weights, known)
    if seen is None:
        return _verified(curvature, found.without(reasons)._replace(attentions=[]), part, weights, size)
    reasons = seen.reasons()
    if reasons:
        return _verified(curvature, found.without(reasons), part, weights, size)
    inputs = seen.inputs(seen.value.dtype)
    direction = _direction(seen.value)
    signals, wrong = seen.checked(direction, inputs)
    wrong.update(_mixed(seen, direction, inputs))
    numbers = seen.value.numel() + len(weights) * seen.directions.row_numbers // 3
    numbers += sum(_numel(a) for a in inputs) + sum(g.numel() for g in signals if g is not None)
    return found.without(wrong), max(size, 3 * numbers * seen.value.dtype.itemsize // len(weights))


def _watched(
    curvature: PulledBack, found: Layers, part: Batch, weights: torch.Tensor, known: Captured | None
) -> tuple[Captured | None, dict[str, str]]:
    """Return the calls on a part of the data; None, and why, where taking a layer apart changes the model's results."""
    touched = [layer for layer in found.layers if layer.shared or layer.key is not layer.module]
    if known is not None and not found.attentions and known.is_of(found.layers):
        return known.with_layers(found.layers), {}
    if not touched and not found.attentions:
        return captured(curvature, found.layers, [], part, weights), {}
    expected = captured(curvature, [], [], part, weights).value.detach()
    try:
        seen = captured(curvature, found.layers, found.attentions, part, weights)
        if not touched or _is_close(seen.value, expected, seen.eps):
            return seen, {}
    except RuntimeError:
        # The expanded results of a layer that all samples share do not fit the model.
        if not touched:
            raise
    shared = any(layer.shared for layer in touched)
    why = "sees as many rows for more samples" if shared else "in an attention of its own"
    return None, {name: why for layer in touched for name in layer.names}


def _mixed(seen: Captured, direction: torch.Tensor, inputs: list[Inputs | None]) -> dict[str, str]:
    """Return the parameters of layers where the last sample's derivatives are not at the last sample's place."""
    if len(direction) == 1:
        return {}
    last = direction.clone()
    last[:-1] = 0
    reasons: dict[str, str] = {}
    for layer, g in zip(seen.layers, seen.signals(last, inputs), strict=True):
        if g is not None and bool(g[:-1].any()):
            reasons.update(dict.fromkeys(layer.names, "sees the samples mixed, or in another order"))
    return reasons


def _direction(value: torch.Tensor) -> torch.Tensor:
    """Return random numbers: the curvature's own directions vanish for confident samples and ignored targets."""
    generator = torch.Generator("cpu").manual_seed(0)
    return torch.randn(value.shape, generator=generator, dtype=torch.float64, device="cpu").to(value)


def _is_close(value: torch.Tensor, expected: torch.Tensor, eps: float) -> bool:
    if value.shape != expected.shape:
        return False
    rtol = slack(eps)
    return torch.allclose(value, expected, rtol, rtol * float(expected.abs().max()), equal_nan=True)


def _numel(tensors: Inputs | None) -> int:
    return 0 if tensors is None else sum(one.numel() for one in tensors)
