"""The fitted steps of a pipeline before its model, as a fit keeps them: a copy, found not to draw."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import scipy.sparse
import torch

from .._check import must_be
from .forms import take

__all__ = ["own_steps"]

# Rows of which a second look is taken: what draws for one row in a hundred is missed once in 20,000 fits.
LOOKED_AT = 1_000


def own_steps(steps: Any, data: object) -> Any:
    """Return a copy of steps that no later fit of the user's pipeline reaches; None where there are none.

    ValueError where they cannot be copied, or give other features for the same rows of ``data``.
    """
    if steps is None:
        return None
    own = copy.copy(steps)
    # A pipeline may fit its steps in place, and they what they hold: a shallow copy of one would see it.
    own.steps = [(name, _copied(name, step)) for name, step in steps.steps]
    if isinstance(data, tuple) and len(data) == 2:
        _check_alike(own, data[0])
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


def _check_alike(steps: Any, X: Any) -> None:
    """Raise where a step gives other features for the same rows, a second time."""
    n = X.shape[0] if hasattr(X, "shape") else len(X)
    if not n:
        return
    chosen = np.sort(np.random.default_rng(0).choice(n, min(n, LOOKED_AT), replace=False))
    rows = take(X.tocsr() if scipy.sparse.issparse(X) else X, chosen)
    if _twice_alike(steps, rows):
        return
    name, step = _first_drawing(steps, rows)
    hint = (
        "Take from it what draws (`sample_posterior=True`, noise), or give the last step as the model, and X as the "
        "steps before it transform it, once."
    )
    got = f"a {type(step).__name__} that gives others a second time"
    raise ValueError(must_be(f"The pipeline's step {name!r}", "one that gives the same features for a row", got, hint))


def _first_drawing(steps: Any, rows: Any) -> tuple[str, Any]:
    """Return the first step that gives other features a second time, or the last of all."""
    named = [(name, step) for name, step in steps.steps if step is not None and step != "passthrough"]
    for name, step in named[:-1]:
        if not _twice_alike(step, rows):
            return name, step
        rows = step.transform(rows)
    return named[-1]


def _twice_alike(step: Any, rows: Any) -> bool:
    # With `copy=False` a step writes into its rows.
    once, twice = (step.transform(copy.deepcopy(rows)) for _ in range(2))
    return _alike(once, twice)


def _alike(once: Any, twice: Any) -> bool:
    """Return whether features agree but for rounding, which threads may order; what is no number is not judged."""
    if isinstance(once, Mapping):
        return all(_alike(part, twice[key]) for key, part in once.items())
    if scipy.sparse.issparse(once):
        once, twice = once.tocsc(), twice.tocsc()
        if once.shape != twice.shape:
            return False
        off, size = abs(once - twice).max(axis=0).toarray(), abs(once).max(axis=0).toarray()
        return bool((off <= 1e-5 * size).all())
    try:
        once, twice = (_numbers(part) for part in (once, twice))
    except (TypeError, ValueError):
        return True
    if once.shape != twice.shape:
        return False
    size = np.nanmax(np.abs(once), axis=0, keepdims=True, initial=0.0, where=np.isfinite(once))
    off = np.abs(once - twice)
    return bool(((off <= 1e-5 * size) | (once == twice) | (np.isnan(once) & np.isnan(twice))).all())


def _numbers(part: Any) -> np.ndarray:
    part = part.detach().cpu().numpy() if isinstance(part, torch.Tensor) else part
    return np.asarray(part, dtype=np.float64)
