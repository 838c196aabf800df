"""Where a matrix of scores goes: into memory, into the user's own array, or into a file that is resumed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch

from .._check import must_be, resolve_dtype
from .._types import Array
from ..identity import Job
from ..persistence import replacing

__all__ = ["Destination", "Out", "destination"]

WAY_OUT = "Delete it, or give another name."


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
    out: Out, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, job: Callable[[], Job]
) -> Destination:
    """Return where scores of this shape go; the ``job`` tells one computation from another, of a file."""
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
    return _file(Path(out), shape, torch.empty(0, dtype=dtype, device="cpu").numpy().dtype, job())


def _file(path: Path, shape: tuple[int, int], dtype: np.dtype, job: Job) -> Destination:
    """Return the file of a matrix: an unfinished one is gone on with, one of another computation refused."""
    note = path.with_name(path.name + ".json")
    if path.exists():
        if other := _differences(note, job):
            got = f"{path}, of others: another {', another '.join(other)}"
            raise ValueError(must_be("out", "a new file, or one of the same scores", got, WAY_OUT))
        _check_whole(path, shape, dtype)
        return Destination(np.lib.format.open_memmap(path, mode="r+"), resumed=True)
    # The note first: a matrix without one is taken for another's.
    told = json.dumps({"job": dict(job.settled), "numbers": {name: own.tolist() for name, own in job.sums.items()}})
    with replacing(note, len(told)) as temporary:
        temporary.write_text(told, encoding="utf-8")
    # Whole or not at all: of a file that was cut off the zeros that no one has filled would count as scores.
    with replacing(path, math.prod(shape) * dtype.itemsize) as temporary:
        array = np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=shape)
        array[:] = np.nan
        array.flush()
        del array
    return Destination(np.lib.format.open_memmap(path, mode="r+"), resumed=True)


def _check_whole(path: Path, shape: tuple[int, int], dtype: np.dtype) -> None:
    """Raise, before it is opened for writing, which would fill it up, unless a file is the whole matrix."""
    must = f"a whole file of {dtype} of shape {shape}, as it was written"
    try:
        found: Array = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(must_be("out", must, f"{path}, a damaged one ({error})", WAY_OUT)) from error
    size = path.stat().st_size
    if found.shape != shape or found.dtype != dtype or not found.flags.c_contiguous:
        raise ValueError(must_be("out", must, f"{path}, of {found.dtype} of shape {found.shape}", WAY_OUT))
    if size != found.offset + found.nbytes:
        got = f"{path}, of {size:,} bytes in place of {found.offset + found.nbytes:,}"
        raise ValueError(must_be("out", must, got, WAY_OUT))


def _differences(note: Path, job: Job) -> list[str]:
    """Return the words for what the scores of a note have otherwise than the ``job``."""
    try:
        told = json.loads(note.read_text(encoding="utf-8"))
        sums = {name: torch.tensor(own, dtype=torch.float64, device="cpu") for name, own in told["numbers"].items()}
        return job.differences(told["job"], sums)
    except FileNotFoundError:
        return [f"origin, as there is no {note.name}"]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return [f"origin, as {note.name} is none that was written with scores"]
