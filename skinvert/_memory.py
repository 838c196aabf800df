"""Estimates before anything large is allocated, and chunk sizes that fit the budget."""

from __future__ import annotations

import psutil
import sklearn
import torch

__all__ = ["available_memory", "check_memory", "rows_within", "working_memory"]


def working_memory() -> int:
    """Return scikit-learn's ``working_memory`` in bytes: the budget of temporary arrays and kept graphs."""
    return int(sklearn.get_config()["working_memory"] * 2**20)


def rows_within(bytes_per_row: int, most: int | None = None) -> int:
    """Return how many rows of ``bytes_per_row`` fit the working memory: at least 1, at most ``most``."""
    rows = max(1, working_memory() // max(1, bytes_per_row))
    return rows if most is None else min(rows, max(1, most))


def available_memory(device: torch.device) -> int:
    """Return the bytes that can still be allocated on ``device``."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def check_memory(needed: int, what: str, way_out: str, device: torch.device) -> None:
    """Raise MemoryError, with the estimate, the limit and the way out, where ``needed`` bytes are not there."""
    limit = available_memory(device)
    if needed > limit:
        found = f"{_readable(limit)} are available on {device}"
        message = f"{what} needs about {_readable(needed)}, but {found}. {way_out}"
        raise MemoryError(message)


def _readable(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:,.1f} GiB"
