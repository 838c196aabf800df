"""A second device on a machine that has none: its tensors compute with their own kind alone, until they are moved.

Under ``TwoDevices`` what a program makes on the ``meta`` device, or moves to it, keeps its numbers on the CPU, as
tensors of another class. An operation of both kinds is the error that torch raises for a CPU and a GPU.
"""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["ELSEWHERE", "TwoDevices"]

ELSEWHERE = torch.device("meta")
# What `copy_` does, and asking where a tensor lies, is allowed between both.
ACROSS = {"copy_"}
HEAVY = {"matmul", "mm", "bmm", "addmm", "linalg_eigh", "eigh"}


class Parked(torch.Tensor):
    """A tensor of the other device."""


class TwoDevices(TorchFunctionMode):
    """Counts, by name, the moves from one device to the other, and what heavy work was done on the other one."""

    def __init__(self):
        super().__init__()
        self.moved, self.heavy = {"there": 0, "back": 0}, []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        parked = [isinstance(leaf, Parked) for leaf in tree_leaves((args, kwargs)) if _counts(leaf)]
        if func == torch.Tensor.device.__get__:
            return ELSEWHERE if isinstance(args[0], Parked) else _call(func, args, kwargs)
        if func == torch.Tensor.to and (target := _device_of(args[1:], kwargs)) is not None:
            there = torch.device(target) == ELSEWHERE
            if there != isinstance(args[0], Parked):
                return self._moved(args[0], there)
            if there:
                return args[0]
        if kwargs.get("device") is not None and torch.device(kwargs["device"]) == ELSEWHERE:
            return _call(func, args, {**kwargs, "device": "cpu"}).as_subclass(Parked)
        if not any(parked) and not any(isinstance(leaf, Parked) for leaf in tree_leaves((args, kwargs))):
            return _call(func, args, kwargs)
        if len(set(parked)) > 1 and name not in ACROSS:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")
        if name.strip("_") in HEAVY:
            self.heavy.append(name)
        made = _call(func, args, kwargs)
        home = isinstance(args[0], Parked) if args and isinstance(args[0], torch.Tensor) else True
        return tree_map_only(torch.Tensor, lambda one: one.as_subclass(Parked) if home else one, made)

    def _moved(self, tensor, there):
        self.moved["there" if there else "back"] += 1
        # With the strides that it has, as between real devices.
        made = _call(torch.empty_like, (tensor,), {}).as_subclass(torch.Tensor)
        _call(torch.Tensor.copy_, (made, tensor), {})
        return made.as_subclass(Parked) if there else made


def _call(func, args, kwargs):
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _counts(leaf):
    """Whether a leaf is a tensor that has a place: torch takes numbers from any device."""
    return isinstance(leaf, torch.Tensor) and leaf.as_subclass(torch.Tensor).ndim > 0


def _device_of(args, kwargs):
    found = kwargs.get("device", args[0] if args else None)
    return found if isinstance(found, torch.device | str) else None
