"""The calls of layers on a batch, and the probe on a few samples that finds which calls explain their gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge

from ..models import leading_length, map_tensors
from .attention import taken_apart
from .base import Objective
from .kronecker_layers import Layer, Layers, layers_of
from .layers import Call

__all__ = ["Captured", "Layered", "Signals", "captured", "probe"]

OUTSIDE = "its weights are used outside it too"


class Signals(NamedTuple):
    """What a curvature pulls back through a batch: H = Σ gᵣgᵣᵀ + penalty with gᵣ = Σ directionsᵣ · ∂value per sample.

    Attributes
    ----------
    value : tensor of shape (m, ...)
        Computed from the parameters, one entry or row per sample.
    directions : tensor of shape (r, m, ...)
        Weights and denominators included, as their roots.
    mass : tensor of shape (m,)
        Each sample's share of L's denominator.
    """

    value: torch.Tensor
    directions: torch.Tensor
    mass: torch.Tensor


class Layered(Protocol):
    """A curvature that says what it pulls back."""

    objective: Objective

    @property
    def penalty(self) -> torch.Tensor | None:
        """The penalty's Hessian as a diagonal (p,), or None."""

    def signals(self, batch: Any, weights: torch.Tensor) -> Signals:
        """Return what is pulled back through a batch."""

    def diagonal(self) -> torch.Tensor:
        """Return the exact diagonal (p,)."""


class Captured:
    """A batch's signals, and the calls of every layer while they were computed.

    Parameters
    ----------
    found : Signals
        Of the batch.
    layers : list of Layer
        Whose calls these are.
    calls : list of list of Call
        Of each layer, all with an edge.
    """

    def __init__(self, found: Signals, layers: list[Layer], calls: list[list[Call]]) -> None:
        self.value, self.directions, self.mass = found
        self.layers, self.calls, self.m = layers, calls, len(found.mass)

    def reasons(self) -> dict[str, str]:
        """Return why parameters of layers are not explained by these calls."""
        found: dict[str, str] = {}
        for layer, calls in zip(self.layers, self.calls, strict=True):
            why = next((why for call in calls if (why := _why_not(layer, call, self.m))), "")
            found.update(dict.fromkeys(layer.names, why) if why else {})
        return found

    def inputs(self, dtype: torch.dtype) -> list[Any]:
        """Return each layer's inputs; None where it was not called."""
        pairs = zip(self.layers, self.calls, strict=True)
        return [layer.inputs(calls, self.m, dtype) if calls else None for layer, calls in pairs]

    def signals(self, direction: torch.Tensor, inputs: list[Any]) -> list[Any]:
        """Return each layer's signals along a direction; None where it was not called."""
        return self._signals(direction, inputs, [])[0]

    def checked(self, direction: torch.Tensor, inputs: list[Any]) -> tuple[list[Any], dict[str, str]]:
        """Return the signals, and the parameters whose derivative along the direction is not that of the calls."""
        parameters = {id(one): one for layer in self.layers for one in layer.parameters}
        signals, rest = self._signals(direction, inputs, list(parameters.values()))
        derivatives = dict(zip(parameters, rest, strict=True))
        wrong: dict[str, str] = {}
        for layer, a, g in zip(self.layers, inputs, signals, strict=True):
            expected = _placed(layer, [derivatives[id(one)] for one in layer.parameters])
            product, scale = (torch.zeros_like(expected), 0.0) if g is None else layer.product(a, g)
            tolerance = 1e3 * torch.finfo(product.dtype).eps * scale
            if not float((product - expected).norm()) <= tolerance:
                wrong.update(dict.fromkeys(layer.names, OUTSIDE))
        return signals, wrong

    def _signals(
        self, direction: torch.Tensor, inputs: list[Any], extra: list[torch.Tensor]
    ) -> tuple[list[Any], list[torch.Tensor]]:
        flat = [call for calls in self.calls for call in calls]
        targets: list[Any] = [*(call.edge for call in flat), *extra]
        direction = direction.reshape(self.value.shape).to(self.value)
        found: Sequence[Any] = [None] * len(targets)
        if targets and self.value.requires_grad:
            found = torch.autograd.grad(self.value, targets, direction, retain_graph=True, allow_unused=True)
        shapes = [call.shape for call in flat] + [one.shape for one in extra]
        parts = [
            self.value.new_zeros(shape) if part is None else part.detach()
            for part, shape in zip(found, shapes, strict=True)
        ]
        signals: list[Any] = []
        start = 0
        for layer, calls, a in zip(self.layers, self.calls, inputs, strict=True):
            own = parts[start : start + len(calls)]
            signals.append(layer.signals(own, a, self.m) if calls else None)
            start += len(calls)
        return signals, parts[start:]


def captured(
    curvature: Layered, layers: Sequence[Layer], attentions: list[nn.MultiheadAttention], batch: Any, weights: Any
) -> Captured:
    """Return a batch's signals and the calls of its layers."""
    with _recording(layers, attentions, len(weights)) as calls:
        found = curvature.signals(batch, weights)
    own = [[call for call in calls.get(layer.key, []) if call.edge is not None] for layer in layers]
    return Captured(found, list(layers), own)


@contextmanager
def _recording(
    layers: Sequence[Layer], attentions: list[nn.MultiheadAttention], m: int
) -> Iterator[dict[Any, list[Call]]]:
    """Record every call of the layers; the result of one that sees the same for every sample is expanded over them."""
    calls: dict[Any, list[Call]] = {}
    by_key = {layer.key: layer for layer in layers}

    def record(key: Any, a: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        layer = by_key.get(key)
        if layer is None:
            return result
        if layer.shared:
            whole = a.ndim > 1 and len(a) == 1 and layer.dims in (None, a.ndim)
            a, result = _expanded(a, m, whole), _expanded(result, m, whole)
        edge = get_gradient_edge(result) if result.requires_grad else None
        calls.setdefault(key, []).append(Call(a, result.shape, edge))
        return result

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: torch.Tensor) -> torch.Tensor:
        return record(module, args[0] if args else next(iter(kwargs.values())), result)

    modules = {id(layer.module): layer.module for layer in layers if layer.key is layer.module}
    with ExitStack() as stack:
        stack.enter_context(taken_apart(attentions, record))
        for module in modules.values():
            handle = module.register_forward_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield calls


def _expanded(tensor: torch.Tensor, m: int, whole: bool) -> torch.Tensor:
    """Return m times the tensor: along its first axis, of length 1, where it is a ``whole`` batch, or along a new one."""
    return tensor.expand(m, *tensor.shape[1:]) if whole else tensor.expand(m, *tensor.shape)


# -- the probe ---------------------------------------------------------------------------------------------------------


def probe(curvature: Layered) -> tuple[Layers, int]:
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
    found = _with_axes(curvature, found, (one, unit), (twice, unit.repeat(2)))
    size = 1
    for part, m in parts:
        found, size = _verified(curvature, found, part, unit.repeat(m), size)
    return found, size


def _with_axes(curvature: Layered, found: Layers, one: tuple[Any, Any], twice: tuple[Any, Any]) -> Layers:
    """Return the layers with the axis of their samples: the one that is twice as long for twice the samples."""
    first, second = (captured(curvature, found.layers, found.attentions, *part) for part in (one, twice))
    layers, reasons = [], {}
    for layer, a, b in zip(found.layers, first.calls, second.calls, strict=True):
        axes = {_axis(x.input.shape, y.input.shape) for x, y in zip(a, b, strict=False)}
        if not a:
            reasons.update(dict.fromkeys(layer.names, "never called as a layer, or without a gradient"))
        elif len(a) != len(b) or len(axes) != 1 or None in axes:
            why = f"sees an input {tuple(a[0].input.shape)} of one sample and {tuple(b[0].input.shape)} of two"
            reasons.update(dict.fromkeys(layer.names, why))
        else:
            axis = axes.pop()
            layers.append(replace(layer, axis=max(0, axis), shared=axis < 0))
    return Layers(layers + [one for one in found.layers if set(one.names) & set(reasons)], *found[1:]).without(reasons)


def _axis(one: Sequence[int], two: Sequence[int]) -> int | None:
    """Return the axis along which an input grows with the samples; −1 where it does not grow, None where unclear."""
    if len(one) != len(two):
        return None
    grown = [k for k, (a, b) in enumerate(zip(one, two, strict=True)) if a != b]
    if not grown:
        return -1
    return grown[0] if len(grown) == 1 and two[grown[0]] == 2 * one[grown[0]] else None


def _verified(curvature: Layered, found: Layers, part: Any, weights: torch.Tensor, size: int) -> tuple[Layers, int]:
    """Return the layers whose calls on a part of the data explain their gradients, and the bytes of one sample."""
    plain = captured(curvature, [], [], part, weights).value.detach()
    try:
        seen = captured(curvature, found.layers, found.attentions, part, weights)
        same = seen.value.shape == plain.shape and torch.allclose(seen.value, plain, **_tolerance(plain))
    except RuntimeError:
        # The expanded results of a shared layer do not fit the model.
        same = False
    if not same:
        touched = [layer for layer in found.layers if layer.shared or layer.key is not layer.module]
        if not touched:
            raise ValueError("The model's outputs change while its layers are watched.")
        why = "sees the same for every sample" if any(layer.shared for layer in touched) else "inside an attention"
        reasons = {name: why for layer in touched for name in layer.names}
        return _verified(curvature, found.without(reasons)._replace(attentions=[]), part, weights, size)
    reasons = seen.reasons()
    if reasons:
        return _verified(curvature, found.without(reasons), part, weights, size)
    inputs = seen.inputs(plain.dtype)
    direction = _mixture(seen.directions)
    _, wrong = seen.checked(direction, inputs)
    wrong.update(_mixed(seen, direction, inputs))
    numbers = 3 * plain[0].numel() * len(seen.directions)
    numbers += 3 * sum(_numel(a) + _numel(g) for a, g in zip(inputs, seen.signals(direction, inputs), strict=True))
    return found.without(wrong), max(size, numbers * plain.dtype.itemsize // len(weights))


def _mixed(seen: Captured, direction: torch.Tensor, inputs: list[Any]) -> dict[str, str]:
    """Return the parameters of layers where the last sample's derivatives are not at the last sample's place."""
    last = direction.clone()
    last[:-1] = 0
    reasons: dict[str, str] = {}
    for layer, g in zip(seen.layers, seen.signals(last, inputs), strict=True):
        if g is not None and bool(g[:-1].any()):
            reasons.update(dict.fromkeys(layer.names, "sees the samples mixed, or in another order"))
    return reasons


def _mixture(directions: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mixture = torch.randn(len(directions), generator=generator, dtype=torch.float64).to(directions)
    return torch.einsum("r,r...->...", mixture, directions)


def _tolerance(value: torch.Tensor) -> dict[str, float]:
    rtol = 1e3 * torch.finfo(value.dtype).eps
    return {"rtol": rtol, "atol": rtol * float(value.abs().max()), "equal_nan": True}


def _why_not(layer: Layer, call: Call, m: int) -> str:
    """Return why a call on m samples cannot be read as rows of samples, or nothing."""
    shape = call.input.shape
    if layer.dims not in (None, len(shape)):
        return f"sees an input {tuple(shape)} of {m} samples"
    return "" if shape[layer.axis] % m == 0 else f"sees an input {tuple(shape)} of {m} samples: not a row, or rows, each"


def _placed(layer: Layer, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return derivatives by the layer's parameters in the order of its matrix."""
    start = min(place.start for place in layer.places)
    row = parts[0].new_zeros(max(place.stop for place in layer.places) - start)
    for place, part in zip(layer.places, parts, strict=True):
        row[place.start - start : place.stop - start] = part.reshape(-1)
    return row[layer.index - start]


def _numel(value: Any) -> int:
    if value is None:
        return 0
    return sum(one.numel() for one in value) if isinstance(value, list) else value.numel()
