"""What a model's own ``train`` and ``eval`` set beside the flags: a copy whose flags alone are set is another model.

A temperature, a switch, a child that is kept in train mode. They are not called on the copy that shares the user's
tensors, for they may write to these (as those do that merge an adapter into its weights).
"""

from __future__ import annotations

import copy
import math
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from itertools import repeat
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from .._check import must_be
from .._telling import warn
from .._types import Batch
from .batches import first_rows, map_tensors
from .compiled import unwrapped
from .holders import is_plain_object, state_of

if TYPE_CHECKING:
    from .torch import TorchTwiceDifferentiable

__all__ = ["OwnEval"]

_MUST = "in eval mode, or one whose own `train` and `eval` set flags alone"
_HINT = (
    "Call `model.eval()` before `fit`. A module that it leaves in train mode is taken in eval mode all the same: set "
    "its `training` to False if that is meant."
)
_ATOMS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


class OwnEval:
    """A deep copy that the user's own ``eval()`` was called on, to be held against the copy on its first batch.

    Parameters
    ----------
    module : Module
        The user's.
    evaluated : Module
        Its deep copy.
    names : list of str
        What differs between them.
    """

    def __init__(self, module: nn.Module, evaluated: nn.Module, names: list[str]) -> None:
        self.evaluated, self.names = evaluated, names
        first = next(module.parameters())
        self.dtype, self.device = first.dtype, first.device

    @classmethod
    def of(cls, model: nn.Module) -> OwnEval | None:
        """Return None where nothing but flags is set, as by what keeps BatchNorm frozen; or nothing can be known."""
        module = unwrapped(model)
        children = list(module.modules())
        if not any(child.training for child in children) or not any(map(_has_its_own, children)):
            return None
        # A function on the object itself is bound to the user's own, in a deep copy too.
        if any(name in vars(child) for child in children for name in ("train", "eval")):
            return None
        try:
            evaluated = copy.deepcopy(module).eval()
        except Exception as error:
            warn(must_be("The model", _MUST, f"one that cannot be copied to see: {error}", _HINT), UserWarning)
            return None
        names = list(_differences(module, evaluated))
        return cls(module, evaluated, names) if names else None

    def check(self, model: TorchTwiceDifferentiable, batch: Batch, look_out: AbstractContextManager[Any]) -> None:
        """Raise where its outputs on a few rows are others than those of the model's copy.

        Of an adapter that was merged they are the same.
        """
        few, received, expected = first_rows(batch), list[torch.Tensor](), list[torch.Tensor]()
        listed = ", ".join(self.names[:5]) + (f" and {len(self.names) - 5} more" if len(self.names) > 5 else "")
        try:
            map_tensors(received.append, model.outputs(model.module, map_tensors(torch.clone, few)))
            # A closure leads to the user's own model, in a deep copy too.
            with look_out:
                map_tensors(expected.append, model.outputs(self.evaluated, map_tensors(self._own(model), few)))
        except Exception as error:
            warn(
                must_be("The model", _MUST, f"one whose {listed} they change; it cannot be compared: {error}", _HINT),
                UserWarning,
            )
            return
        eps = max(torch.finfo(self.dtype).eps, model.eps)
        same = len(received) == len(expected) and all(map(_close, received, expected, repeat(eps)))
        if not same:
            raise ValueError(must_be("The model", _MUST, f"outputs that are others by {listed}", _HINT))

    def _own(self, model: TorchTwiceDifferentiable) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return what takes a tensor of a batch to the dtype and the device of the user's model."""

        def convert(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.clone().to(self.device, self.dtype if tensor.dtype == model.dtype else None)

        return convert


def _close(one: torch.Tensor, other: torch.Tensor, eps: float) -> bool:
    if one.shape != other.shape:
        return False
    one, other = one.detach().cpu().double(), other.detach().cpu().double()
    # Not (a <= b): NaN compares false, and is told elsewhere.
    return not float((one - other).norm()) > math.sqrt(eps) * float(other.norm())


def _has_its_own(module: nn.Module) -> bool:
    """Return whether a class overrides ``train`` or ``eval``, torch's own aside."""
    owners = (next(c for c in type(module).__mro__ if name in vars(c)) for name in ("train", "eval"))
    return any(owner.__module__.partition(".")[0] != "torch" for owner in owners)


def _differences(module: nn.Module, evaluated: nn.Module) -> Iterator[str]:
    """Yield the names of what a module and its deep copy, after ``eval()``, do not have the same."""
    before, after = (dict(root.named_modules(remove_duplicate=False)) for root in (module, evaluated))
    yield from sorted(before.keys() ^ after.keys())
    for path in before.keys() & after.keys():
        prefix = f"{path}." if path else ""
        if type(before[path]) is not type(after[path]):
            yield path
        if after[path].training:
            yield f"{prefix}training"
        one, other = _attributes(before[path]), _attributes(after[path])
        for key in sorted(one.keys() | other.keys()):
            if key not in one or key not in other or not _same(one[key], other[key]):
                yield f"{prefix}{key}"


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return what a module holds itself, its tensors by their own names; not its modules, nor its flag."""
    held = {name: value for name, value in vars(module).items() if name not in ("_modules", "training")}
    return {**held.pop("_parameters"), **held.pop("_buffers"), **held}


def _same(one: Any, other: Any, depth: int = 0) -> bool:
    """Return whether two attributes are the same, as far as their kinds are known."""
    if one is other or depth > 20:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, _ATOMS):
        return bool(one == other) or one != one
    if isinstance(one, torch.Tensor):
        return one.device.type == "meta" or _equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, Mapping):
        return len(one) == len(other) and _same(list(one.values()), list(other.values()), depth + 1)
    if isinstance(one, list | tuple | deque):
        return len(one) == len(other) and all(_same(a, b, depth + 1) for a, b in zip(one, other, strict=True))
    if isinstance(one, types.MethodType):
        return one.__func__ is other.__func__
    if isinstance(one, types.FunctionType | types.BuiltinFunctionType):
        # A deep copy keeps them.
        return False
    if isinstance(one, nn.Module) or not is_plain_object(one):
        return True
    return _same(state_of(one), state_of(other), depth + 1)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype or one.layout != other.layout:
        return False
    if one.layout != torch.strided:
        return True
    return torch.equal(one.detach(), other.detach()) or bool(torch.isnan(one).any())
