"""Estimates before anything large is allocated, and chunk sizes that fit the budget."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import sklearn
import torch

__all__ = ["available_memory", "check_memory", "naming_memory", "readable", "rows_within", "working_memory"]

CGROUPS, OWN_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def working_memory() -> int:
    """Return scikit-learn's ``working_memory`` in bytes: the budget of temporary arrays and kept graphs."""
    return int(sklearn.get_config()["working_memory"] * 2**20)


def rows_within(bytes_per_row: int, most: int | None = None) -> int:
    """Return how many rows of ``bytes_per_row`` fit the working memory: at least 1, at most ``most``."""
    rows = max(1, working_memory() // max(1, bytes_per_row))
    return rows if most is None else min(rows, max(1, most))


def available_memory(device: torch.device) -> int:
    """Return the bytes that can still be allocated on ``device``.

    On the CPU what the machine, the process's address space (``ulimit -v``) and its control groups (a container's
    limit) all leave.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return max(0, min(psutil.virtual_memory().available, *_limits()))


def _limits() -> Iterator[int]:
    """Yield what is left of each limit that is set."""
    process = psutil.Process()
    if psutil.LINUX:
        soft, _ = process.rlimit(psutil.RLIMIT_AS)
        if soft not in (-1, psutil.RLIM_INFINITY):
            yield soft - process.memory_info().vms
    for folder, limit, used, cache in _control_groups():
        most, now = _number(folder / limit), _number(folder / used)
        if most is not None and now is not None:
            # Pages of files that can be dropped count as used, but are not in the way.
            yield most - now + _statistic(folder / "memory.stat", cache)
    yield 2**63


def _control_groups() -> Iterator[tuple[Path, str, str, str]]:
    """Yield the folders of this process's control groups, and the names of their files: version 2, then 1."""
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        names: tuple[str, str, str] | None = None
        if not controllers:
            root, names = CGROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, names = CGROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        if names is None:
            continue
        # A limit of any group above holds too; a container sees its own as the root, under the host's path.
        inner = root / path.lstrip("/")
        for folder in (inner, *inner.parents):
            yield folder, *names
            if folder == root:
                break


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() and int(text) < 2**60 else None


def _statistic(path: Path, name: str) -> int:
    try:
        entries = dict(line.split() for line in path.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(entries.get(name, 0))


@contextmanager
def naming_memory(what: str, way_out: str) -> Iterator[None]:
    """Raise MemoryError with the way out where an allocation inside fails, on the CPU or on a device."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        message = f"{what} ran out of memory. {way_out}"
        raise MemoryError(message) from error


def check_memory(needed: int, what: str, way_out: str, device: torch.device) -> None:
    """Raise MemoryError, with the estimate, the limit and the way out, where ``needed`` bytes are not there."""
    limit = available_memory(device)
    if needed > limit:
        found = f"{readable(limit)} are available on {device}"
        message = f"{what} needs about {readable(needed)}, but {found}. {way_out}"
        raise MemoryError(message)


def readable(size: float) -> str:
    """Return a number of bytes as one reads it: "1.5 MiB"."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:,.1f} GiB"
