"""The relative residual of rows, in float64 sums."""

from __future__ import annotations

import torch

from .._memory import rows_within
from .._scaling import far_exponents, norms, times_powers
from ..operators import LinearOperator

__all__ = ["relative_residual"]


def relative_residual(operator: LinearOperator, B: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    """Return ‖Ax − b‖ / ‖b‖ (k,) in float64 sums; 0 where b = 0 and x = 0; infinity where that is not finite."""
    residual = torch.empty(len(B), dtype=torch.float64, device=B.device)
    step = rows_within(4 * operator.size * B.element_size())
    for start in range(0, len(B), step):
        rows = slice(start, start + step)
        powers = far_exponents(B[rows])
        b = times_powers(B[rows], -powers)
        gap, size = norms(operator.apply(times_powers(X[rows], -powers)) - b), norms(b)
        gap = torch.where(torch.isfinite(gap), gap, torch.inf)
        residual[rows] = torch.where(size > 0, gap / size, gap)
    return residual
