"""What ``verbose`` shows of long work: a bar with an estimate of its end, and what was chosen, a line each."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm

__all__ = ["progress", "say"]


def progress(steps: Iterable[Any], description: str, verbose: int, total: int | None = None) -> Iterator[Any]:
    """Iterate over ``steps`` under a tqdm bar; without one where ``verbose`` is 0."""
    return iter(tqdm(steps, desc=description, total=total, disable=not verbose, leave=False))


def say(what: str, verbose: int) -> None:
    """Write a line to stderr, above the bars; none where ``verbose`` is 0."""
    if verbose:
        tqdm.write(f"skinvert: {what}", file=sys.stderr)
