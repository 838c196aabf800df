"""Rules of operations that move, join or add up entries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch

from .recording import Call, Operation, aten
from .rules import Push, Tangent, UnservedError, lifted, linear_in_first, rule

__all__: list[str] = []

# A tangent (r, *shape) of the only tensor, and the call, to the result's tangent.
Move: TypeAlias = Callable[[torch.Tensor, Call], torch.Tensor]

rule(
    aten.index.Tensor,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
    aten.diagonal.default,
    aten.unfold.default,
    aten.gather.default,
    aten.index_select.default,
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
    aten.avg_pool2d_backward.default,
    aten._adaptive_avg_pool2d_backward.default,
)(linear_in_first)


def _moving(*operations: Operation) -> Callable[[Move], Move]:
    """Decorate what operations on one tensor do to its tangent."""

    def register(move: Move) -> Move:
        def moved(call: Call, live: list[bool]) -> Push | None:
            used, outline = [True, *[False] * (len(live) - 1)], _outline(call)
            return Push(lambda t, *_: move(t, outline), used, [True]) if live[0] else None

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


@_moving(aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims)
def _squeeze(t: torch.Tensor, call: Call) -> torch.Tensor:
    return t.reshape(len(t), *_result(call).shape)


@_moving(aten.select.int)
def _select(t: torch.Tensor, call: Call) -> torch.Tensor:
    (axis,), place = _axes(call.args[1:2], t.ndim - 1), call.args[2]
    assert isinstance(place, int)
    return t.select(axis, place)


@_moving(aten.slice.Tensor)
def _slice(t: torch.Tensor, call: Call) -> torch.Tensor:
    (axis,) = _axes(call.args[1:2] or (0,), t.ndim - 1)
    found: torch.Tensor = aten.slice.Tensor(t, axis, *call.args[2:])
    return found


@rule(aten.split.Tensor, aten.unsafe_split.Tensor, aten.split_with_sizes.default, aten.unbind.int)
def _split(call: Call, live: list[bool]) -> Push | None:
    operation, x, sizes, count = call.operation, call.args[0], call.args[1:], len(call.results)
    assert isinstance(x, torch.Tensor)
    # Of `unbind` the axis alone.
    place = 0 if operation is aten.unbind.int else 1
    (axis,), lead = _axes(sizes[place:] or (0,), x.ndim), sizes[:place]

    def along(t: torch.Tensor, *_: Tangent) -> tuple[Tangent, ...]:
        return tuple(operation(t, *lead, axis))

    return Push(along, [True, *[False] * (len(live) - 1)], [True] * count) if live[0] else None


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
    (axis,), shapes = _axes(call.args[1:2] or (0,), result.ndim), [x.shape for x in tensors]

    def along(*tangents: Tangent) -> torch.Tensor:
        one = next(t for t in tangents if t is not None)
        # Beside the tensors there is the axis.
        pairs = zip(tangents, shapes, strict=False)
        parts = [one.new_zeros(len(one), *shape) if t is None else t for t, shape in pairs]
        return torch.cat(parts, dim=axis)

    return Push(along, live, [True])


@rule(aten.stack.default)
def _stack(call: Call, live: list[bool]) -> Push | None:
    tensors, result = call.args[0], _result(call)
    assert isinstance(tensors, list | tuple)
    (axis,), count, shape = _axes(call.args[1:2] or (0,), result.ndim), len(tensors), tensors[0].shape

    def along(*tangents: Tangent) -> torch.Tensor:
        one = next(t for t in tangents if t is not None)
        parts = [one.new_zeros(len(one), *shape) if t is None else t for t in tangents[:count]]
        return torch.stack(parts, dim=axis)

    return Push(along, live, [True])


@rule(aten.embedding.default)
def _embedding(call: Call, live: list[bool]) -> Push | None:
    _, tokens, *rest = call.args
    assert isinstance(tokens, torch.Tensor)
    kept = _not_padding(tokens, rest[0] if rest else -1)

    def along(t: torch.Tensor, *_: Tangent) -> torch.Tensor:
        rows = t[:, tokens]
        return rows if kept is None else rows * kept

    return Push(along, live, [True], [tokens] if kept is None else [tokens, kept]) if live[0] else None


@rule(aten.embedding_dense_backward.default)
def _embedding_backward(call: Call, live: list[bool]) -> Push | None:
    """Add up by index: torch's batching rule forgets the token that is padding."""
    _, tokens, count, padding, by_frequency = call.args
    if by_frequency:
        raise UnservedError(call.operation.name())
    assert isinstance(tokens, torch.Tensor) and isinstance(count, int)
    places = tokens.reshape(-1)
    kept = _not_padding(places, padding)

    def along(t: torch.Tensor, *_: Tangent) -> torch.Tensor:
        rows = t.reshape(len(t), len(places), t.shape[-1])
        rows = rows if kept is None else rows * kept
        return t.new_zeros(len(t), count, t.shape[-1]).index_add_(1, places, rows)

    return Push(along, live, [True], [places] if kept is None else [places, kept]) if live[0] else None


def _not_padding(tokens: torch.Tensor, padding: object) -> torch.Tensor | None:
    """Return where tokens are none of the padding, to which no derivative comes; None where there is no padding."""
    return None if not isinstance(padding, int) or padding < 0 else (tokens != padding)[..., None]


def _outline(call: Call) -> Call:
    """Return a call without its tensors' numbers."""
    args = [None if isinstance(one, torch.Tensor) else one for one in call.args]
    return call._replace(args=tuple(args), results=tuple(_shape_alone(one) for one in call.results))


def _shape_alone(one: object) -> object:
    return torch.empty(one.shape, dtype=one.dtype, device="meta") if isinstance(one, torch.Tensor) else one


def _result(call: Call) -> torch.Tensor:
    result = call.results[0]
    assert isinstance(result, torch.Tensor)
    return result


def _axes(axes: object, ndim: int) -> list[int]:
    """Return axes of a tensor of ``ndim`` as those of its tangent."""
    assert isinstance(axes, Sequence)
    return [axis % ndim + 1 for axis in axes] if ndim else []
