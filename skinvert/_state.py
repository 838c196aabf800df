"""State that any machine can load: tensors as arrays, dtypes and devices by name, without torch's own pickles."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch

from ._check import must_be
from ._types import Array, State

__all__ = ["DTYPES", "Packed", "TensorState", "held_bytes", "pack", "unpack", "within"]


@dataclass(frozen=True)
class Packed:
    """A torch value in numpy and plain Python.

    Parameters
    ----------
    kind : {"tensor", "dtype", "device", "numpy dtype"}
        What it was.
    value : ndarray or str
        The tensor's numbers, in the order of memory; or the name.
    axes : tuple of int
        The tensor's axes in the order of memory: a factor that LAPACK wrote by columns stays by columns, because a
        product with it in another order differs in its last bits.
    """

    kind: str
    value: Array
    axes: tuple[int, ...] = ()

    @classmethod
    def of_tensor(cls, tensor: torch.Tensor) -> Packed:
        """Pack a tensor, from whatever device; without a copy where it is on the CPU and dense."""
        array = tensor.detach().cpu().numpy()
        axes = sorted(range(array.ndim), key=lambda axis: -array.strides[axis])
        return cls("tensor", np.asarray(array.transpose(axes), order="C"), tuple(axes))

    def unpack(self) -> Array:
        """Return what was packed; a tensor on the CPU, of its own memory."""
        if self.kind != "tensor":
            return _NAMED[self.kind](self.value)
        # A copy, since a memory map is read-only; into torch's own memory, since its alignment too decides last bits.
        tensor = torch.empty(self.value.shape, dtype=_dtype(self.value.dtype.name), device="cpu")
        tensor.numpy()[...] = self.value
        return tensor.permute(*np.argsort(self.axes).tolist()) if self.axes else tensor


# The dtypes that a state may name. A closed list: a name from a file is never looked up anywhere else.
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    )
}


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(must_be("A dtype's name", f"one of {sorted(DTYPES)}", repr(name)))
    return DTYPES[name]


def _numpy_dtype(name: str) -> np.dtype:
    # NumPy reads whole records out of such a string.
    return torch.empty(0, dtype=_dtype(name), device="cpu").numpy().dtype


_NAMED: dict[str, Callable[[str], object]] = {"dtype": _dtype, "device": torch.device, "numpy dtype": _numpy_dtype}


def pack(value: object) -> Array:
    """Return ``value`` with each tensor, dtype and device ``Packed``, in lists, tuples and dicts too."""
    if isinstance(value, torch.Tensor):
        return Packed.of_tensor(value)
    if isinstance(value, torch.dtype):
        return Packed("dtype", str(value).removeprefix("torch."))
    if isinstance(value, torch.device):
        return Packed("device", str(value))
    if isinstance(value, np.dtype):
        return Packed("numpy dtype", value.name)
    return within(pack, value)


def unpack(value: object) -> Array:
    """Return what was packed."""
    return value.unpack() if isinstance(value, Packed) else within(unpack, value)


class TensorState:
    """Pickles tensors as numpy arrays, so that a fit on an accelerator loads on any machine.

    Examples
    --------
    >>> class Pair(TensorState):
    ...     def __init__(self):
    ...         self.entries, self.dtype = [torch.ones(2)], torch.float32
    >>> Pair().__getstate__()["dtype"]
    Packed(kind='dtype', value='float32', axes=())
    >>> loaded = Pair.__new__(Pair)
    >>> loaded.__setstate__(Pair().__getstate__())
    >>> loaded.entries
    [tensor([1., 1.])]
    """

    # Names of attributes that are rebuilt when needed and so are never pickled.
    _transient: tuple[str, ...] = ()
    # What a file may hold of an object, each attribute with its type in the words of `schema`; without it, no file may.
    _fields: ClassVar[Mapping[str, str]]

    def __copy__(self) -> Self:
        """Return a shallow copy, on the same device and over the same tensors."""
        duplicate = object.__new__(type(self))
        duplicate.__dict__.update(self.__dict__)
        return duplicate

    def __getstate__(self) -> State:
        """Return the attributes, torch's as ``Packed``, without what can be rebuilt."""
        state = {name: None if name in self._transient else value for name, value in self.__dict__.items()}
        on_cpu = torch.device("cpu")
        return {name: pack(on_cpu if isinstance(value, torch.device) else value) for name, value in state.items()}

    def __setstate__(self, state: State) -> None:
        """Restore the attributes; tensors are on the CPU."""
        self.__dict__.update({name: unpack(value) for name, value in state.items()})


def held_bytes(value: object) -> int:
    """Return the bytes of the tensors that an object keeps, each memory once, without what can be rebuilt.

    Examples
    --------
    >>> rows = torch.zeros(2, 3)
    >>> held_bytes([rows, rows[:1]])
    24
    """
    found: dict[int, int] = {}
    _gather(value, found)
    return sum(found.values())


def _gather(value: object, found: dict[int, int]) -> None:
    """Note the memory of each tensor within ``value``, by its address."""
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    elif isinstance(value, TensorState):
        for name, part in vars(value).items():
            if name not in value._transient:
                _gather(part, found)
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            _gather(part, found)


def within(function: Callable[[object], object], value: Array) -> Array:
    """Return ``function`` of each item of a list, a tuple or a dict, in one of its kind; else ``value``."""
    # Exactly these types: another container may hold its items in its own way.
    if type(value) in (list, tuple):
        return type(value)(function(item) for item in value)
    if type(value) is dict:
        return {key: function(item) for key, item in value.items()}
    return value
