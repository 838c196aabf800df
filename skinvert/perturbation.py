"""λ as a setting: a number, or a share of the mean eigenvalue of H that is resolved once H is known."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from sklearn.utils import check_random_state

from ._check import check_hessian_perturbation, must_be
from ._types import RandomState
from .operators import LinearOperator, trace

__all__ = ["check_perturbation", "resolve", "share_of"]

RELATIVE = re.compile(r"\s*(\S+)\s+rel\s*")


def check_perturbation(value: Any, owner: str = "") -> float | str:
    """Return λ as it is set: a float ≥ 0, or a string such as ``"1e-2 rel"``."""
    if not isinstance(value, str) or "rel" not in value:
        return check_hessian_perturbation(value, owner)
    what = f"The 'hessian_perturbation' parameter of {owner}" if owner else "hessian_perturbation"
    must = 'a float in the range [0.0, inf), or a share of the mean eigenvalue such as "1e-2 rel"'
    found = RELATIVE.fullmatch(value)
    try:
        share = float(found[1]) if found else -1.0
    except ValueError:
        share = -1.0
    # NaN compares false.
    if not 0 <= share < float("inf"):
        raise ValueError(must_be(what, must, repr(value)))
    return str(value) if share else 0.0


def share_of(value: str) -> float:
    """Return the number of a checked string."""
    return float(value.split()[0])


def resolve(values: Sequence[float | str], A: LinearOperator, random_state: RandomState) -> list[float]:
    r"""Return λ for each checked setting: of ``"c rel"`` it is c · tr(H) / p.

    H is the curvature as it is inverted, the penalty included, and never its approximation: one setting is one λ for
    every method. Where the trace is estimated, ``random_state`` seeds it.
    """
    if not any(isinstance(value, str) for value in values):
        return [float(value) for value in values]
    mean = trace(A, _seed(random_state)) / A.size
    if not mean > 0:
        hint = f"Try a number for λ. {A.hint}".strip()
        raise ValueError(must_be("The mean eigenvalue of H for a relative λ", "> 0", f"{mean:.3g}", hint))
    return [share_of(value) * mean if isinstance(value, str) else value for value in values]


def _seed(random_state: RandomState) -> int:
    if random_state is None or isinstance(random_state, int):
        return random_state or 0
    return int(check_random_state(random_state).randint(2**31 - 1))
