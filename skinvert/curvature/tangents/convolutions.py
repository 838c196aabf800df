"""Rules of convolutions: all rows' tangents as more samples, or more channels, of one convolution."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .recording import Call, aten
from .rules import Push, Tangent, rule

__all__: list[str] = []


@rule(aten.convolution.default)
def _convolution(call: Call, live: list[bool]) -> Push:
    x, weight, out = call.args[0], call.args[1], call.results[0]
    setting = _Setting.of(call.args[3:9])
    assert isinstance(x, torch.Tensor) and isinstance(weight, torch.Tensor) and isinstance(out, torch.Tensor)
    shape = out.shape

    def along(s: Tangent, t: Tangent, u: Tangent, *_: Tangent) -> Tangent:
        total: Tangent = None
        if s is not None:
            total = aten.convolution(s.flatten(0, 1), weight, None, *setting).reshape(len(s), *shape)
        if t is not None:
            found = aten.convolution(x, setting.stacked(t, setting.out_axis), None, *setting)
            more = _apart(found, 1, setting.groups, len(t))
            total = more if total is None else total.add_(more)
        if u is not None:
            u = u.reshape(len(u), 1, -1, *[1] * (len(shape) - 2))
            total = u.expand(len(u), *shape) if total is None else total + u
        return total

    return Push(along, live, [True], [x, weight])


@rule(aten.convolution_backward.default)
def _convolution_backward(call: Call, live: list[bool]) -> Push:
    g, x, weight, _, *rest, mask = call.args
    assert isinstance(g, torch.Tensor) and isinstance(x, torch.Tensor) and isinstance(weight, torch.Tensor)
    assert isinstance(mask, list | tuple)
    backward = _Backward(g, x, weight, _Setting.of(tuple(rest)))

    def along(s: Tangent, t: Tangent, v: Tangent, *_: Tangent) -> tuple[Tangent, Tangent, Tangent]:
        return (
            backward.by_input(s, v) if mask[0] else None,
            backward.by_kernel(s, t) if mask[1] else None,
            s.transpose(1, 2).flatten(3).sum((2, 3)) if mask[2] and s is not None else None,
        )

    return Push(along, live, [bool(one) for one in mask], [g, x, weight])


class _Setting(NamedTuple):
    """What a convolution is given beside tensors, in the order of its arguments."""

    stride: object
    padding: object
    dilation: object
    transposed: bool
    output_padding: object
    groups: int

    @classmethod
    def of(cls, args: tuple[object, ...]) -> _Setting:
        """Return the setting of a call."""
        stride, padding, dilation, transposed, output_padding, groups = args
        assert isinstance(transposed, bool) and isinstance(groups, int)
        return cls(stride, padding, dilation, transposed, output_padding, groups)

    @property
    def out_axis(self) -> int:
        """The kernel's axis of the channels that come out."""
        return int(self.transposed)

    @property
    def in_axis(self) -> int:
        """The kernel's axis of the channels that go in."""
        return 1 - self.out_axis

    def stacked(self, kernels: torch.Tensor, axis: int) -> torch.Tensor:
        """Return the rows' kernels as one of more channels."""
        return _stacked(kernels, axis, self._groups(axis))

    def apart(self, kernel: torch.Tensor, axis: int, r: int) -> torch.Tensor:
        """Return the rows' kernels that one of more channels consists of."""
        return _apart(kernel, axis, self._groups(axis), r)

    def _groups(self, axis: int) -> int:
        # Its second axis has the channels of one group.
        return 1 if axis else self.groups


class _Backward(NamedTuple):
    """The derivatives of a convolution by its input and its kernel, each linear in two arguments."""

    g: torch.Tensor
    x: torch.Tensor
    weight: torch.Tensor
    setting: _Setting

    def by_input(self, s: Tangent, t: Tangent) -> Tangent:
        """Return the tangent of the derivative by the input, of those of g and of the kernel."""
        total: Tangent = None
        if s is not None:
            many = s.flatten(0, 1)
            total = self._input(many, len(many), self.x.shape[1], self.weight).reshape(len(s), *self.x.shape)
        if t is not None:
            kernels = self.setting.stacked(t, self.setting.in_axis)
            found = self._input(self.g, len(self.x), len(t) * self.x.shape[1], kernels)
            more = _apart(found, 1, self.setting.groups, len(t))
            total = more if total is None else total.add_(more)
        return total

    def by_kernel(self, s: Tangent, t: Tangent) -> Tangent:
        """Return the tangent of the derivative by the kernel, of those of g and of the input."""
        total: Tangent = None
        if s is not None:
            axis, channels = self.setting.out_axis, _stacked(s, 1, self.setting.groups)
            total = self.setting.apart(self._kernel(channels, self.x, axis, len(s)), axis, len(s))
        if t is not None:
            axis, channels = self.setting.in_axis, _stacked(t, 1, self.setting.groups)
            more = self.setting.apart(self._kernel(self.g, channels, axis, len(t)), axis, len(t))
            total = more if total is None else total + more
        return total

    def _input(self, g: torch.Tensor, m: int, channels: int, kernel: torch.Tensor) -> torch.Tensor:
        stand_in = self.x.new_empty(1).expand(m, channels, *self.x.shape[2:])
        found: torch.Tensor = aten.convolution_backward(g, stand_in, kernel, None, *self.setting, [True, False, False])[
            0
        ]
        return found

    def _kernel(self, g: torch.Tensor, x: torch.Tensor, axis: int, r: int) -> torch.Tensor:
        shape = list(self.weight.shape)
        shape[axis] *= r
        stand_in = self.weight.new_empty(1).expand(shape)
        found: torch.Tensor = aten.convolution_backward(g, x, stand_in, None, *self.setting, [False, True, False])[1]
        return found


def _stacked(rows: torch.Tensor, axis: int, groups: int) -> torch.Tensor:
    """Return rows (r, ..., C, ...) with C at ``axis`` of each as one (..., r C, ...), group by group."""
    apart = rows.unflatten(axis + 1, (groups, -1))
    return apart.movedim(0, axis + 1).flatten(axis, axis + 2)


def _apart(whole: torch.Tensor, axis: int, groups: int, r: int) -> torch.Tensor:
    """Return the rows that `_stacked` has put together."""
    return whole.unflatten(axis, (groups, r, -1)).movedim(axis + 1, 0).flatten(axis + 1, axis + 2)
