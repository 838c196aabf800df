"""The calls of layers on a batch of samples, and the derivatives at their results."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..._check import must_be
from ..._types import Batch
from ..columns import Columns
from ..objective import Objective
from .attention import Key, taken_apart
from .kinds import Call, Inputs, Layer

__all__ = ["Captured", "PulledBack", "Signals", "captured", "slack"]

OUTSIDE = "its weights are used outside it too"


class Signals(NamedTuple):
    """What a curvature pulls back through a batch: Σ wᵢhᵢ = Σ gᵣgᵣᵀ with gᵣ = directionsᵣ · ∂value per sample.

    Attributes
    ----------
    value : tensor of shape (m, ...)
        Computed from the parameters, one entry or row per sample.
    directions : Columns
        r of them, (m, ...) each; weights included, as their roots.
    mass : tensor of shape (m,)
        Each sample's share of L's denominator.
    """

    value: torch.Tensor
    directions: Columns
    mass: torch.Tensor


class PulledBack(Protocol):
    """What is asked of a curvature that says what it pulls back through the model: ``Layered``, seen from here."""

    objective: Objective
    penalty: torch.Tensor | None
    rank: int

    def signals(self, batch: Batch, weights: torch.Tensor) -> Signals:
        """Return what is pulled back through a batch of these weights."""

    def diagonal_at(self, names: Collection[str]) -> torch.Tensor:
        """Return the exact diagonal at some parameters."""


class Captured:
    """A batch's signals, and the calls of every layer while they were computed.

    Parameters
    ----------
    found : Signals
        Of the batch.
    layers : list of Layer
        Whose calls these are.
    calls : list of list of Call
        Of each layer; those without a gradient are left out.
    eps : float
        The rounding of the passes.
    """

    def __init__(self, found: Signals, layers: list[Layer], calls: list[list[Call]], eps: float) -> None:
        self.value, self.directions, self.mass = found
        self.layers, self.m, self.eps = layers, len(found.mass), eps
        self.calls = [[call for call in own if call.edge is not None] for own in calls]
        self.called = {layer.name for layer, own in zip(layers, calls, strict=True) if own}

    def is_of(self, layers: Sequence[Layer]) -> bool:
        """Whether these are the calls of just these layers, none of which they were to be expanded for."""
        same = [one.key for one in layers] == [one.key for one in self.layers]
        return same and not any(layer.shared for layer in layers)

    def with_layers(self, layers: Sequence[Layer]) -> Captured:
        """Return the same calls as those of layers with the same keys, of which more is known."""
        other = copy.copy(self)
        other.layers = list(layers)
        return other

    def reasons(self) -> dict[str, str]:
        """Return why parameters of layers are not explained by these calls."""
        found: dict[str, str] = {}
        for layer, calls in zip(self.layers, self.calls, strict=True):
            why = next((why for call in calls if (why := _why_not(layer, call, self.m))), "")
            found.update(dict.fromkeys(layer.names, why) if why else {})
        return found

    def inputs(self, dtype: torch.dtype) -> list[Inputs | None]:
        """Return each layer's inputs; None where it was not called."""
        pairs = zip(self.layers, self.calls, strict=True)
        return [layer.inputs(calls, self.m, dtype) if calls else None for layer, calls in pairs]

    def signals(self, direction: torch.Tensor, inputs: list[Inputs | None]) -> list[torch.Tensor | None]:
        """Return each layer's signals along a direction; None where it was not called."""
        return self._signals(direction, inputs, [])[0]

    def checked(
        self, direction: torch.Tensor, inputs: list[Inputs | None]
    ) -> tuple[list[torch.Tensor | None], dict[str, str]]:
        """Return the signals, and the parameters whose derivative along the direction is not that of the calls."""
        parameters = {id(one): one for layer in self.layers for one in layer.parameters}
        signals, rest = self._signals(direction, inputs, list(parameters.values()))
        derivatives = dict(zip(parameters, rest, strict=True))
        wrong: dict[str, str] = {}
        for layer, a, g in zip(self.layers, inputs, signals, strict=True):
            expected = _placed(layer, [derivatives[id(one)] for one in layer.parameters])
            product, scale = (torch.zeros_like(expected), 0.0) if a is None or g is None else layer.product(a, g)
            if not float((product - expected).norm()) <= _rounding(product, self.eps) * scale:
                wrong.update(dict.fromkeys(layer.names, OUTSIDE))
        return signals, wrong

    def _signals(
        self, direction: torch.Tensor, inputs: list[Inputs | None], extra: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor | None], list[torch.Tensor]]:
        flat = [call for calls in self.calls for call in calls]
        targets: list[GradientEdge] = [call.edge for call in flat if call.edge is not None]
        targets += [get_gradient_edge(one) for one in extra]
        direction = direction.reshape(self.value.shape).to(self.value)
        found: Sequence[torch.Tensor | None] = [None] * len(targets)
        if targets and self.value.requires_grad:
            found = torch.autograd.grad(self.value, targets, direction, retain_graph=True, allow_unused=True)
        shapes = [call.shape for call in flat] + [one.shape for one in extra]
        parts = [
            self.value.new_zeros(shape) if part is None else part.detach().to(self.value.dtype)
            for part, shape in zip(found, shapes, strict=True)
        ]
        signals: list[torch.Tensor | None] = []
        start = 0
        for layer, calls, a in zip(self.layers, self.calls, inputs, strict=True):
            own = parts[start : start + len(calls)]
            signals.append(None if a is None else layer.signals(own, a, self.m))
            start += len(calls)
        return signals, parts[start:]


def captured(
    curvature: PulledBack,
    layers: Sequence[Layer],
    attentions: list[nn.MultiheadAttention],
    batch: Batch,
    weights: torch.Tensor,
) -> Captured:
    """Return a batch's signals and the calls of its layers."""
    with _recording(layers, attentions, len(weights), curvature.objective.model.autocast) as calls:
        found = curvature.signals(batch, weights)
    own = [calls.get(layer.key, []) for layer in layers]
    return Captured(found, list(layers), own, curvature.objective.eps)


@contextmanager
def _recording(
    layers: Sequence[Layer], attentions: list[nn.MultiheadAttention], m: int, autocast: torch.dtype | None
) -> Iterator[dict[Key, list[Call]]]:
    """Record every call of the layers on m samples while the context lasts."""
    recorder = _Recorder({layer.key: layer for layer in layers}, m, autocast)
    modules = {id(layer.module): layer.module for layer in layers if layer.key is layer.module}
    with ExitStack() as stack:
        stack.enter_context(taken_apart(attentions, recorder.record))
        for module in modules.values():
            handle = module.register_forward_hook(recorder.hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield recorder.calls


class _Recorder:
    """Takes down the calls of layers; the result of one that sees the same for every sample is expanded over them."""

    def __init__(self, layers: dict[Key, Layer], m: int, autocast: torch.dtype | None) -> None:
        self.layers, self.m, self.autocast = layers, m, autocast
        self.calls: dict[Key, list[Call]] = {}

    def record(self, key: Key, a: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        """Take down a call, and return its result as the rest of the model is to see it."""
        layer = self.layers.get(key)
        if layer is None:
            return result
        own = self.calls.setdefault(key, [])
        if not _has_memory(result):
            # Of a transform of `torch.func` in the forward pass: no tensor once that has ended.
            own.append(Call(a, result.shape, None))
            return result
        if result.dtype != self.autocast:
            _check_dtype(layer, result)
        # What is summed over rows is summed in the dtype of the parameters.
        a = a.to(layer.parameters[0].dtype) if a.is_floating_point() else a
        if layer.shared:
            whole = a.ndim > 1 and len(a) == 1 and layer.dims in (None, a.ndim)
            a, result = _expanded(a, self.m, whole), _expanded(result, self.m, whole)
        edge = get_gradient_edge(result) if result.requires_grad else None
        own.append(Call(a, result.shape, edge))
        return result

    def hook(
        self,
        module: nn.Module,
        args: tuple[torch.Tensor, ...],
        kwargs: dict[str, torch.Tensor],
        result: torch.Tensor,
    ) -> torch.Tensor:
        """Take down a call of a module."""
        return self.record(module, args[0] if args else next(iter(kwargs.values())), result)


def _check_dtype(layer: Layer, result: torch.Tensor) -> None:
    """Raise where a layer computes in another dtype than its parameters have."""
    own = layer.parameters[0].dtype
    if result.dtype != own:
        hint = "Is there an autocast in the forward pass? Try the model without it."
        raise ValueError(must_be(f"The result of {layer.name}", f"{own}, as its parameters are", result.dtype, hint))


def _has_memory(tensor: torch.Tensor) -> bool:
    """Return whether a tensor has numbers of its own; those that a transform of ``torch.func`` passes on have none."""
    try:
        tensor.data_ptr()
    except RuntimeError:
        return False
    return True


def _expanded(tensor: torch.Tensor, m: int, whole: bool) -> torch.Tensor:
    """Return m times the tensor: along its first axis, of length 1, where it is a ``whole`` batch, else a new one."""
    return tensor.expand(m, *tensor.shape[1:]) if whole else tensor.expand(m, *tensor.shape)


def slack(eps: float) -> float:
    """Return how far two ways to a sum may differ, relative to its terms, where passes round by ``eps``."""
    # Of bfloat16 a tenth: what is wrong differs by more.
    return min(1e3 * eps, 0.1)


def _rounding(product: torch.Tensor, eps: float) -> float:
    """Return how far two ways to a product may differ; torch multiplies in TF32 on a GPU, where it may."""
    return max(slack(eps), 5e-3 if product.is_cuda and product.dtype == torch.float32 else 0.0)


def _why_not(layer: Layer, call: Call, m: int) -> str:
    """Return why a call on m samples cannot be read as rows of samples, or nothing."""
    shape = call.input.shape
    if layer.dims not in (None, len(shape)):
        return f"sees an input {tuple(shape)} of {m} samples"
    return (
        "" if shape[layer.axis] % m == 0 else f"sees an input {tuple(shape)} of {m} samples: not a row, or rows, each"
    )


def _placed(layer: Layer, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return derivatives by the layer's parameters in the order of its matrix."""
    start = min(place.start for place in layer.places)
    row = parts[0].new_zeros(max(place.stop for place in layer.places) - start)
    for place, part in zip(layer.places, parts, strict=True):
        row[place.start - start : place.stop - start] = part.reshape(-1)
    return row[layer.index.to(row.device) - start]
