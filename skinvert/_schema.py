"""What a decoded attribute may be: types in words, with shapes whose letters must agree within an object."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

import numpy as np
import torch

from ._check import must_be
from ._types import Array

__all__ = ["check_fields"]

_SHAPED = re.compile(r"(tensor|double|index|mask|bytes)\[([a-z0-9,]*)\]")
# The dtypes that a kind of tensor alone has.
_EXACTLY = {"index": torch.int64, "mask": torch.bool, "double": torch.float64, "bytes": torch.uint8}
# Containers of plain values may hold containers, so deep.
DEPTH = 4


def check_fields(owner: str, fields: Mapping[str, str], state: Mapping[str, object], optional: frozenset[str]) -> None:
    """Raise ValueError unless ``state`` has just the ``fields`` of ``owner``, each of its type.

    Parameters
    ----------
    owner : str
        What the state is of, for the error.
    fields : mapping of str to str
        Each attribute's type: ``"float"`` (finite), ``"int"`` (≥ 0), ``"bool"``, ``"str"``, ``"dtype"``, ``"device"``,
        ``"names"`` (strings), ``"array"`` (1-d, floating), ``"plain"`` (these in lists, tuples and dicts),
        ``"state"`` (a mapping of names, checked on its own), ``"tensor[p,p]"`` (floating), ``"double[p]"`` (float64,
        beside tensors of another dtype), ``"index[p]"`` (int64), ``"mask[p]"`` (bool) and ``"bytes[p]"``, whose letters
        stand for one length each, the name of a class of ours, ``"list[Name]"`` of such. Alternatives are separated by
        ``|``; ``None`` is one, and ``missing`` lets the attribute be left out.
    state : mapping
        The attributes.
    optional : frozenset of str
        Fields that may be missing.

    Examples
    --------
    >>> check_fields("Pair", {"a": "tensor[p]", "b": "tensor[p]|None"}, {"a": torch.ones(2), "b": None}, frozenset())
    >>> check_fields("Pair", {"a": "float"}, {"a": "one"}, frozenset())
    Traceback (most recent call last):
    ...
    ValueError: Pair.a must be of type float. Got a str instead.
    """
    if extra := sorted(set(state) - set(fields), key=str):
        raise ValueError(must_be(f"A {owner}", f"one of {sorted(fields)} alone", f"also {extra}"))
    optional = optional | {name for name, words in fields.items() if "missing" in words.split("|")}
    if missing := sorted(set(fields) - set(state) - optional):
        raise ValueError(must_be(f"A {owner}", f"one with {sorted(fields)}", f"one without {missing}"))
    bound: dict[str, object] = {}
    for name, value in state.items():
        if not any(_fits(word, value, bound) for word in fields[name].split("|")):
            raise ValueError(must_be(f"{owner}.{name}", f"of type {fields[name]}", _described(value)))


def _fits(word: str, value: object, bound: dict[str, object]) -> bool:
    if word in _SIMPLE:
        return _SIMPLE[word](value)
    shaped = _SHAPED.fullmatch(word)
    if shaped:
        return _is_shaped(value, shaped[1], shaped[2], bound)
    if word.startswith("list["):
        return type(value) is list and all(_is_a(item, word[5:-1]) for item in value)
    return _is_a(value, word)


def _is_a(value: object, name: str) -> bool:
    """Return whether ``value`` is an object, not a class or a function, of a class of this name."""
    return not isinstance(value, type) and name in {base.__name__ for base in type(value).__mro__}


def _is_shaped(value: object, kind: str, letters: str, bound: dict[str, object]) -> bool:
    if not isinstance(value, torch.Tensor):
        return False
    wanted = {kind: value.dtype == dtype for kind, dtype in _EXACTLY.items()}
    if kind == "tensor":
        # One floating dtype for all of an object's numbers.
        wanted["tensor"] = value.is_floating_point() and bound.setdefault("dtype", value.dtype) == value.dtype
    sizes = letters.split(",") if letters else []
    if not wanted[kind] or len(sizes) != value.ndim:
        return False
    for letter, size in zip(sizes, value.shape, strict=True):
        expected = int(letter) if letter.isdigit() else bound.setdefault(letter, size)
        if expected != size:
            return False
    return True


def _is_plain(value: Array, depth: int = DEPTH) -> bool:
    if (
        value is None
        or type(value) in (bool, int, float, str, torch.dtype, torch.device)
        or isinstance(value, np.dtype)
    ):
        return True
    if depth and type(value) in (list, tuple):
        return all(_is_plain(item, depth - 1) for item in value)
    if depth and type(value) is dict:
        return all(type(key) is str and _is_plain(item, depth - 1) for key, item in value.items())
    return isinstance(value, np.ndarray) and value.dtype.kind in "biuf"


def _is_names(value: Array) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim == 1 and value.dtype == object and _is_names(value.tolist())
    return type(value) in (list, tuple) and all(type(item) is str for item in value)


_SIMPLE: dict[str, Callable[[Array], bool]] = {
    "None": lambda value: value is None,
    "bool": lambda value: type(value) is bool,
    "int": lambda value: type(value) is int and 0 <= value < 2**63,
    "float": lambda value: type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value),
    "str": lambda value: type(value) is str,
    "dtype": lambda value: isinstance(value, torch.dtype) and value in (torch.float32, torch.float64),
    "device": lambda value: isinstance(value, torch.device),
    "names": _is_names,
    "array": lambda value: isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind == "f",
    "plain": _is_plain,
    "state": lambda value: type(value) is dict and all(type(key) is str for key in value),
}


def _described(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype}"
    return f"a {type(value).__name__}"
