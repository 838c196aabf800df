"""What the factors of layers, and what is made of them, take: in memory or in files, before any of it is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..._checkpoint import Checkpoint
from ..._memory import check_memory
from ..._storage import HERE, InCPUMemory, Storage, room
from .kinds import KroneckerLayer, Layer
from .recording import PulledBack

__all__ = ["check_room"]

WHAT = "The Kronecker factors of the layers"
# `eigh` works on a copy, with twice its size beside.
WORK = 4


@dataclass
class _Sizes:
    """Numbers that layers take: of all their sides and parameters, and of the largest side and layer."""

    sides: list[torch.Size]
    places: list[torch.Size]

    @classmethod
    def of(cls, layers: Sequence[Layer]) -> _Sizes:
        sides, places = [], []
        for layer in layers:
            if isinstance(layer, KroneckerLayer):
                *groups, d, i = layer.index.shape
                right = (i,) if layer.is_one_hot else (*groups, i, i)
                sides += [torch.Size((*groups, d, d)), torch.Size(right)]
                places.append(layer.index.shape)
        return cls(sides, places)

    @property
    def held(self) -> int:
        """Numbers of the factors and eigenbases, and of the eigenvalues and their inverse."""
        return 2 * sum(side.numel() for side in self.sides) + 2 * self.n_places

    @property
    def n_places(self) -> int:
        return sum(place.numel() for place in self.places)

    @property
    def largest(self) -> int:
        return max((side.numel() for side in self.sides), default=0)

    @property
    def widest(self) -> int:
        return max((place.numel() for place in self.places), default=0)


def check_room(
    layers: list[Layer], row_bytes: int, curvature: PulledBack, storage: Storage, checkpoint: Checkpoint
) -> None:
    """Make room in the storage; raise where factors, eigenbases and one sample do not fit, there or on the device.

    Raises
    ------
    MemoryError
        Where memory is too small.
    OSError
        Where a disk is.
    """
    objective, sizes = curvature.objective, _Sizes.of(layers)
    itemsize = objective.dtype.itemsize
    # Two numbers of places of 8 bytes for each parameter.
    held = sizes.held * itemsize + 16 * sizes.n_places
    work = (WORK - 1) * sizes.largest * itemsize + row_bytes
    if storage is HERE:
        more = 'offload ("cpu" on a GPU, or a folder) of KFAC and EKFAC, or '
        check_memory(held + work, WHAT, _way_out(more), objective.device)
        return
    # What is at work at once: a side beside its decomposition, a layer's eigenvalues, rows of all parameters.
    work += (sizes.largest + 3 * sizes.widest + 2 * objective.size) * itemsize
    if isinstance(storage, InCPUMemory):
        same = objective.device.type == storage.home.type
        more = "the folder of a disk as `offload`, or "
        check_memory(held + (work if same else 0), WHAT, _way_out(more), storage.home)
        work = 0 if same else work
    elif checkpoint.keeps:
        # Each of its writes copies what is done.
        work += held
    check_memory(work, f"{WHAT}, one at a time,", _way_out(""), objective.device)
    storage.reserve(_groups(sizes, curvature, checkpoint.keeps))


def _way_out(more: str) -> str:
    return f'Try {more}`params` with fewer parameters, or method="cg", which holds no factors.'


def _groups(sizes: _Sizes, curvature: PulledBack, twice: bool) -> dict[str, int]:
    """Return the bytes of each group of tensors; ``twice`` also the eigenvalues of the factors stay."""
    objective, dtype = curvature.objective, curvature.objective.dtype
    sides = sum(room(side, dtype) for side in sizes.sides)
    places = sum(room(place, dtype) for place in sizes.places)
    row = room((objective.size,), dtype)
    return {
        "numbers": sum(room(place, torch.int64) for place in sizes.places),
        "factors": sides + (0 if curvature.penalty is None else places),
        "eigenvalues": places * (1 + twice),
        "inverse": sides + row + room((objective.size,), torch.int64),
        "inverted": 3 * row + room((objective.size,), torch.bool),
    }
