"""What to try after a failure: only what could be followed for this operator."""

from __future__ import annotations

from .._memory import available_memory
from ..operators import LinearOperator

__all__ = ["advise", "direct_fits"]


def direct_fits(A: LinearOperator) -> bool:
    """Return whether ``direct`` could hold A as a matrix: 6 p² numbers at its peak."""
    return 6 * A.size**2 * A.dtype.itemsize < available_memory(A.device)


def advise(A: LinearOperator, *ways: str) -> str:
    """Return ``"Try a, b, or method="direct"."``, the last only where it fits.

    Examples
    --------
    >>> import torch
    >>> from skinvert.operators import DiagonalMatrix
    >>> advise(DiagonalMatrix(torch.ones(3)), "a larger `maxiter`")
    'Try a larger `maxiter`, or method="direct".'
    """
    found = [*ways, 'method="direct"'] if direct_fits(A) else list(ways)
    return f"Try {', or '.join(filter(None, (', '.join(found[:-1]), found[-1])))}."
