"""Layers with Kronecker factors: their parameters as one matrix, their inputs and signals as rows, and who has none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .._validation import must_be
from ..models import Affine, TorchTwiceDifferentiable

__all__ = ["KroneckerLayer", "kronecker_layers", "refuse"]

KINDS = (nn.Linear, Affine, nn.Conv1d, nn.Conv2d, nn.Embedding)
# scikit-learn's words for the parameters of a linear layer.
ROLES = {"coef": "weight", "intercept": "bias"}


@dataclass(frozen=True)
class KroneckerLayer:
    """A layer z_t = W a_t + b of T rows a sample, [W, b] as one matrix (d, i).

    Attributes
    ----------
    name : str
        The module's.
    module : Linear, Conv1d, Conv2d or Embedding
        The layer.
    index : tensor of shape (d, i)
        Where [W, b], or the selected one of them, lies in a flat row.
    parameters : list of tensor
        The selected parameters, and ``places``, where each lies in a flat row.
    """

    name: str
    module: nn.Module
    index: torch.Tensor
    has_weight: bool
    has_bias: bool
    parameters: list[torch.Tensor] = field(repr=False)
    places: list[slice]

    @property
    def is_one_hot(self) -> bool:
        """Whether the inputs are one-hot rows, with a diagonal second moment."""
        return isinstance(self.module, nn.Embedding)

    def inputs(self, a: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the layer's inputs as rows (m, T, i), the bias's coordinate included."""
        rows = _input_rows(self.module, a.detach(), dtype)
        ones = rows.new_ones(*rows.shape[:2], 1)
        return torch.cat(([rows] if self.has_weight else []) + ([ones] if self.has_bias else []), dim=2)

    def signals(self, g: torch.Tensor) -> torch.Tensor:
        """Return derivatives at the layer's results as rows (m, T, d)."""
        if isinstance(self.module, nn.Conv1d | nn.Conv2d):
            return g.flatten(2).mT
        return g.reshape(len(g), -1, g.shape[-1])


def kronecker_layers(model: TorchTwiceDifferentiable) -> tuple[list[KroneckerLayer], dict[str, str]]:
    """Return the layers that hold selected parameters, and why each other selected parameter is in none of them."""
    owners = {id(tensor): name for name, tensor in zip(model.layout.names, model.theta, strict=True)}
    holders: dict[str, list[str]] = {name: [] for name in model.layout.names}
    held: list[tuple[str, nn.Module, dict[str, str]]] = []
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
    layers: list[KroneckerLayer] = []
    reasons: dict[str, str] = {}
    for name, module, own in held:
        tied = [owner for owner in own.values() if len(holders[owner]) > 1]
        reason = f"tied weights: in {' and '.join(holders[tied[0]])}" if tied else _reason(module, own)
        if reason:
            reasons.update(dict.fromkeys(own.values(), reason))
        else:
            layers.append(_layer(model, name, module, own))
    return layers, reasons


def refuse(reasons: dict[str, str]) -> None:
    """Raise, naming the parameters that no Kronecker layer holds, and why."""
    must = "in Linear, Conv1d, Conv2d (groups=1) or Embedding layers, each called once on a batch of samples"
    listed = "; ".join(f"{name} ({reason})" for name, reason in reasons.items())
    hint = 'Try unsupported="diagonal", or leave them out with `params`.'
    raise ValueError(must_be("Every parameter for Kronecker factors", must, listed, hint))


def _reason(module: nn.Module, own: dict[str, str]) -> str:
    """Return why a module has no Kronecker factors, or nothing where it has."""
    kind = type(module).__name__
    if type(module) not in KINDS:
        return f"a {kind}"
    if not set(own) <= {"weight", "bias"}:
        return f"a reparametrised {kind}"
    if getattr(module, "groups", 1) != 1:
        return f"a {kind} with groups={module.groups}"
    if getattr(module, "scale_grad_by_freq", False) or getattr(module, "sparse", False):
        return f"an {kind} with scale_grad_by_freq or sparse"
    return ""


def _layer(model: TorchTwiceDifferentiable, name: str, module: nn.Module, own: dict[str, str]) -> KroneckerLayer:
    slices, tensors = model.layout.slices, dict(zip(model.layout.names, model.theta, strict=True))
    columns = []
    for role in ("weight", "bias"):
        if role in own:
            place = slices[own[role]]
            numbers = torch.arange(place.start, place.stop, device=model.device)
            matrix = numbers.reshape(len(tensors[own[role]]), -1)
            # An Embedding keeps its weights (i, d).
            columns.append(matrix.mT if isinstance(module, nn.Embedding) else matrix)
    names = list(own.values())
    return KroneckerLayer(
        name,
        module,
        torch.cat(columns, dim=1),
        "weight" in own,
        "bias" in own,
        [tensors[n] for n in names],
        [slices[n] for n in names],
    )


def _input_rows(module: Any, a: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if isinstance(module, nn.Embedding):
        rows = F.one_hot(a.reshape(len(a), -1), module.num_embeddings).to(dtype)
        if module.padding_idx is not None:
            # torch gives its row no gradient.
            rows[:, :, module.padding_idx] = 0
        return rows
    if isinstance(module, nn.Linear | Affine):
        return a.reshape(len(a), -1, a.shape[-1])
    return _patches(module, a)


def _patches(module: Any, a: torch.Tensor) -> torch.Tensor:
    """Return the patches (m, T, channels · kernel) that a convolution's T results see."""
    sides = _padding(module)
    if any(sides):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        a = F.pad(a, sides, mode)
    kernel, dilation, stride = module.kernel_size, module.dilation, module.stride
    if len(kernel) == 1:
        # A picture of one line.
        a, kernel, dilation, stride = a.unsqueeze(2), (1, *kernel), (1, *dilation), (1, *stride)
    return F.unfold(a, kernel, dilation, 0, stride).mT


def _padding(module: Any) -> list[int]:
    """Return the padding in the order of ``torch.nn.functional.pad``: both sides of the last dimension first."""
    if module.padding == "valid":
        return [0] * (2 * len(module.kernel_size))
    sides: list[int] = []
    for i in reversed(range(len(module.kernel_size))):
        if module.padding == "same":
            total = module.dilation[i] * (module.kernel_size[i] - 1)
            sides += [total // 2, total - total // 2]
        else:
            sides += [module.padding[i], module.padding[i]]
    return sides


def check_rows(layer: KroneckerLayer, calls: Sequence[Any], m: int) -> str:
    """Return why the calls of a layer on m samples cannot be read as rows of samples, or nothing."""
    if len(calls) != 1:
        return "never called as a layer" if not calls else f"called {len(calls)} times"
    call = calls[0]
    convolutions: dict[type, int] = {nn.Conv1d: 3, nn.Conv2d: 4}
    dims = convolutions.get(type(layer.module))
    if call.edge is None:
        return "without a gradient"
    if call.input.ndim < 1 or len(call.input) != m or (dims is not None and call.input.ndim != dims):
        return f"sees an input {tuple(call.input.shape)} of {m} samples: they must come first"
    return "" if layer.is_one_hot or call.input.ndim > 1 else "sees an input without a batch"
