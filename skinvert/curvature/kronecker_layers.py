"""Layers with factors: their parameters as one matrix, what they see as rows, and who has none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from .._validation import must_be
from ..models import TorchTwiceDifferentiable
from .attention import PARTS, is_attention
from .kronecker_rows import Rows, Table, form_of
from .layers import Call

__all__ = ["ElementwiseLayer", "KroneckerLayer", "Layer", "Layers", "layers_of", "refuse"]

# scikit-learn's words for the parameters of a linear layer.
ROLES = {"coef": "weight", "intercept": "bias"}
# Their weights lie along the channels, the second axis; those of other norms along the last ones.
CHANNEL_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.GroupNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)


@dataclass(frozen=True)
class Layer:
    """A layer whose recorded calls give the gradients by its parameters.

    Attributes
    ----------
    name : str
        The module's.
    key : module, or (module, part)
        Of its calls.
    module : Module
        The layer.
    names : list of str
        Of the selected parameters that it holds; ``parameters``, the tensors; ``places``, where each lies in a flat
        row.
    index : tensor
        Where its parameters lie in a flat row.
    axis : int
        The axis of the samples in what it sees.
    shared : bool
        Whether it sees the same for every sample, such as a table of positions: it is expanded over the samples.
    """

    name: str
    key: Any
    module: nn.Module
    names: list[str]
    parameters: list[torch.Tensor] = field(repr=False)
    places: list[slice]
    index: torch.Tensor
    axis: int = field(default=0, kw_only=True)
    shared: bool = field(default=False, kw_only=True)

    @property
    def dims(self) -> int | None:
        """Number of axes of an input, where the module demands one."""
        return None

    def inputs(self, calls: Sequence[Call], m: int, dtype: torch.dtype) -> Any:
        """Return what the layer sees of m samples, over all its calls, in the form that ``product`` takes."""
        raise NotImplementedError

    def signals(self, parts: Sequence[torch.Tensor], inputs: Any, m: int) -> torch.Tensor:
        """Return the derivatives at the results of all calls as rows of the samples."""
        raise NotImplementedError

    def product(self, inputs: Any, signals: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Return the derivative by the parameters, summed over the samples, and the scale of its rounding errors."""
        raise NotImplementedError

    def _first(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().movedim(self.axis, 0)


@dataclass(frozen=True)
class KroneckerLayer(Layer):
    """A layer z_t = W a_t + b of T rows a sample, with [W, b] as one matrix (d, i), or q of them for q groups.

    A layer that is called several times sees the rows of all its calls.
    """

    form: Rows
    has_weight: bool
    has_bias: bool

    @property
    def dims(self) -> int | None:
        """Number of axes of an input, where the module demands one."""
        return self.form.dims

    @property
    def is_one_hot(self) -> bool:
        """Whether the inputs are one-hot rows, with a diagonal second moment."""
        return isinstance(self.form, Table)

    def inputs(self, calls: Sequence[Call], m: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the inputs as rows (m, [q,] T, i), the bias's coordinate included."""
        seen = [self.form.inputs(self.module, self._first(call.input), call.shape, dtype) for call in calls]
        rows = _joined(seen, m)
        ones = rows.new_ones(*rows.shape[:-1], 1)
        return torch.cat(([rows] if self.has_weight else []) + ([ones] if self.has_bias else []), dim=-1)

    def signals(self, parts: Sequence[torch.Tensor], inputs: Any, m: int) -> torch.Tensor:
        """Return the derivatives as rows (m, [q,] T, d)."""
        return _joined([self.form.signals(self.module, self._first(g)) for g in parts], m)

    def product(self, inputs: torch.Tensor, signals: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Return Σ g aᵀ over samples and rows."""
        return gram(signals, inputs), float(signals.norm() * inputs.norm())


@dataclass(frozen=True)
class ElementwiseLayer(Layer):
    """The scale γ and shift β of a norm, z = γ x̂ + β: few parameters, with the exact diagonal Σᵢ (Σ_t g x̂, Σ_t g)²."""

    roles: list[str]

    def inputs(self, calls: Sequence[Call], m: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """Return x̂ of each call, the samples first."""
        held = dict(self.module.named_parameters(recurse=False))
        zeros = {role: torch.zeros_like(tensor) for role, tensor in held.items()}
        units = {role: tensor if role in BIASES else torch.ones_like(tensor) for role, tensor in zeros.items()}
        seen = []
        with torch.no_grad():
            for call in calls:
                # Some norms scale by 1 + γ.
                unit, zero = (
                    torch.func.functional_call(self.module, values, (call.input,)) for values in (units, zeros)
                )
                seen.append(self._first(unit - zero))
        return seen

    def signals(self, parts: Sequence[torch.Tensor], inputs: list[torch.Tensor], m: int) -> torch.Tensor:
        """Return each sample's gradient (m, number of parameters)."""
        rows = []
        for role, parameter in zip(self.roles, self.parameters, strict=True):
            total = torch.zeros((), dtype=parameter.dtype, device=parameter.device)
            for g, unit in zip(parts, inputs, strict=True):
                value = self._first(g) if role in BIASES else self._first(g) * unit
                total = total + self._of_parameter(value, parameter).reshape(m, -1, parameter.numel()).sum(1)
            rows.append(total)
        return torch.cat(rows, dim=1)

    def product(self, inputs: list[torch.Tensor], signals: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Return the sum of the gradients."""
        size = math.sqrt(sum(float(unit.square().sum()) for unit in inputs) + sum(unit.numel() for unit in inputs))
        return signals.sum(0), float(signals.norm()) * size

    def _of_parameter(self, value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        """Return the entries of z as rows (m, T, number of the parameter's)."""
        if _has_channels(self.module):
            return value.flatten(2).sum(2) if value.ndim > 2 else value
        return value.reshape(len(value), -1, parameter.numel())


BIASES = ("bias", "beta", "shift")


class Layers(NamedTuple):
    """What holds the selected parameters: layers, attentions to be taken apart, and why the others are in none."""

    layers: list[Layer]
    attentions: list[nn.MultiheadAttention]
    reasons: dict[str, str]

    def without(self, reasons: dict[str, str]) -> Layers:
        """Return the layers that hold none of the parameters named in ``reasons``."""
        left = [layer for layer in self.layers if not set(layer.names) & set(reasons)]
        dropped = {name for layer in self.layers if set(layer.names) & set(reasons) for name in layer.names}
        whole = {name: reasons.get(name, "beside one that has none") for name in dropped}
        return Layers(left, self.attentions, {**self.reasons, **whole})


def gram(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return Σ x yᵀ over samples and rows, of rows (m, [q,] T, d) and (m, [q,] T, i)."""
    if x.ndim == 3:
        return x.flatten(0, 1).mT @ y.flatten(0, 1)
    return x.movedim(0, 1).flatten(1, 2).mT @ y.movedim(0, 1).flatten(1, 2)


def layers_of(model: TorchTwiceDifferentiable) -> Layers:
    """Return the layers that hold selected parameters, and why each other selected parameter is in none of them."""
    owners = {id(tensor): name for name, tensor in zip(model.layout.names, model.theta, strict=True)}
    holders: dict[str, list[str]] = {name: [] for name in model.layout.names}
    held: list[tuple[str, nn.Module, dict[str, str]]] = []
    attentions = []
    for name, module in model.module.named_modules():
        own = {
            ROLES.get(role, role): owners[id(tensor)]
            for role, tensor in module.named_parameters(recurse=False, remove_duplicate=False)
            if id(tensor) in owners
        }
        for owner in own.values():
            holders[owner].append(name or type(module).__name__)
        if own:
            held.append((name or type(module).__name__, module, own))
        if is_attention(module) and any(id(tensor) in owners for tensor in module.parameters()):
            attentions.append(module)
    layers: list[Layer] = []
    reasons: dict[str, str] = {}
    for name, module, own in held:
        tied = [owner for owner in own.values() if len(holders[owner]) > 1]
        reason = f"tied weights: in {' and '.join(holders[tied[0]])}" if tied else _reason(module, own)
        if reason:
            reasons.update(dict.fromkeys(own.values(), reason))
        else:
            layers += _Matrices(model).layers(name, module, own)
    return Layers(layers, attentions, reasons)


def refuse(reasons: dict[str, str]) -> None:
    """Raise, naming the parameters that no layer with factors holds, and why."""
    must = "in a Linear, convolution, Embedding, attention or norm that shares no weights and sees samples in a batch"
    listed = "; ".join(f"{name} ({reason})" for name, reason in reasons.items())
    hint = 'Try method=EKFAC(unsupported="diagonal") (or KFAC), or leave them out with `params`.'
    raise ValueError(must_be("Every parameter for Kronecker factors", must, listed, hint))


def _reason(module: nn.Module, own: dict[str, str]) -> str:
    """Return why a module has no factors, or nothing where it has."""
    kind = type(module).__name__
    if is_attention(module):
        return "an attention's own row of keys or values" if {"bias_k", "bias_v"} & set(own) else ""
    if _is_norm(module):
        return "" if set(own) <= {"weight", "gamma", "scale", *BIASES} else f"a {kind}"
    if form_of(module) is None:
        return f"a {kind}"
    if not set(own) <= {"weight", "bias"}:
        return f"a reparametrised {kind}"
    if getattr(module, "scale_grad_by_freq", False):
        hint = "It scales the gradients of a batch by what else is in it. Try `scale_grad_by_freq = False`."
        raise ValueError(must_be("An Embedding for Kronecker factors", "without scale_grad_by_freq", "True", hint))
    return ""


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm by its name, a user's own RMSNorm included; its gradients are checked."""
    return _has_channels(module) or (type(module).__name__.endswith("Norm") and not [*module.children()])


def _has_channels(module: nn.Module) -> bool:
    """Whether a norm's weights lie along the channels, as those of a ``LayerNorm2d`` do."""
    return isinstance(module, CHANNEL_NORMS) or type(module).__name__.endswith(("Norm1d", "Norm2d", "Norm3d"))


class _Matrices:
    """Builds layers from the places of their parameters."""

    def __init__(self, model: TorchTwiceDifferentiable) -> None:
        self.model, self.slices = model, model.layout.slices
        self.tensors = dict(zip(model.layout.names, model.theta, strict=True))

    def layers(self, name: str, module: nn.Module, own: dict[str, str]) -> list[Layer]:
        """Return a module's layers: one, or the projections of an attention."""
        if is_attention(module):
            return self._projections(name, module, own)
        if _is_norm(module):
            names = list(own.values())
            index = torch.cat([self._numbers(one).reshape(-1) for one in names])
            return [ElementwiseLayer(name, module, module, *self._held(names), index, list(own))]
        form = form_of(module)
        return [] if form is None else [self._kronecker(name, module, module, form, self._entries(own))]

    def _entries(self, own: dict[str, str]) -> dict[str, tuple[str, torch.Tensor]]:
        return {role: (name, self._numbers(name)) for role, name in own.items()}

    def _projections(self, name: str, module: Any, own: dict[str, str]) -> list[Layer]:
        entries, size = self._entries(own), module.embed_dim
        layers: list[Layer] = []
        for j, part in enumerate(PARTS):
            mine = {}
            for role, packed in (("weight", "in_proj_weight"), ("bias", "in_proj_bias")):
                if packed in entries:
                    owner, numbers = entries[packed]
                    mine[role] = (owner, numbers[j * size : (j + 1) * size])
            if f"{part}_proj_weight" in entries:
                mine["weight"] = entries[f"{part}_proj_weight"]
            if mine:
                layers.append(self._kronecker(f"{name}.{part}_proj", module, (module, part), Rows(), mine))
        return layers

    def _kronecker(
        self, name: str, module: nn.Module, key: Any, form: Rows, entries: dict[str, tuple[str, torch.Tensor]]
    ) -> KroneckerLayer:
        columns = []
        if "weight" in entries:
            columns.append(form.weights(module, entries["weight"][1]))
        if "bias" in entries:
            columns.append(form.biases(module, entries["bias"][1]))
        names = [owner for owner, _ in entries.values()]
        index = torch.cat(columns, dim=-1)
        return KroneckerLayer(
            name, key, module, *self._held(names), index, form, "weight" in entries, "bias" in entries
        )

    def _held(self, names: list[str]) -> tuple[list[str], list[torch.Tensor], list[slice]]:
        return names, [self.tensors[name] for name in names], [self.slices[name] for name in names]

    def _numbers(self, name: str) -> torch.Tensor:
        place = self.slices[name]
        return torch.arange(place.start, place.stop, device=self.model.device).reshape(self.tensors[name].shape)


def _joined(parts: Sequence[torch.Tensor], m: int) -> torch.Tensor:
    """Return the rows of all calls, (m, [q,] T, d), of parts (m r, [q,] t, d) with r rows a sample folded in."""
    rows = [part if len(part) == m else _unfolded(part, m) for part in parts]
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=-2)


def _unfolded(rows: torch.Tensor, m: int) -> torch.Tensor:
    return rows.reshape(m, len(rows) // m, *rows.shape[1:]).movedim(1, -3).flatten(-3, -2)
