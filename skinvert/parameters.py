"""Flat rows (k, p) and named parameters: which are selected, in what order, and the way there and back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import torch

from ._check import check_choice, must_be
from ._types import Array, Partition

__all__ = ["ParameterLayout", "select_parameters", "split_blocks"]


@dataclass(frozen=True)
class ParameterLayout:
    """The selected parameters in ``named_parameters()`` order: where each lies in a flat row.

    Parameters
    ----------
    names : tuple of str
        Parameter names.
    shapes : tuple of tuple of int
        Their shapes, in the same order.

    Examples
    --------
    >>> layout = ParameterLayout(("weight", "bias"), ((1, 2), (1,)))
    >>> layout.num_params, layout.feature_names()
    (3, ['weight[0,0]', 'weight[0,1]', 'bias[0]'])
    >>> layout.unflatten(torch.tensor([[1.0, 2.0, 3.0]]))["bias"]
    tensor([[3.]])
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of entries of each parameter."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def num_params(self) -> int:
        """Length p of a flat row."""
        return sum(self.sizes)

    @property
    def slices(self) -> dict[str, slice]:
        """Where each parameter lies in a flat row."""
        stops = np.cumsum(self.sizes).tolist()
        starts = [0, *stops[:-1]]
        return {name: slice(a, b) for name, a, b in zip(self.names, starts, stops, strict=True)}

    def feature_names(self) -> list[str]:
        """Return the p names of the entries: ``"fc1.weight[0,3]"``."""
        return [
            f"{name}[{','.join(map(str, index))}]" if shape else name
            for name, shape in zip(self.names, self.shapes, strict=True)
            for index in np.ndindex(*shape)
        ]

    def flatten(self, mapping: Mapping[str, Array] | Iterable[Array]) -> Array:
        """Return rows (k, p) of named tensors or arrays (k, *shape); without the k, one row.

        One row may lack axes of length 1, as scikit-learn's ``coef_`` (d,) and ``intercept_`` of a regression do.
        Those of two axes before the shape, (n, c, *shape), as ``torch.func.jacrev`` gives for n rows of c outputs,
        come out as (n c, p): row i c + j is that of row i and output j. A sequence, such as ``torch.autograd.grad``
        returns, is taken in the order of ``names``.
        """
        values = self._with_own_shapes(self._values(mapping))
        lead = self._lead(values)
        for name, value, shape in zip(self.names, values, self.shapes, strict=True):
            if tuple(value.shape) != (*lead, *shape):
                hint = "All have the same axes before their own shape: none, (k) or (n, c)."
                raise ValueError(must_be(name, f"of shape {(*lead, *shape)}", f"shape {tuple(value.shape)}", hint))
        k = math.prod(lead)
        if any(isinstance(value, torch.Tensor) for value in values):
            tensors = [torch.as_tensor(value) for value in values]
            return torch.cat([one.reshape(k, size) for one, size in zip(tensors, self.sizes, strict=True)], dim=1)
        rows = [np.asarray(value).reshape(k, size) for value, size in zip(values, self.sizes, strict=True)]
        return np.concatenate(rows, axis=1)

    def _lead(self, values: Sequence[Array]) -> tuple[int, ...]:
        """Return the axes before the parameters' own: none, (k) or (n, c)."""
        if all(tuple(value.shape) == shape for value, shape in zip(values, self.shapes, strict=True)):
            return ()
        extra = values[0].ndim - len(self.shapes[0])
        return tuple(values[0].shape[: extra if extra in (1, 2) else 0])

    def _with_own_shapes(self, values: list[Array]) -> list[Array]:
        """Return one row's values in the parameters' shapes where axes of length 1 alone are amiss: the order holds."""
        pairs = list(zip(values, self.shapes, strict=True))
        if all(_long(value.shape) == _long(shape) for value, shape in pairs):
            return [value.reshape(shape) for value, shape in pairs]
        return values

    def _values(self, mapping: object) -> list[Array]:
        """Return the parameters' values in order, as tensors or arrays."""
        what, must = "flatten's argument", f"a mapping of exactly the names {list(self.names)}"
        if not isinstance(mapping, Mapping):
            if isinstance(mapping, torch.Tensor | np.ndarray | str) or not isinstance(mapping, Iterable):
                raise TypeError(must_be(what, f"{must}, or as many values", f"a {type(mapping).__name__}"))
            listed = list(mapping)
            if len(listed) != len(self.names):
                raise ValueError(must_be(what, f"{must}, or as many values", f"{len(listed)} values"))
            mapping = dict(zip(self.names, listed, strict=True))
        missing = [name for name in self.names if mapping.get(name) is None]
        unknown = [name for name in mapping if name not in self.names]
        if missing or unknown:
            raise ValueError(must_be(what, must, f"missing {missing}, unknown {unknown}"))
        values = [mapping[name] for name in self.names]
        return [value if isinstance(value, torch.Tensor) else np.asarray(value) for value in values]

    def unflatten(self, rows: Array) -> dict[str, Array]:
        """Return named tensors or arrays (k, *shape) of rows (k, p)."""
        rows = rows if isinstance(rows, torch.Tensor) else np.asarray(rows)
        if rows.ndim != 2 or rows.shape[1] != self.num_params:
            must = f"of shape (k, {self.num_params})"
            raise ValueError(must_be("x", must, f"shape {tuple(rows.shape)}"))
        return {
            name: rows[:, part].reshape(len(rows), *shape)
            for (name, part), shape in zip(self.slices.items(), self.shapes, strict=True)
        }

    def split(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """Return the tensors (k, *shape) of rows (k, p), or (*shape) of one flat vector (p,)."""
        lead = rows.shape[:-1]
        parts = rows.split(self.sizes, dim=-1)
        return [part.reshape(*lead, *shape) for part, shape in zip(parts, self.shapes, strict=True)]


def select_parameters(named: Sequence[tuple[str, torch.Tensor]], params: str | Iterable[str] | None) -> list[str]:
    """Return the names that ``params`` selects: a glob or globs; None selects all that require a gradient."""
    names = [name for name, _ in named]
    if params is None:
        chosen = [name for name, tensor in named if tensor.requires_grad]
        if not chosen:
            hint = "Call `requires_grad_(True)` on some, or select frozen ones by name with `params`."
            raise ValueError(must_be("The model", "one with trainable parameters", "none", hint))
        return chosen
    globs = list(params) if isinstance(params, Iterable) and not isinstance(params, str) else [params]
    for glob in globs:
        if not isinstance(glob, str):
            raise TypeError(must_be("params", "a glob, a list of globs or None", repr(glob)))
        if not any(fnmatchcase(name, glob) for name in names):
            raise ValueError(must_be("params", f"globs that match some of {names}", repr(glob)))
    chosen = [name for name in names if any(fnmatchcase(name, glob) for glob in globs)]
    if not chosen:
        raise ValueError(must_be("params", f"globs that match some of {names}", repr(params)))
    return chosen


def split_blocks(names: Sequence[str], blocks: Partition) -> dict[str, list[str]]:
    """Return the parameter names of each block: ``"layer"``, ``"parameter"``, or a mapping of names to globs.

    Raises
    ------
    ValueError
        Unless each selected parameter is in exactly one block.

    Examples
    --------
    >>> split_blocks(["fc.weight", "fc.bias", "out.weight"], "layer")
    {'fc': ['fc.weight', 'fc.bias'], 'out': ['out.weight']}
    """
    if isinstance(blocks, str):
        check_choice(blocks, "blocks", ["layer", "parameter"], "None, or a mapping of block names to globs.")
        found: dict[str, list[str]] = {}
        for name in names:
            key = name if blocks == "parameter" else name.rpartition(".")[0]
            found.setdefault(key, []).append(name)
        return found
    if not isinstance(blocks, Mapping):
        must = 'None, "layer", "parameter" or a mapping of block names to globs'
        raise TypeError(must_be("blocks", must, repr(blocks)))
    found = {key: _matching(names, globs) for key, globs in blocks.items()}
    counts = [sum(name in members for members in found.values()) for name in names]
    odd = [name for name, count in zip(names, counts, strict=True) if count != 1]
    if odd or not all(found.values()):
        must = "a mapping whose globs put each selected parameter into exactly one block"
        empty = [key for key, members in found.items() if not members]
        raise ValueError(must_be("blocks", must, f"{odd} in none or several, and empty blocks {empty}"))
    return found


def _matching(names: Sequence[str], globs: str | Iterable[str]) -> list[str]:
    listed = [globs] if isinstance(globs, str) else list(globs)
    return [name for name in names if any(fnmatchcase(name, glob) for glob in listed)]


def _long(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the axes that are not of length 1."""
    return tuple(length for length in shape if length != 1)
