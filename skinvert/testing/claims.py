"""How the kit says what does not hold, and gathers it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

__all__ = ["ROUNDING", "claim", "numbers", "quiet", "raise_faults"]

# Between what a float64 oracle says and what a dtype can: of its own rounding, whatever the method.
ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-9}

Subject = TypeVar("Subject")


def claim(holds: bool, what: str, got: object, where: str = "") -> None:
    """Raise AssertionError that says what must hold, where, and what was got, unless it ``holds``."""
    if not holds:
        place = f" on {where}" if where else ""
        message = f"{what}{place}. Got {got}."
        raise AssertionError(message)


def raise_faults(subject: Subject, name: str, checks: Iterable[Callable[[Subject], None]]) -> None:
    """Run every check, and raise one AssertionError with a line for each that failed."""
    checks = list(checks)
    faults = [fault for check in checks for fault in _faults_of(check, subject)]
    if faults:
        message = f"{name} fails {len(faults)} of {len(checks)} checks:\n" + "\n".join(faults)
        raise AssertionError(message)


def numbers(values: torch.Tensor) -> str:
    """Return a few digits of each."""
    return str([float(f"{value:.3g}") for value in values.double().flatten().tolist()])


@contextmanager
def quiet() -> Iterator[None]:
    """Ignore warnings for a while: what a method warns of is right to be warned of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _faults_of(check: Callable[[Subject], None], subject: Subject) -> list[str]:
    try:
        check(subject)
    except AssertionError as error:
        return [f"{check.__name__}: {error}"]
    except Exception as error:
        return [f"{check.__name__}: {type(error).__name__}: {error}"]
    return []
