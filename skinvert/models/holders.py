"""Functions and plain objects that hold parts of a model: what is in them, and the same over other parts."""

from __future__ import annotations

import array
import copy
import functools
import random
import sys
import types
from collections import UserDict, UserList, deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from .._memory import working_memory
from .._types import Batch

__all__ = [
    "BUILTIN_OWNERS",
    "NAMESPACES",
    "OWN_STATE",
    "copy_function",
    "copy_object",
    "copy_own_state",
    "copy_partial",
    "holds_tensors",
    "is_plain_object",
    "state_of",
    "tensors_within",
]

Copy = Callable[[Any, str], Any]

# A trainer may hang on a module, and a data set on the trainer: beyond so many objects nothing is looked at.
_REACH = 10_000
# What a forward pass may count in, or draw from.
OWN_STATE = (np.ndarray, bytearray, array.array) + (
    torch.Generator,
    random.Random,
    np.random.Generator,
    np.random.RandomState,
)
# Whose bound methods, written in C, lead to parts of a model.
BUILTIN_OWNERS = (torch.Tensor, dict, list, deque, set, *OWN_STATE)
NAMESPACES = (types.SimpleNamespace, UserDict, UserList)
# Objects of these are never copied: they hold locks, files and graphs, and no forward pass runs through them.
_FOREIGN = sys.stdlib_module_names | {"torch", "builtins", "numpy"}


def holds_tensors(value: Any) -> bool:
    """Return whether a module or a tensor can be reached from a function or an object."""
    return any(isinstance(found, nn.Module | torch.Tensor) for found in _reachable(value))


def tensors_within(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors that can be reached from ``value``, those of modules included."""
    for found in _reachable(value):
        if isinstance(found, torch.Tensor):
            yield found


def copy_own_state(value: Any) -> Any:
    """Return an array, a set or a generator of random numbers of the same state.

    Itself where it has no copy, lies in a file, or exceeds scikit-learn's ``working_memory``.
    """
    if isinstance(value, torch.Generator):
        return torch.Generator(value.device).set_state(value.get_state())
    if isinstance(value, np.ndarray) and (isinstance(value, np.memmap) or value.nbytes > working_memory()):
        return value
    try:
        # Of an array of objects, or a set, these stay: they are no parts of a model.
        return copy.copy(value) if isinstance(value, np.ndarray | set) else copy.deepcopy(value)
    except (NotImplementedError, TypeError):
        # As of `random.SystemRandom`, which has no state.
        return value


def copy_partial(value: functools.partial[Any], copied: Copy) -> Any:
    """Return a partial over copies."""
    function = copied(value.func, "")
    args = [copied(arg, f"{i}") for i, arg in enumerate(value.args)]
    duplicate = type(value)(function, *args, **{name: copied(arg, name) for name, arg in value.keywords.items()})
    duplicate.__dict__.update({name: copied(part, name) for name, part in value.__dict__.items()})
    return duplicate


def copy_function(
    value: types.FunctionType, copied: Copy, keep: Callable[[Any], None], cells: dict[int, types.CellType]
) -> None:
    """Make a function over copies of what it closes over, and give it to ``keep`` before they are made.

    ``cells`` are those made so far: functions share them.
    """
    closure = value.__closure__ or ()
    fresh = [cell for cell in closure if id(cell) not in cells]
    cells.update({id(cell): types.CellType() for cell in fresh})
    duplicate = types.FunctionType(
        value.__code__, value.__globals__, value.__name__, None, tuple(cells[id(cell)] for cell in closure)
    )
    keep(duplicate)
    names = dict(zip(map(id, closure), value.__code__.co_freevars, strict=True))
    for cell in fresh:
        if _is_filled(cell):
            cells[id(cell)].cell_contents = copied(cell.cell_contents, names[id(cell)])
    defaults, keywords = value.__defaults__, value.__kwdefaults__
    duplicate.__defaults__ = None if defaults is None else tuple(copied(part, "default") for part in defaults)
    duplicate.__kwdefaults__ = (
        None if keywords is None else {name: copied(part, name) for name, part in keywords.items()}
    )
    duplicate.__qualname__, duplicate.__module__ = value.__qualname__, value.__module__
    duplicate.__doc__, duplicate.__annotations__ = value.__doc__, value.__annotations__
    duplicate.__dict__.update({name: copied(part, name) for name, part in value.__dict__.items()})


def copy_object(value: Any, copied: Copy, keep: Callable[[Any], None]) -> None:
    """Make an object of the same class over copies, and give it to ``keep`` before they are made."""
    is_namespace = type(value) is types.SimpleNamespace
    duplicate = types.SimpleNamespace() if is_namespace else object.__new__(type(value))
    keep(duplicate)
    for name, part in state_of(value).items():
        # Past a frozen dataclass, or a property of the same name.
        object.__setattr__(duplicate, name, copied(part, name))


def is_plain_object(value: Any) -> bool:
    """Return whether ``value`` is an instance of a user's own class, with nothing beneath it but ``object``."""
    kind = type(value)
    if kind in NAMESPACES:
        return True
    made_otherwise = isinstance(value, type) or any("__new__" in vars(base) for base in kind.__mro__[:-1])
    return not made_otherwise and kind.__module__.split(".")[0] not in _FOREIGN


def _reachable(value: Any) -> Iterator[Batch]:
    # The objects themselves are kept as well: an identity counts only while its object lives.
    waiting, seen = [value], {id(value): value}
    while waiting and len(seen) < _REACH:
        found = waiting.pop()
        yield found
        for part in _parts(found):
            if id(part) not in seen:
                seen[id(part)] = part
                waiting.append(part)


def _parts(value: Any) -> Iterator[Batch]:
    """Yield what a value holds."""
    if isinstance(value, nn.Module):
        yield from vars(value).values()
    elif isinstance(value, dict):
        yield from [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple | set | frozenset | deque):
        yield from value
    elif isinstance(value, types.MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, types.BuiltinMethodType):
        yield from [value.__self__] if isinstance(value.__self__, BUILTIN_OWNERS) else []
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords, value.__dict__)
    elif isinstance(value, types.FunctionType):
        yield from [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        yield from (value.__defaults__, value.__kwdefaults__, value.__dict__)
    elif is_plain_object(value):
        yield from state_of(value).values()


def state_of(value: Any) -> dict[str, Any]:
    """Return the attributes that an object itself has, those in slots included."""
    state = dict(vars(value)) if "__dict__" in dir(value) else {}
    for base in type(value).__mro__:
        slots = vars(base).get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            name = f"_{base.__name__.lstrip('_')}{slot}" if slot.startswith("__") and not slot.endswith("__") else slot
            try:
                state[name] = object.__getattribute__(value, name)
            except AttributeError:
                continue
    return {name: part for name, part in state.items() if name not in ("__dict__", "__weakref__")}


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False
