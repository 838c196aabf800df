"""What a batch computes, operation by operation, as torch's dispatcher sees it: forward and backward passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch._ops import OpOverload as Operation
from torch.utils._python_dispatch import TorchDispatchMode  # The documented way to see them: "Extending PyTorch".

__all__ = ["OUT_OF_PLACE", "Call", "Operation", "Recording", "aten", "recorded", "spread"]

aten = torch.ops.aten
T = TypeVar("T")

# Those that write in place, as the operations that they are of the value before.
OUT_OF_PLACE: dict[Operation, Operation] = {
    aten.add_.Tensor: aten.add.Tensor,
    aten.sub_.Tensor: aten.sub.Tensor,
    aten.mul_.Tensor: aten.mul.Tensor,
    aten.div_.Tensor: aten.div.Tensor,
    aten.relu_.default: aten.relu.default,
    aten.leaky_relu_.default: aten.leaky_relu.default,
    aten.elu_.default: aten.elu.default,
    aten.hardtanh_.default: aten.hardtanh.default,
    aten.silu_.default: aten.silu.default,
    aten.tanh_.default: aten.tanh.default,
    aten.sigmoid_.default: aten.sigmoid.default,
}


class Call(NamedTuple):
    """One operation: its arguments, lists of tensors among them, and its results.

    ``before`` stands for the first argument where that was written over.
    """

    operation: Operation
    args: tuple[object, ...]
    kwargs: Mapping[str, object]
    results: tuple[object, ...]
    before: torch.Tensor | None = None


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
        before = args[0].clone() if func in OUT_OF_PLACE and isinstance(args[0], torch.Tensor) else None
        result = func(*args, **named)
        results = tuple(result) if isinstance(result, tuple | list) else (result,)
        self.calls.append(Call(func, args, named, results, before))
        return result


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
