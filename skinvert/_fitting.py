"""A fit as one assignment, a clone that shares what was trained, and a duplicate that stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

from sklearn.base import BaseEstimator, clone

__all__ = ["SharesModel", "as_it_is", "fit_whole"]

# What a fit writes beside the names that end in "_".
WRITTEN = ("_layout", "_model", "_data", "_totals", "_columns", "_bounds", "_namespace", "_ranks")


def fit_whole(estimator: Any, fit: Callable[[Any], object]) -> None:
    """Leave ``estimator`` as ``fit`` leaves a duplicate of it that was never fitted.

    The results are taken over by one assignment: a fit that raises or is interrupted changes nothing, and no attribute
    of an earlier fit stays beside those of a later one.
    """
    fresh = object.__new__(type(estimator))
    fresh.__dict__ = {name: value for name, value in vars(estimator).items() if not _is_fitted(name)}
    fit(fresh)
    estimator.__dict__ = fresh.__dict__


def as_it_is(estimator: Any) -> Any:
    """Return a duplicate over the same arrays that no later fit reaches, and no ``set_params``.

    Fitted estimators within are duplicated too: a frozen inverter is the user's own. Its output is in arrays.
    """
    duplicate = _duplicate(estimator)
    duplicate._sklearn_output_config = {"transform": "default"}
    return duplicate


def _duplicate(value: Any) -> Any:
    if isinstance(value, list):
        return [_duplicate(part) for part in value]
    if not isinstance(value, BaseEstimator):
        return value
    # Not `copy.copy`, which goes by the state of a pickle: without the curvature.
    duplicate = object.__new__(type(value))
    duplicate.__dict__ = {name: _duplicate(part) if _is_fitted(name) else part for name, part in vars(value).items()}
    return duplicate


class SharesModel:
    """An estimator whose clones share what was trained: a model is data, not a setting."""

    _shared: ClassVar[tuple[str, ...]] = ("model", "loss")

    def __sklearn_clone__(self) -> Self:
        """Return an unfitted clone over the same model and loss."""
        estimator: Any = self
        params = estimator.get_params(deep=False)
        kept = {name: params.pop(name) for name in self._shared}
        duplicate = type(self)(**{name: clone(value, safe=False) for name, value in params.items()}, **kept)
        # What `set_output`, `set_fit_request` and the like have set.
        for name in ("_metadata_request", "_sklearn_output_config"):
            if name in vars(self):
                setattr(duplicate, name, clone(vars(self)[name], safe=False))
        # The user's own objects, which hear of every clone's fit: as scikit-learn's clones have them.
        if "_skl_callbacks" in vars(self):
            vars(duplicate)["_skl_callbacks"] = vars(self)["_skl_callbacks"]
        return duplicate


def _is_fitted(name: str) -> bool:
    return name in WRITTEN or (name.endswith("_") and not name.startswith("_"))
