"""What a batch computes, operation by operation, as torch's dispatcher sees it: forward and backward passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch._ops import OpOverload as Operation
from torch.utils._python_dispatch import TorchDispatchMode  # The documented way to see them: "Extending PyTorch".

__all__ = ["Call", "Operation", "Recording", "aten", "recorded", "spread"]

aten = torch.ops.aten
T = TypeVar("T")

# Those that write in place, as the operations that they are of the value before.
OUT_OF_PLACE: dict[Operation, Operation] = {
    aten.add_.Tensor: aten.add.Tensor,
    aten.add_.Scalar: aten.add.Scalar,
    aten.sub_.Tensor: aten.sub.Tensor,
    aten.mul_.Tensor: aten.mul.Tensor,
    aten.mul_.Scalar: aten.mul.Scalar,
    aten.div_.Tensor: aten.div.Tensor,
    aten.div_.Scalar: aten.div.Scalar,
    aten.relu_.default: aten.relu.default,
    aten.leaky_relu_.default: aten.leaky_relu.default,
    aten.elu_.default: aten.elu.default,
    aten.hardtanh_.default: aten.hardtanh.default,
    aten.hardswish_.default: aten.hardswish.default,
    aten.silu_.default: aten.silu.default,
    aten.mish_.default: aten.mish.default,
    aten.tanh_.default: aten.tanh.default,
    aten.sigmoid_.default: aten.sigmoid.default,
    aten.rsqrt_.default: aten.rsqrt.default,
    aten.reciprocal_.default: aten.reciprocal.default,
    aten.masked_fill_.Scalar: aten.masked_fill.Scalar,
    aten.fill_.Scalar: aten.full_like.default,
    aten.zero_.default: aten.zeros_like.default,
}

# Those that give the tensor itself another shape, as the operations that make a view of it.
RESHAPED: dict[Operation, Operation] = {
    aten.unsqueeze_.default: aten.unsqueeze.default,
    aten.squeeze_.dim: aten.squeeze.dim,
    aten.squeeze_.dims: aten.squeeze.dims,
    aten.transpose_.default: aten.transpose.int,
    aten.t_.default: aten.t.default,
}


class Call(NamedTuple):
    """One operation: its arguments, lists of tensors among them, and its results, of the shapes that they had then.

    They are without the graph, which they would hold; ``given`` and ``made`` are the tensors themselves. What writes
    in place stands as the operation out of place, of the value before.
    """

    operation: Operation
    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    results: tuple[object, ...]
    given: tuple[object, ...] = ()
    made: tuple[object, ...] = ()


class Recording(TorchDispatchMode):
    """Takes down every operation while it is entered; all its tensors are held, so that each is known by its ``id``."""

    def __init__(self) -> None:
        # Torch's own has no types.
        prepare: Callable[[], None] = super().__init__
        prepare()
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self,
        func: Operation,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Run an operation, and take it down."""
        named = kwargs or {}
        before = tuple(_plain(one) for one in args)
        if func in OUT_OF_PLACE and isinstance(before[0], torch.Tensor):
            before = (before[0].clone(), *before[1:])
        result = func(*args, **named)
        made = tuple(result) if isinstance(result, tuple | list) else (result,)
        operation = OUT_OF_PLACE.get(func, RESHAPED.get(func, func))
        self.calls.append(Call(operation, before, named, tuple(_plain(one) for one in made), args, made))
        return result


def _plain(one: object) -> object:
    """Return a tensor, or those in a list, with today's shape and without a graph."""
    if isinstance(one, list | tuple):
        return [_plain(each) for each in one]
    return one.detach() if isinstance(one, torch.Tensor) else one


def recorded(compute: Callable[[], T]) -> tuple[Recording, T]:
    """Return what was recorded of a computation, and its result; nothing is recorded where it does not bear that."""
    record = Recording()
    try:
        with record:
            return record, compute()
    except torch.OutOfMemoryError:
        raise
    except Exception:  # noqa: BLE001 (user code under a mode may raise anything; what is its own, it raises again)
        return Recording(), compute()


def spread(args: Sequence[object]) -> list[object]:
    """Return arguments with the lists and tuples among them spread out."""
    flat: list[object] = []
    for one in args:
        flat += one if isinstance(one, list | tuple) else [one]
    return flat
