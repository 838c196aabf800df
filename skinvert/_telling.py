"""Warnings that point at the user's own line."""

from __future__ import annotations

import inspect
import warnings

__all__ = ["warn"]

# Between us and whoever asked: scikit-learn's searches and wrappers, joblib's calls, torch's autograd, SciPy's solvers
# over our operators, bars, blocks of Dask.
PASSED = (
    __name__.partition(".")[0],
    "sklearn",
    "joblib",
    "skorch",
    "torch",
    "contextlib",
    "scipy",
    "numpy",
    "tqdm",
    "dask",
)


def warn(message: str, category: type[Warning]) -> None:
    """Warn as from the innermost line that is neither ours nor a library's on the way to us."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in PASSED:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
