"""Where large tensors lie: with what computes on them, in the CPU's memory, or in files that are mapped into it."""

from __future__ import annotations

import errno
import math
import mmap
import os
import shutil
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from ._check import must_be
from ._memory import readable

__all__ = ["HERE", "InCPUMemory", "InFiles", "Storage", "check_offload", "room", "storage_of"]

# Of each tensor in a file: torch's own memory has the same, and it decides the last bits of a product.
ALIGNMENT = 64
MUST = 'None, "cpu" or the path of a folder that exists'


class Storage:
    """Where large tensors lie; here where they are made, so that nothing is moved.

    Code that computes with a tensor from a storage moves it, whole, to the device of its other operand.

    Attributes
    ----------
    device : torch.device or None
        That computes, and has the rows; None is each tensor's own.
    place : str
        Where the tensors lie, in words.
    """

    device: torch.device | None = None
    place: str = ""

    def reserve(self, sizes: Mapping[str, int]) -> None:
        """Make room for so many bytes in each group of tensors; OSError where there is none."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, group: str) -> torch.Tensor:
        """Return a tensor to be filled, made for computations on ``device``; a group's tensors go together."""
        return torch.empty(tuple(shape), dtype=dtype, device=device)

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, group: str) -> torch.Tensor:
        """Return a tensor of zeros."""
        return self.empty(shape, dtype, device, group).zero_()

    def keep(self, tensor: torch.Tensor, group: str) -> torch.Tensor:
        """Return the same numbers, in the same order of memory, where they are to lie."""
        return tensor

    def close(self, groups: Iterable[str] | None = None) -> None:
        """Give back the room that no tensor of these groups (None: of any) has taken."""


# The one of `offload=None`.
HERE = Storage()


class InCPUMemory(Storage):
    """Tensors lie in the CPU's memory, whatever device computes."""

    place, home = "the CPU's memory", torch.device("cpu")

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, group: str) -> torch.Tensor:
        """Return a tensor on the CPU."""
        return torch.empty(tuple(shape), dtype=dtype, device=self.home)

    def keep(self, tensor: torch.Tensor, group: str) -> torch.Tensor:
        """Return it on the CPU: itself, where it is there."""
        return tensor.to(self.home)


class InFiles(Storage):
    """Tensors lie in files that are mapped into memory, which the system writes and drops as it needs the room.

    The files have no name: they are removed before anything is written to them. So none is left behind, however the
    process ends, and their room is free as soon as the last of their tensors is. All of it is there from the start: to
    write to a sparse file on a full disk would kill the process.

    Parameters
    ----------
    folder : str or Path
        On a disk, not in memory.
    device : torch.device
        That computes.
    """

    def __init__(self, folder: str | os.PathLike[str], device: torch.device) -> None:
        self.folder, self.device = os.fspath(folder), device
        self.place = f"files in {self.folder!r}"
        self._open: dict[str, _File] = {}
        # Solves at another λ may run in threads.
        self._lock = threading.Lock()

    def reserve(self, sizes: Mapping[str, int]) -> None:
        """Make one file a group, unless the group has as much room left; OSError where the disk has not."""
        with self._lock:
            wanted = {group: size for group, size in sizes.items() if size and not self._has(group, size)}
            self._check_disk(sum(wanted.values()))
            for group, size in wanted.items():
                self._open[group] = self._file(size)

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, group: str) -> torch.Tensor:
        """Return a tensor in the group's file, or in one of its own where that is full."""
        needed = room(shape, dtype)
        if not math.prod(shape):
            return torch.empty(tuple(shape), dtype=dtype, device="cpu")
        with self._lock:
            if not self._has(group, needed):
                self._check_disk(needed)
                self._open[group] = self._file(needed)
            return self._open[group].taken(shape, dtype)

    def keep(self, tensor: torch.Tensor, group: str) -> torch.Tensor:
        """Return a copy in the group's file."""
        # A factor that LAPACK wrote by columns stays by columns: a product with it in another order differs.
        strides = tensor.stride()
        axes = sorted(range(tensor.ndim), key=lambda axis: -strides[axis])
        kept = self.empty([tensor.shape[axis] for axis in axes], tensor.dtype, tensor.device, group)
        return kept.permute(np.argsort(axes).tolist()).copy_(tensor) if axes else kept.copy_(tensor)

    def close(self, groups: Iterable[str] | None = None) -> None:
        """Let go of the groups' files: each is there as long as its tensors."""
        with self._lock:
            for group in list(self._open if groups is None else groups):
                self._open.pop(group, None)

    def _has(self, group: str, size: int) -> bool:
        return group in self._open and self._open[group].left >= size

    def _check_disk(self, size: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if size > free:
            must = f"on a disk with {readable(size)} free"
            raise OSError(errno.ENOSPC, must_be(f"offload={self.folder!r}", must, readable(free), _WAYS_OUT))

    def _file(self, size: int) -> _File:
        try:
            return _File(self.folder, size)
        except OSError as error:
            what = f"A file of {readable(size)} for offload={self.folder!r} could not be made: {error.strerror}."
            raise OSError(error.errno, f"{what} {_WAYS_OUT}") from error


_WAYS_OUT = "Try a folder on another disk, `params` with fewer parameters, or dtype=torch.float32."


class _File:
    """A mapped file without a name, of which tensors take one part after the other."""

    def __init__(self, folder: str, size: int) -> None:
        with tempfile.TemporaryFile(prefix=".skinvert-", dir=folder) as file:
            _allocate(file.fileno(), size)
            self.memory = mmap.mmap(file.fileno(), size)
        self.size, self.used = size, 0

    @property
    def left(self) -> int:
        """Bytes that no tensor has taken."""
        return self.size - self.used

    def taken(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor in the next part: the file stays mapped as long as it."""
        flat = torch.frombuffer(self.memory, dtype=dtype, count=math.prod(shape), offset=self.used)
        self.used += room(shape, dtype)
        return flat.reshape(tuple(shape))


def _allocate(descriptor: int, size: int) -> None:
    """Give a file all of its room on the disk, as zeros."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
        return
    zeros = bytes(2**20)
    while size:
        size -= os.write(descriptor, zeros[: min(size, len(zeros))])


def room(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Return the bytes that a tensor takes of a file."""
    return -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT


def check_offload(offload: object) -> None:
    """Raise, before any work, where ``offload`` is none of its values, or a folder that files cannot be made in."""
    if offload is None or (isinstance(offload, str) and offload == "cpu"):
        return
    if not isinstance(offload, str | os.PathLike):
        raise TypeError(must_be("offload", MUST, repr(offload)))
    folder = os.fspath(offload)
    if not os.path.exists(folder):
        raise FileNotFoundError(errno.ENOENT, must_be("offload", MUST, repr(folder), "Try os.makedirs first."))
    if not os.path.isdir(folder):
        raise NotADirectoryError(errno.ENOTDIR, must_be("offload", MUST, f"the file {folder!r}"))
    try:
        _File(folder, mmap.PAGESIZE)
    except OSError as error:
        got = f"{folder!r}: {error.strerror}"
        raise OSError(error.errno, must_be("offload", "a folder that files can be written to", got)) from error


def storage_of(offload: str | os.PathLike[str] | None, device: torch.device) -> Storage:
    """Return the storage that a setting ``offload`` means, for work on ``device``."""
    check_offload(offload)
    if offload is None:
        return HERE
    return InCPUMemory(device) if offload == "cpu" else InFiles(offload, device)
