"""The fitted steps of a pipeline before its model, as a fit keeps them: a copy."""

from __future__ import annotations

import copy
from typing import Any

from .._check import must_be

__all__ = ["own_steps"]


def own_steps(steps: Any) -> Any:
    """Return a copy of steps that no later fit of the user's pipeline reaches; None where there are none.

    ValueError where they cannot be copied.
    """
    if steps is None:
        return None
    own = copy.copy(steps)
    # A pipeline may fit its steps in place, and they what they hold: a shallow copy of one would see it.
    own.steps = [(name, _copied(name, step)) for name, step in steps.steps]
    return own


def _copied(name: str, step: Any) -> Any:
    # scikit-learn's callbacks are shared, as by `clone`: they hold bars and locks.
    shared = {id(callback): callback for callback in getattr(step, "_skl_callbacks", [])}
    try:
        return copy.deepcopy(step, shared)
    except MemoryError:
        raise
    except Exception as error:
        hint = "Give the last step as the model, and X as the steps before it transform it."
        got = f"a {type(step).__name__}: {error}"
        raise ValueError(must_be(f"The pipeline's step {name!r}", "one that can be copied", got, hint)) from error
