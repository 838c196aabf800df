"""Globals by which a forward pass knows a module of the model: the copy has other objects, which they are not.

``if self is ablated``, ``scales[module]`` in a hook: no tensor of the user's is used, and the copy is another model.
"""

from __future__ import annotations

import dis
import functools
import inspect
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

__all__ = ["globals_of"]

# Functions may lead far into a library, and a global may be a data set: beyond so many nothing is looked at.
_REACH = 2_000


def globals_of(module: nn.Module) -> dict[str, str]:
    """Return the globals that functions of a forward pass name and that are, or hold, a module of the tree; and which.

    Those of ``forward`` and of hooks, and of the functions and methods that these name.
    """
    tree = {id(child): f"the module {path!r}" if path else "the model itself" for path, child in module.named_modules()}
    waiting = [(child, function) for child in module.modules() for function in _entries(child)]
    seen: set[tuple[int, int]] = set()
    found: dict[str, str] = {}
    while waiting and len(seen) < _REACH:
        owner, function = waiting.pop()
        if (id(type(owner)), id(function.__code__)) in seen or _is_of_torch(function.__module__):
            continue
        seen.add((id(type(owner)), id(function.__code__)))
        globals_, attributes = _names(function.__code__)
        values = {name: function.__globals__[name] for name in globals_ if name in function.__globals__}
        found.update({name: tree[key] for name, value in values.items() for key in _known(value, tree)})
        named = [*values.values(), *(getattr(type(owner), name, None) for name in attributes)]
        waiting += [(owner, each) for each in named if isinstance(each, types.FunctionType)]
    return found


def _entries(module: nn.Module) -> Iterator[types.FunctionType]:
    """Yield the functions that a call of a module begins with; none of a script, which names no globals."""
    if isinstance(module, torch.jit.ScriptModule):
        return
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    for entry in (vars(module).get("forward"), type(module).forward, *hooks):
        function = _function(entry)
        if function is not None:
            yield function


def _function(entry: Callable[..., Any] | None) -> types.FunctionType | None:
    while isinstance(entry, functools.partial | types.MethodType):
        entry = entry.func if isinstance(entry, functools.partial) else entry.__func__
    if not isinstance(entry, types.FunctionType):
        entry = inspect.getattr_static(type(entry), "__call__", None)
    return entry if isinstance(entry, types.FunctionType) else None


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """Return the globals and the attributes that a code names, with the codes inside it."""
    globals_, attributes = set[str](), set[str]()
    for one in dis.get_instructions(code):
        if one.opname == "LOAD_GLOBAL":
            globals_.add(one.argval)
        elif one.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            attributes.add(one.argval)
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            parts = _names(inner)
            globals_ |= parts[0]
            attributes |= parts[1]
    return frozenset(globals_), frozenset(attributes)


def _known(value: Any, tree: Mapping[int, str]) -> list[int]:
    """Return the identities of the tree's modules that a value is, holds, or is keyed by."""
    if isinstance(value, nn.Module):
        return [id(value)] if id(value) in tree else []
    parts: Iterable[Any] = ()
    if isinstance(value, dict | WeakKeyDictionary):
        parts = chain(islice(value.keys(), _REACH), islice(value.values(), _REACH))
    elif isinstance(value, list | tuple | set | frozenset):
        parts = islice(value, _REACH)
    # A number may be an identity that was noted down.
    keys = [part if type(part) is int else id(part) for part in parts if isinstance(part, nn.Module | int)]
    return [key for key in keys if key in tree]


def _is_of_torch(name: Any) -> bool:
    return str(name).partition(".")[0] == "torch"
