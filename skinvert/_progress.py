"""A progress bar over long work, shown when ``verbose`` asks for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

__all__ = ["progress"]


def progress(steps: Iterable[Any], description: str, verbose: int, total: int | None = None) -> Iterator[Any]:
    """Iterate over ``steps`` under a tqdm bar; without one where ``verbose`` is 0."""
    return iter(tqdm(steps, desc=description, total=total, disable=not verbose, leave=False))
