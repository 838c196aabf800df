"""The parts of a batch: its tensors, its rows, its labels, and how a module is called with them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from .._check import must_be
from .._types import Batch

__all__ = [
    "binds",
    "call",
    "check_pair",
    "doubled",
    "first_rows",
    "labels_key",
    "leading_length",
    "map_tensors",
    "rebuilt",
    "row_axes",
    "split_labels",
    "takes",
    "with_row_axis",
]


@runtime_checkable
class _NamedTuple(Protocol):
    _fields: tuple[str, ...]

    def _make(self, values: Iterable[Batch]) -> Any: ...


def map_tensors(function: Any, batch: Batch) -> Any:
    """Return ``batch`` (tensors in tuples, lists and mappings) with ``function`` applied to every tensor.

    A tensor without an axis is shared by all rows: a function that slices rows leaves it as it is.
    """
    if isinstance(batch, torch.Tensor):
        try:
            return function(batch)
        except IndexError:
            if batch.ndim:
                raise
            return batch
    if isinstance(batch, Mapping):
        return {key: map_tensors(function, value) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        parts = [map_tensors(function, value) for value in batch]
        return rebuilt(batch, parts)
    return batch


def doubled(batch: Batch) -> Any:
    """Return ``batch`` with its floating tensors in float64."""
    return map_tensors(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor, batch)


def first_rows(batch: Batch) -> Any:
    """Return the first eight rows of ``batch``; what has no rows is all rows' own."""
    return map_tensors(lambda tensor: tensor[:8] if tensor.ndim else tensor, batch)


def rebuilt(container: tuple[Any, ...] | list[Any], parts: Iterable[Batch]) -> Any:
    """Return ``parts`` in a container of the same type: a named tuple takes them one by one."""
    # Plain tuples first: to ask a protocol takes as long as a small layer.
    if type(container) is not tuple and isinstance(container, tuple) and isinstance(container, _NamedTuple):
        return container._make(parts)
    return type(container)(parts)


def row_axes(batch: Batch) -> Any:
    """Return ``batch`` with 0, the axis of the rows, in place of every tensor, and None in place of what they share."""
    if isinstance(batch, Mapping):
        return {key: row_axes(value) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        parts = [row_axes(value) for value in batch]
        return rebuilt(batch, parts)
    return 0 if isinstance(batch, torch.Tensor) and batch.ndim else None


def with_row_axis(row: Batch, axes: Any) -> Any:
    """Return a row as a batch of one: an axis for every tensor that has one in ``axes``."""
    if isinstance(row, Mapping):
        return {key: with_row_axis(value, axes[key]) for key, value in row.items()}
    if isinstance(row, tuple | list):
        parts = [with_row_axis(*pair) for pair in zip(row, axes, strict=True)]
        return rebuilt(row, parts)
    return row if axes is None else row[None]


def leading_length(batch: Batch) -> int:
    """Return the number of rows of a batch: the length of its last tensor, which is the target of ``(x, y)``."""
    lengths = row_counts(batch)
    if not lengths:
        hint = "Single samples have no rows: try a DataLoader with a batch_size."
        raise ValueError(must_be("A batch", "one with a tensor of rows in it", type(batch).__name__, hint))
    return lengths[-1]


def row_counts(batch: Batch) -> list[int]:
    """Return the lengths of all tensors with an axis."""
    lengths: list[int] = []
    map_tensors(lambda tensor: lengths.append(len(tensor)) if tensor.ndim else None, batch)
    return lengths


def check_pair(batch: Batch) -> None:
    """Raise unless every tensor of (inputs, targets) has as many rows."""
    if isinstance(batch[0], int):
        hint = "Are these pairs of `enumerate`? Give the batches alone."
        raise ValueError(must_be("A batch", "a pair (inputs, targets)", f"the number {batch[0]} for inputs", hint))
    inputs, targets = (row_counts(part) for part in batch)
    if inputs and not targets:
        hint = "A single sample has no rows: try a DataLoader with a batch_size, or `x[None]`, `y[None]`."
        raise ValueError(must_be("The targets of a batch", "one per row", "a scalar", hint))
    if len({*inputs, *targets}) > 1:
        hint = "What all rows share may be a tensor without an axis, or a buffer of the module."
        got = f"inputs of {', '.join(map(str, inputs))} rows and targets of {', '.join(map(str, targets))}"
        raise ValueError(must_be("A batch's inputs and targets", "of the same number of rows", got, hint))


def labels_key(mapping: Mapping[Any, Any]) -> str | None:
    """Return the key of the targets in a mapping, or None."""
    return next((key for key in ("labels", "label") if key in mapping), None)


def split_labels(batch: Batch) -> Any:
    """Return a mapping with labels, alone or in ``(mapping, None)``, as (inputs, targets); other batches unchanged."""
    if isinstance(batch, tuple) and len(batch) == 2 and batch[1] is None:
        batch = batch[0]
    key = labels_key(batch) if isinstance(batch, Mapping) else None
    if key is None or batch[key] is None:
        return batch
    return {name: value for name, value in batch.items() if name != key}, batch[key]


def call(module: nn.Module, x: Batch) -> Any:
    """Return ``module(**x)`` of a mapping, ``module(*x)`` of a tuple, where ``forward`` takes them so; else of x."""
    if isinstance(x, Mapping):
        named = _named(module, x)
        if binds(module, **named):
            return module(**named)
        if not binds(module, x):
            hint = "Try the names that it takes, or subclass TorchTwiceDifferentiable and override `outputs`."
            must = f"what the module's forward{_signature(module)} takes"
            raise TypeError(must_be("The keys of a batch", must, sorted(map(str, x)), hint))
        return _of_mapping(module, x)
    if isinstance(x, tuple) and binds(module, *x):
        return module(*x)
    return module(x)


def _of_mapping(module: nn.Module, x: Mapping[Any, Any]) -> Any:
    """Return ``module(x)`` of a mapping as it is; told by its keys where it was meant to be taken by name."""
    signature = _signature(module)
    try:
        return module(x)
    except TypeError as error:
        known = {} if signature is None else signature.parameters
        # Labels are tried with the inputs too.
        inputs = {str(key) for key in x} - {"labels", "label"}
        more = sorted(inputs.difference(known))
        if not more or len(more) == len(inputs):
            raise
        hint = f"Leave out {', '.join(more)}, or subclass TorchTwiceDifferentiable and override `outputs`."
        must = f"those that the module's forward{signature} takes"
        raise TypeError(must_be("The keys of a batch", must, sorted(map(str, x)), hint)) from error


def binds(module: nn.Module, *args: Any, **kwargs: Any) -> bool:
    """Return whether ``module``'s forward takes these arguments; True where its signature cannot be read."""
    signature = _signature(module)
    try:
        if signature is not None:
            signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def takes(module: nn.Module, name: str) -> bool:
    """Return whether ``module``'s forward has an argument of this name."""
    signature = _signature(module)
    return signature is not None and name in signature.parameters


def _named(module: nn.Module, x: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the entries by name, without texts and other data of the rows that no argument is named for."""
    signature = _signature(module)
    if signature is None or any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        return {str(key): value for key, value in x.items()}
    return {str(key): value for key, value in x.items() if key in signature.parameters or row_counts(value)}


def _signature(module: nn.Module) -> inspect.Signature | None:
    try:
        return inspect.signature(module.forward)
    except (TypeError, ValueError):
        return None
