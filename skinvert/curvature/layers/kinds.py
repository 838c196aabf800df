"""Layers with factors: their parameters as one matrix, and what they see and pass on as rows of the samples."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import torch
from torch import nn
from torch.autograd.graph import GradientEdge

from .attention import Key
from .forms import Rows, Table

__all__ = [
    "BIASES",
    "Call",
    "ElementwiseLayer",
    "Inputs",
    "KroneckerLayer",
    "Layer",
    "gram",
    "has_channels",
    "symmetric_gram",
]

BIASES = ("bias", "beta", "shift")
# Their weights lie along the channels, the second axis; those of other norms along the last ones.
CHANNEL_NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    nn.GroupNorm,
    nn.InstanceNorm1d,
    nn.InstanceNorm2d,
    nn.InstanceNorm3d,
)

# Up to this width a symmetric product is made whole: its blocks would be too small for the rate of a GEMM.
WHOLE = 192

# What a layer sees over all its calls: a Kronecker layer's rows in one tensor, an elementwise one's of each call.
Inputs: TypeAlias = list[torch.Tensor]


class Call(NamedTuple):
    """One call of a layer: its input a, and where to differentiate at its result z, None where z is a constant."""

    input: torch.Tensor
    shape: torch.Size
    # Not z itself: an activation in place would turn it into its own result.
    edge: GradientEdge | None


@dataclass(frozen=True)
class Layer(ABC):
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
    key: Key
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

    @abstractmethod
    def inputs(self, calls: Sequence[Call], m: int, dtype: torch.dtype) -> Inputs:
        """Return what the layer sees of m samples, over all its calls, in the form that ``product`` takes."""

    @abstractmethod
    def signals(self, parts: Sequence[torch.Tensor], inputs: Inputs, m: int) -> torch.Tensor:
        """Return the derivatives at the results of all calls as rows of the samples."""

    @abstractmethod
    def product(self, inputs: Inputs, signals: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Return the derivative by the parameters, summed over the samples, and the scale of its rounding errors."""

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

    def inputs(self, calls: Sequence[Call], m: int, dtype: torch.dtype) -> Inputs:
        """Return the inputs as rows (m, [q,] T, i), the bias's coordinate included, in one tensor."""
        seen = [self.form.inputs(self._first(call.input), call.shape, dtype) for call in calls]
        rows = _joined(seen, m)
        ones = rows.new_ones(*rows.shape[:-1], 1)
        return [torch.cat(([rows] if self.has_weight else []) + ([ones] if self.has_bias else []), dim=-1)]

    def signals(self, parts: Sequence[torch.Tensor], inputs: Inputs, m: int) -> torch.Tensor:
        """Return the derivatives as rows (m, [q,] T, d)."""
        return _joined([self.form.signals(self._first(g)) for g in parts], m)

    def product(self, inputs: Inputs, signals: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Return Σ g aᵀ over samples and rows."""
        (rows,) = inputs
        return gram(signals, rows), float(signals.norm() * rows.norm())


@dataclass(frozen=True)
class ElementwiseLayer(Layer):
    """The scale γ and shift β of a norm, z = γ x̂ + β: few parameters, with the exact diagonal Σᵢ (Σ_t g x̂, Σ_t g)²."""

    roles: list[str]

    def inputs(self, calls: Sequence[Call], m: int, dtype: torch.dtype) -> Inputs:
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

    def signals(self, parts: Sequence[torch.Tensor], inputs: Inputs, m: int) -> torch.Tensor:
        """Return each sample's gradient (m, number of parameters)."""
        rows = []
        for role, parameter in zip(self.roles, self.parameters, strict=True):
            total = torch.zeros((), dtype=parameter.dtype, device=parameter.device)
            for g, unit in zip(parts, inputs, strict=True):
                value = self._first(g) if role in BIASES else self._first(g) * unit
                total = total + self._of_parameter(value, parameter).reshape(m, -1, parameter.numel()).sum(1)
            rows.append(total)
        return torch.cat(rows, dim=1)

    def product(self, inputs: Inputs, signals: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Return the sum of the gradients."""
        size = math.sqrt(sum(float(unit.square().sum()) for unit in inputs) + sum(unit.numel() for unit in inputs))
        return signals.sum(0), float(signals.norm()) * size

    def _of_parameter(self, value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        """Return the entries of z as rows (m, T, number of the parameter's)."""
        if has_channels(self.module):
            return value.flatten(2).sum(2) if value.ndim > 2 else value
        return value.reshape(len(value), -1, parameter.numel())


def has_channels(module: nn.Module) -> bool:
    """Whether a norm's weights lie along the channels, as those of a ``LayerNorm2d`` do."""
    return isinstance(module, CHANNEL_NORMS) or type(module).__name__.endswith(("Norm1d", "Norm2d", "Norm3d"))


def gram(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return Σ x yᵀ over samples and rows, of rows (m, [q,] T, d) and (m, [q,] T, i)."""
    if x.ndim == 3:
        return x.flatten(0, 1).mT @ y.flatten(0, 1)
    return x.movedim(0, 1).flatten(1, 2).mT @ y.movedim(0, 1).flatten(1, 2)


def symmetric_gram(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return ``gram(x, y)`` of two that make it symmetric, such as rows and the same rows weighted: 3/4 of the work."""
    return _mirrored(x.flatten(0, 1), y.flatten(0, 1)) if x.ndim == 3 else gram(x, y)


def _mirrored(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return xᵀy by the blocks on and above the diagonal."""
    d, half = x.shape[1], x.shape[1] // 2
    if d <= WHOLE:
        return x.mT @ y
    product = x.new_empty(d, d)
    product[:half, :half] = _mirrored(x[:, :half], y[:, :half])
    product[half:, half:] = _mirrored(x[:, half:], y[:, half:])
    product[:half, half:] = x[:, :half].mT @ y[:, half:]
    product[half:, :half] = product[:half, half:].mT
    return product


def _joined(parts: Sequence[torch.Tensor], m: int) -> torch.Tensor:
    """Return the rows of all calls, (m, [q,] T, d), of parts (m r, [q,] t, d) with r rows a sample folded in."""
    rows = [part if len(part) == m else _unfolded(part, m) for part in parts]
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=-2)


def _unfolded(rows: torch.Tensor, m: int) -> torch.Tensor:
    return rows.reshape(m, len(rows) // m, *rows.shape[1:]).movedim(1, -3).flatten(-3, -2)
