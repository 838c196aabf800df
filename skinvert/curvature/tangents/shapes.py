"""Rules of operations that move, join or add up entries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch

from .recording import Call, Operation, aten
from .rules import Push, Tangent, lifted, linear_in_first, rule

__all__: list[str] = []

# A tangent (r, *shape) of the only tensor, and the call, to the result's tangent.
Move: TypeAlias = Callable[[torch.Tensor, Call], torch.Tensor]

rule(
    aten.select.int,
    aten.slice.Tensor,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unbind.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.diagonal.default,
    aten.unfold.default,
    aten.gather.default,
    aten.index_select.default,
    aten.embedding.default,
    aten.flip.default,
    aten.roll.default,
    aten.cumsum.default,
    aten.constant_pad_nd.default,
    aten.reflection_pad2d.default,
    aten.replication_pad2d.default,
    aten.avg_pool2d.default,
    aten._adaptive_avg_pool2d.default,
    aten.mean.dim,
    aten.mean.default,
    aten.repeat.default,
    aten.select_backward.default,
    aten.slice_backward.default,
    aten.nll_loss_forward.default,
    aten.nll_loss2d_forward.default,
    aten.nll_loss_backward.default,
    aten.nll_loss2d_backward.default,
    aten.embedding_dense_backward.default,
    aten.avg_pool2d_backward.default,
    aten._adaptive_avg_pool2d_backward.default,
)(linear_in_first)


def _moving(*operations: Operation) -> Callable[[Move], Move]:
    """Decorate what operations on one tensor do to its tangent."""

    def register(move: Move) -> Move:
        def moved(call: Call, live: list[bool]) -> Push | None:
            used = [True, *[False] * (len(live) - 1)]
            return Push(lambda t, *_: move(t, call), used, [True]) if live[0] else None

        rule(*operations)(moved)
        return move

    return register


@_moving(aten.detach.default, aten.alias.default, aten.clone.default, aten.lift_fresh.default)
def _same(t: torch.Tensor, _: Call) -> torch.Tensor:
    return t


@_moving(aten._to_copy.default)
def _cast(t: torch.Tensor, call: Call) -> torch.Tensor:
    return t.to(_result(call).dtype)


@_moving(aten.t.default)
def _turn(t: torch.Tensor, _: Call) -> torch.Tensor:
    return t.mT if t.ndim == 3 else t


@_moving(aten.transpose.int)
def _transpose(t: torch.Tensor, call: Call) -> torch.Tensor:
    first, second = _axes(call.args[1:], t.ndim - 1)
    return t.transpose(first, second)


@_moving(aten.permute.default)
def _permute(t: torch.Tensor, call: Call) -> torch.Tensor:
    return t.permute(0, *_axes(call.args[1], t.ndim - 1))


@_moving(aten.view.default, aten._unsafe_view.default, aten.unsqueeze.default)
def _reshape(t: torch.Tensor, call: Call) -> torch.Tensor:
    return t.reshape(len(t), *_result(call).shape)


@_moving(aten.expand.default)
def _expand(t: torch.Tensor, call: Call) -> torch.Tensor:
    shape = _result(call).shape
    return lifted(t, len(shape)).expand(len(t), *shape)


@_moving(aten.sum.default)
def _sum(t: torch.Tensor, _: Call) -> torch.Tensor:
    return t.reshape(len(t), -1).sum(1)


@_moving(aten.sum.dim_IntList)
def _sum_over(t: torch.Tensor, call: Call) -> torch.Tensor:
    axes = call.args[1] or range(t.ndim - 1)
    return t.sum(_axes(axes, t.ndim - 1), keepdim=bool(call.args[2:3] == (True,)))


@rule(aten.cat.default)
def _cat(call: Call, live: list[bool]) -> Push | None:
    tensors, result = call.args[0], _result(call)
    assert isinstance(tensors, list | tuple)
    (axis,) = _axes(call.args[1:2] or (0,), result.ndim)

    def along(*tangents: Tangent) -> torch.Tensor:
        r = next(len(t) for t in tangents if t is not None)
        # Beside the tensors there is the axis.
        pairs = zip(tangents, tensors, strict=False)
        parts = [x.new_zeros(r, *x.shape) if t is None else t for t, x in pairs]
        return torch.cat(parts, dim=axis)

    return Push(along, live, [True])


def _result(call: Call) -> torch.Tensor:
    result = call.results[0]
    assert isinstance(result, torch.Tensor)
    return result


def _axes(axes: object, ndim: int) -> list[int]:
    """Return axes of a tensor of ``ndim`` as those of its tangent."""
    assert isinstance(axes, Sequence)
    return [axis % ndim + 1 for axis in axes] if ndim else []
