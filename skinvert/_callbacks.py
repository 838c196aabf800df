"""scikit-learn's callbacks, where its version has them (1.9 and newer): ``estimator.set_callbacks(ProgressBar())``."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from typing import Any, TypeVar, cast

from ._progress import Task, telling

__all__ = ["TakesCallbacks", "followed"]

_api: Any = import_module("sklearn.callback") if find_spec("sklearn.callback") else None
_Support: Any = object if _api is None else _api.CallbackSupportMixin

# A decorator that keeps a signature has no other spelling before Python 3.12.
Fit = TypeVar("Fit", bound=Callable[..., Any])


class TakesCallbacks(_Support):
    """An estimator whose ``fit`` callbacks can follow: each bar that ``verbose=1`` shows is a task, with its steps.

    A callback may not end a fit early: half a pass over the data is another curvature.
    """


def followed(fit: Fit) -> Fit:
    """Decorate ``fit`` to tell the estimator's callbacks of it; where there are none it costs nothing."""
    if _api is None:
        return fit

    # What follows `self, X, y`.
    names = list(signature(fit).parameters)[3:]

    @wraps(fit)
    def inside(estimator: Any, X: object, y: object = None, *args: object, **kwargs: object) -> Any:
        if not vars(estimator).get("_skl_callbacks"):
            return fit(estimator, X, y, *args, **kwargs)
        metadata = dict(zip(names, args, strict=False)) | kwargs
        # Behind functions, since scikit-learn calls what is callable, as a module is.
        given = {"X": lambda: X, "y": lambda: y, "metadata": lambda: metadata}
        context = estimator._init_callback_context(max_subtasks=None)
        context.call_on_fit_task_begin(estimator=estimator, **given)
        with telling(Task(estimator, context)):
            found = fit(estimator, X, y, *args, **kwargs)
        context.call_on_fit_task_end(estimator=estimator, **given)
        return found

    return cast("Fit", _api.with_callbacks(inside))
