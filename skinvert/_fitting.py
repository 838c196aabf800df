"""A fit as one assignment, and a clone that shares what was trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sklearn.base import clone

__all__ = ["clone_sharing", "fit_whole"]

# What a fit writes beside the names that end in "_".
WRITTEN = ("_layout", "_model", "_data", "_totals")


def fit_whole(estimator: Any, fit: Callable[[Any], Any]) -> Any:
    """Return ``estimator`` as ``fit`` leaves a duplicate of it that was never fitted.

    The results are taken over by one assignment: a fit that raises or is interrupted changes nothing, and no attribute
    of an earlier fit stays beside those of a later one.
    """
    fresh = object.__new__(type(estimator))
    fresh.__dict__ = {name: value for name, value in vars(estimator).items() if not _is_fitted(name)}
    fit(fresh)
    estimator.__dict__ = fresh.__dict__
    return estimator


def clone_sharing(estimator: Any, shared: tuple[str, ...] = ("model", "loss")) -> Any:
    """Return an unfitted clone that shares these settings: a trained model is data, not a setting."""
    params = estimator.get_params(deep=False)
    kept = {name: params.pop(name) for name in shared}
    duplicate = type(estimator)(**{name: clone(value, safe=False) for name, value in params.items()}, **kept)
    # What `set_output`, `set_fit_request` and the like have set.
    for name in ("_metadata_request", "_sklearn_output_config", "_skl_callbacks"):
        if name in vars(estimator):
            setattr(duplicate, name, clone(vars(estimator)[name], safe=False))
    return duplicate


def _is_fitted(name: str) -> bool:
    return name in WRITTEN or (name.endswith("_") and not name.startswith("_"))
