"""Where a matrix of scores goes: into memory, into the user's own array, or into a file that is resumed."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch

from .._check import must_be, resolve_dtype
from .._types import Array
from ..persistence import replacing

__all__ = ["Destination", "Out", "destination", "fingerprint"]


@runtime_checkable
class Writable(Protocol):
    """An array that parts can be written to: NumPy's, a memmap, Zarr's, HDF5's."""

    shape: tuple[int, ...]
    # NumPy's, or torch's; each library has a type of its own.
    dtype: Any

    def __setitem__(self, key: tuple[slice, slice], value: np.ndarray, /) -> None: ...


Out: TypeAlias = str | os.PathLike[str] | Writable | None


class Destination:
    """A matrix (n_test, n_train) that is written block by block.

    Parameters
    ----------
    array : array
        The matrix.
    resumed : bool, default=False
        Whether finite entries count as written already.
    """

    def __init__(self, array: Array, resumed: bool = False) -> None:
        self.array, self.resumed = array, resumed

    def write(self, rows: slice, cols: slice, block: torch.Tensor) -> None:
        """Write a block."""
        own = isinstance(self.array, torch.Tensor)
        self.array[rows, cols] = block if own else block.detach().cpu().numpy()

    def has(self, rows: slice, cols: slice) -> bool:
        """Return whether an earlier run has written all of these."""
        return self.resumed and bool(np.isfinite(self.array[rows, cols]).all())

    def known(self) -> int:
        """Return how many entries an earlier run has written."""
        return sum(int(np.isfinite(row).sum()) for row in self.array) if self.resumed else 0

    def close(self) -> Array:
        """Return the matrix, on disk where it is a file."""
        if isinstance(self.array, np.memmap):
            self.array.flush()
        return self.array


def destination(
    out: Out, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, known_by: str
) -> Destination:
    """Return where scores of this shape go; ``known_by`` tells one computation from another, of a file."""
    if out is None:
        return Destination(torch.empty(shape, dtype=dtype, device=device))
    if isinstance(out, Writable):
        if tuple(out.shape) != shape:
            raise ValueError(must_be("out", f"of shape {shape}", f"shape {tuple(out.shape)}"))
        try:
            # Not half precision: scores are of the order of 1/n, and its smallest number is 6e-8.
            resolve_dtype(out.dtype, dtype)
        except ValueError as error:
            hint = "Scores are cast to what it holds: an int makes zeros of them."
            raise ValueError(must_be("out", "of float32 or float64", str(out.dtype), hint)) from error
        return Destination(out)
    if not isinstance(out, str | os.PathLike) or Path(out).suffix != ".npy":
        must = "None, a path that ends in .npy, or an array to write to"
        raise ValueError(must_be("out", must, repr(out)))
    return _file(Path(out), shape, torch.empty(0, dtype=dtype, device="cpu").numpy().dtype, known_by)


def _file(path: Path, shape: tuple[int, int], dtype: np.dtype, known_by: str) -> Destination:
    """Return the file of a matrix: an unfinished one is gone on with, one of another computation refused."""
    note = path.with_name(path.name + ".json")
    if path.exists():
        if not note.exists() or note.read_text(encoding="utf-8") != _told(known_by):
            hint = "Delete it, or give another name."
            raise ValueError(must_be("out", "a new file, or one of the same scores", f"{path}, of others", hint))
        return Destination(np.lib.format.open_memmap(path, mode="r+"), resumed=True)
    # The note first: a matrix without one is taken for another's.
    with replacing(note, len(known_by)) as temporary:
        temporary.write_text(_told(known_by), encoding="utf-8")
    # Whole or not at all: of a file that was cut off the zeros that no one has filled would count as scores.
    with replacing(path, math.prod(shape) * dtype.itemsize) as temporary:
        array = np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=shape)
        array[:] = np.nan
        array.flush()
        del array
    return Destination(np.lib.format.open_memmap(path, mode="r+"), resumed=True)


def _told(known_by: str) -> str:
    return json.dumps({"scores": known_by})


def fingerprint(settings: Sequence[object], parts: Sequence[torch.Tensor]) -> str:
    """Return what tells a computation from others: its settings, and numbers of it to six digits."""
    digest = hashlib.sha256(repr(list(settings)).encode())
    for part in parts:
        digest.update(" ".join(f"{value:.5e}" for value in part.detach().reshape(-1).tolist()).encode())
    return digest.hexdigest()
