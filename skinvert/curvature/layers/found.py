"""Which layers hold the selected parameters, and why the other parameters are in none that has factors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from ..._check import must_be
from ...models import TorchTwiceDifferentiable
from .attention import PARTS, Key, is_attention
from .forms import Rows, form_of
from .kinds import BIASES, ElementwiseLayer, KroneckerLayer, Layer, has_channels

__all__ = ["Layers", "layers_of", "refuse"]

# scikit-learn's words for the parameters of a linear layer.
ROLES = {"coef": "weight", "intercept": "bias"}


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


def layers_of(model: TorchTwiceDifferentiable) -> Layers:
    """Return the layers that hold selected parameters, and why each other selected parameter is in none of them."""
    owners = {id(tensor): name for name, tensor in zip(model.layout.names, model.theta, strict=True)}
    modules = model.module.named_modules()
    held = [(name or type(module).__name__, module, _own(module, owners)) for name, module in modules]
    holders: dict[str, list[str]] = {name: [] for name in model.layout.names}
    for name, _, own in held:
        for owner in own.values():
            holders[owner].append(name)
    layers: list[Layer] = []
    reasons: dict[str, str] = {}
    for name, module, own in held:
        if not own:
            continue
        tied = [owner for owner in own.values() if len(holders[owner]) > 1]
        reason = f"tied weights: in {' and '.join(holders[tied[0]])}" if tied else _reason(module, own)
        if reason:
            reasons.update(dict.fromkeys(own.values(), reason))
        else:
            layers += _Matrices(model).layers(name, module, own)
    attentions = [
        module
        for _, module, _ in held
        if is_attention(module) and any(id(tensor) in owners for tensor in module.parameters())
    ]
    return Layers(layers, attentions, reasons)


def _own(module: nn.Module, owners: dict[int, str]) -> dict[str, str]:
    """Return the role and the name of each selected parameter that a module itself holds."""
    return {
        ROLES.get(role, role): owners[id(tensor)]
        for role, tensor in module.named_parameters(recurse=False, remove_duplicate=False)
        if id(tensor) in owners
    }


def refuse(reasons: dict[str, str]) -> None:
    """Raise, naming the parameters that no layer with factors holds, and why."""
    must = "in a Linear, convolution, Embedding, attention or norm that shares no weights and sees samples in a batch"
    listed = "; ".join(f"{name} ({reason})" for name, reason in reasons.items())
    hint = 'Try method=EKFAC(unsupported="diagonal") (or KFAC), or leave them out with `params`.'
    raise ValueError(must_be("Every parameter for Kronecker factors", must, listed, hint))


def _reason(module: nn.Module, own: dict[str, str]) -> str:
    """Return why a module has no factors, or nothing where it has."""
    kind = type(module).__name__
    if not all(parameter.numel() for parameter in module.parameters(recurse=False)):
        return f"a {kind} with a parameter without entries"
    if is_attention(module):
        return "an attention's own row of keys or values" if {"bias_k", "bias_v"} & set(own) else ""
    if _is_norm(module):
        return "" if set(own) <= {"weight", "gamma", "scale", *BIASES} else f"a {kind}"
    if form_of(module) is None:
        return f"a {kind}"
    if not set(own) <= {"weight", "bias"}:
        return f"a reparametrised {kind}"
    if isinstance(module, nn.Embedding) and module.scale_grad_by_freq:
        hint = "It scales the gradients of a batch by what else is in it. Try `scale_grad_by_freq = False`."
        raise ValueError(must_be("An Embedding for Kronecker factors", "without scale_grad_by_freq", "True", hint))
    return ""


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm by its name, a user's own RMSNorm included; its gradients are checked."""
    return has_channels(module) or (type(module).__name__.endswith("Norm") and not [*module.children()])


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

    def _projections(self, name: str, module: nn.MultiheadAttention, own: dict[str, str]) -> list[Layer]:
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
        self, name: str, module: nn.Module, key: Key, form: Rows, entries: dict[str, tuple[str, torch.Tensor]]
    ) -> KroneckerLayer:
        columns = []
        if "weight" in entries:
            columns.append(form.weights(entries["weight"][1]))
        if "bias" in entries:
            columns.append(form.biases(entries["bias"][1]))
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
