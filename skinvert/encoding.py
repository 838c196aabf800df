"""State as JSON and arrays, and back: only values, and objects of a closed list of classes with typed attributes."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, TypeAlias

import numpy as np
import torch
from sklearn.base import BaseEstimator

from ._check import must_be
from ._schema import check_fields
from ._state import Packed, TensorState, pack, unpack, within
from ._types import State
from .parameters import ParameterLayout

__all__ = ["LeftOut", "Writer", "decode_state", "plain"]

# What JSON holds, each part of it checked where it is read, and what that stands for.
Json: TypeAlias = Any
Decoded: TypeAlias = Any

# More levels than any state of ours has, and more objects, each counted as often as it is reached from the root.
DEPTH, OBJECTS = 32, 2**20


@dataclass(frozen=True)
class LeftOut:
    """Stands for a setting that a file leaves out, so that a later fit cannot take it for one that was never given.

    Parameters
    ----------
    what : str
        The type of what was left out.
    """

    what: str

    def __repr__(self) -> str:
        return f"<{self.what}, left out of the file>"


def _table() -> dict[str, type]:
    """Return the classes that a file may name: ours that say what a file holds of them. No other is ever looked up."""
    found: list[type] = [LeftOut, ParameterLayout, *_below(TensorState)]
    return {_name_of(cls): cls for cls in found if _is_ours(cls) and _fields_of(cls) is not None}


def _fields_of(cls: type) -> Mapping[str, str] | None:
    """Return the types of a class's attributes: as it declares them, or those of its settings; None where neither."""
    if cls is LeftOut:
        return {"what": "str"}
    if cls is ParameterLayout:
        return {"names": "names", "shapes": "plain"}
    declared = cls.__dict__.get("_fields")
    if declared is not None:
        return dict(declared)
    if issubclass(cls, BaseEstimator):
        # Settings of a method or a curvature, which `fit` checks again; one may be a method (a preconditioner).
        settings = list(inspect.signature(cls).parameters)
        return dict.fromkeys(settings, "plain|Method")
    return None


def _below(cls: type) -> list[type]:
    children: list[type] = cls.__subclasses__()
    return [below for child in children for below in (child, *_below(child))]


def _name_of(cls: type) -> str:
    return f"{cls.__module__.partition('.')[2]}.{cls.__qualname__}"


def _is_ours(cls: type) -> bool:
    package = __name__.partition(".")[0]
    if cls.__module__.partition(".")[0] != package or cls.__module__ not in sys.modules:
        return False
    return vars(sys.modules[cls.__module__]).get(cls.__name__) is cls and not inspect.isabstract(cls)


class Writer:
    """Collects arrays and objects while it turns values into JSON; what is met twice is written once.

    A list is ``["list", ...]``, and so is everything else that JSON has no form for, under its own tag.
    """

    def __init__(self) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        self.objects: list[list[Json]] = []
        self._seen: dict[tuple[object, ...], Json] = {}
        self._names = {cls: name for name, cls in _table().items()}
        # Kept alive, so that no address is used twice.
        self._kept: list[object] = []

    def encode(self, value: Decoded, where: str) -> Json:
        """Return ``value`` as JSON; ``where`` it stands is for the error."""
        value = pack(plain(value))
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Packed):
            return ["packed", value.kind, self.encode(value.value, where), list(value.axes)]
        if isinstance(value, np.ndarray):
            return self._array(value, where)
        if type(value) in (list, tuple):
            return [type(value).__name__, [self.encode(item, f"{where}[{i}]") for i, item in enumerate(value)]]
        if type(value) is dict:
            pairs = [[self.encode(k, where), self.encode(v, f"{where}.{k}")] for k, v in value.items()]
            return ["dict", pairs]
        return self._object(value, where)

    def _array(self, array: np.ndarray, where: str) -> Json:
        if array.dtype == object:
            return ["object array", self.encode(array.tolist(), where)]
        if array.dtype.kind not in "biuf":
            raise ValueError(self._refusal(f"an array of dtype {array.dtype}", where))
        array = np.asarray(array, order="C")
        # Empty arrays have no address of their own.
        place = array.ctypes.data if array.size else f"empty {len(self.arrays)}"
        key = (place, array.shape, array.dtype.str)
        if key not in self._seen:
            self._seen[key] = f"array{len(self.arrays)}"
            self.arrays[self._seen[key]] = array
        return ["array", self._seen[key]]

    def _object(self, value: Decoded, where: str) -> Json:
        if type(value) not in self._names:
            raise ValueError(self._refusal(type(value).__name__, where))
        key = ("object", id(value))
        if key not in self._seen:
            self._seen[key] = len(self.objects)
            self._kept.append(value)
            entry = [self._names[type(value)], None]
            self.objects.append(entry)
            # What is rebuilt when needed stands as None in a pickle, and not at all in a file.
            transient = value._transient if isinstance(value, TensorState) else ()
            state = {name: part for name, part in value.__getstate__().items() if name not in transient}
            check_fields(type(value).__name__, _fields_of(type(value)) or {}, plain(unpack(state)), frozenset())
            entry[1] = self.encode(state, f"{where}.{type(value).__name__}")
        return ["object", self._seen[key]]

    def _refusal(self, got: str, where: str) -> str:
        return must_be(f"What save writes, {where},", "plain, or skinvert's own", got, "Try pickle or joblib.")


def plain(value: Decoded) -> Decoded:
    """Return NumPy scalars as Python's, classes that name a dtype as dtypes, and paths as text; in containers too."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, type) and (value in (float, int) or issubclass(value, np.generic)):
        return np.dtype(value)
    if isinstance(value, PurePath):
        return str(value)
    return within(plain, value)


def decode_state(content: Json, arrays: dict[str, np.ndarray], device: torch.device) -> State:
    """Return the root's state, its objects checked by type and shape and moved to ``device``.

    Raises
    ------
    ValueError, TypeError, LookupError, RecursionError
        For a state that ``Writer`` would not have written.
    """
    return _Reader(content, arrays, device).root()


class _Reader:
    """Builds each object once, and each tensor once however often it is referred to."""

    def __init__(self, content: Json, arrays: dict[str, np.ndarray], device: torch.device) -> None:
        self.content, self.arrays, self.device = content, arrays, device
        self.table = _table()
        self.tensors: dict[str, torch.Tensor] = {}
        self.objects: dict[int, object] = {}
        self.reached, self.within = 0, dict[int, int]()
        self.open: set[int] = set()

    def root(self) -> State:
        if type(self.content) is not dict or set(self.content) != {"root", "objects"}:
            raise ValueError(must_be("The state", "an object with root and objects", type(self.content).__name__))
        state = self.decode(self.content["root"])
        if type(state) is not dict or not all(type(key) is str for key in state):
            raise ValueError(must_be("The root", "a mapping of names", type(state).__name__))
        return state

    def decode(self, value: Json, depth: int = 0) -> Decoded:
        if value is None or type(value) in (bool, int, float, str):
            return value
        if type(value) is not list or depth > DEPTH or not value or type(value[0]) is not str:
            raise ValueError(must_be("An entry of the state", "a plain value or a tagged list", repr(value)[:80]))
        return _TAGS[value[0]](self, *value[1:], depth=depth + 1)

    def _packed(self, kind: str, value: Json, axes: Json, depth: int) -> Decoded:
        if kind != "tensor":
            return Packed(str(kind), str(self.decode(value, depth)), ()).unpack()
        array = self.decode(value, depth)
        sound = isinstance(array, np.ndarray) and all(type(axis) is int for axis in axes)
        if not sound or sorted(axes) != list(range(array.ndim)):
            raise ValueError(must_be("A tensor's axes", "each of its array's once", repr(axes)[:80]))
        key = repr(value)
        if key not in self.tensors:
            self.tensors[key] = Packed("tensor", array).unpack().to(self.device)
        # Whatever the axes, the same numbers: a few axes have many orders.
        return self.tensors[key].permute(*np.argsort(axes).tolist()) if axes else self.tensors[key]

    def _array(self, name: str, depth: int) -> np.ndarray:
        return self.arrays[name]

    def _object_array(self, content: Json, depth: int) -> np.ndarray:
        items = self.decode(content, depth)
        array = np.empty(len(items), dtype=object)
        array[:] = items
        return array

    def _dict(self, content: Json, depth: int) -> dict[Decoded, Decoded]:
        return {self.decode(key, depth): self.decode(item, depth) for key, item in content}

    def _list(self, content: Json, depth: int) -> list[Decoded]:
        return [self.decode(item, depth) for item in content]

    def _tuple(self, content: Json, depth: int) -> tuple[Decoded, ...]:
        return tuple(self._list(content, depth))

    def _object(self, index: Json, depth: int) -> object:
        if type(index) is not int or not 0 <= index < len(self.content["objects"]) or index in self.open:
            raise ValueError(must_be("An object", "one of the file's, and no part of itself", repr(index)[:80]))
        if index not in self.objects:
            self.open.add(index)
            before = self.reached
            self.objects[index] = self._built(self.content["objects"][index], depth)
            self.within[index] = self.reached - before + 1
            self.open.discard(index)
            self.reached = before
        # What is reached by many ways is worked through as often: a small file must not ask for work without end.
        self.reached += self.within[index]
        if self.reached > OBJECTS:
            raise ValueError(must_be("The objects of a state", f"at most {OBJECTS:,}", "more, by many ways to one"))
        return self.objects[index]

    def _built(self, entry: Json, depth: int) -> object:
        name, state = entry
        cls = self.table[name]
        values = self.decode(state, depth)
        if type(values) is not dict:
            raise ValueError(must_be(f"The state of a {name}", "a mapping", type(values).__name__))
        check_fields(cls.__name__, _fields_of(cls) or {}, values, frozenset())
        built: Any = object.__new__(cls)
        moved = {key: self.device if isinstance(value, torch.device) else value for key, value in values.items()}
        built.__dict__.update(moved, **dict.fromkeys(cls._transient if issubclass(cls, TensorState) else ()))
        return built


# What reads each tag: a closed list.
_TAGS: dict[str, Callable[..., Decoded]] = {
    "packed": _Reader._packed,
    "array": _Reader._array,
    "object array": _Reader._object_array,
    "dict": _Reader._dict,
    "list": _Reader._list,
    "tuple": _Reader._tuple,
    "object": _Reader._object,
}
