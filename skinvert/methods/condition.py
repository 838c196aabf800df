"""The condition of a factorised matrix, estimated from its factor."""

from __future__ import annotations

import math

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
import torch

from .._memory import rows_within
from ..operators.bases import rounding

__all__ = ["norm1", "own_units", "rank_in_own_units", "rcond"]


def norm1(matrix: torch.Tensor, units: torch.Tensor | None = None) -> float:
    """Return the largest column sum of magnitudes of U A U, U = diag(units), by blocks of a symmetric matrix's rows."""
    step = rows_within(2 * matrix.shape[1] * matrix.element_size(), len(matrix))
    if units is None:
        return max(float(part.abs().sum(1).max()) for part in matrix.split(step))
    parts = zip(matrix.split(step), units.split(step), strict=True)
    return max(float((own * (part.abs() @ units)).max()) for part, own in parts)


def own_units(diagonal: torch.Tensor) -> torch.Tensor | None:
    """Return u (p,), powers of two, with u² a about 1 for a diagonal a (p,); None where an entry is not positive.

    Diag(u) A diag(u) is A in units of each parameter's own: of all diagonal scalings its condition is within p of the
    least (van der Sluis, 1969), and it is this condition that the error of a Cholesky factorisation goes by, whatever
    A's own. To scale by powers of two, and back, rounds nothing.

    References
    ----------
    Higham (2002), "Accuracy and Stability of Numerical Algorithms", thms. 7.5 and 10.5 to 10.7.

    Examples
    --------
    >>> own_units(torch.tensor([1.0, 16.0, 1e-6]))
    tensor([1.0000e+00, 2.5000e-01, 1.0240e+03])
    """
    if not bool((diagonal > 0).all()):
        return None
    return torch.exp2(-(diagonal.log2() / 2).round())


def rank_in_own_units(matrix: torch.Tensor, shift: float) -> int:
    """Return how many eigenvalues of a semi-definite A + λI are not zero in units of each parameter's own.

    Examples
    --------
    >>> rank_in_own_units(torch.tensor([[1e15, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 1.0, 1.0]]), 0.0)
    2
    """
    alive = (matrix.diagonal() + shift > 0).nonzero()[:, 0]
    units = own_units(matrix.diagonal()[alive] + shift)
    assert units is not None
    scaled = matrix[alive][:, alive].mul_(units).mul_(units[:, None])
    scaled.diagonal().add_(shift * units.square())
    values = torch.linalg.eigvalsh(scaled)
    return int((values > rounding(len(matrix), values.dtype) * float(values.max())).sum()) if len(values) else 0


def rcond(cholesky: torch.Tensor, norm: float) -> float:
    """Estimate 1 / (‖A‖₁ ‖A⁻¹‖₁) from the Cholesky factor: LAPACK's ``pocon``, or its algorithm on a device."""
    if norm == 0 or not math.isfinite(norm):
        return 0.0
    if cholesky.device.type == "cpu":
        pocon = scipy.linalg.get_lapack_funcs("pocon", (cholesky.numpy(),))
        # LAPACK reads columns: the transpose of a row-major lower factor is the upper one, without a copy.
        by_columns = cholesky.mT.is_contiguous()
        found, _ = pocon(cholesky.numpy() if by_columns else cholesky.numpy().T, norm, uplo="L" if by_columns else "U")
        return float(found)

    def solve(columns: np.ndarray) -> np.ndarray:
        right = torch.from_numpy(np.ascontiguousarray(columns)).to(cholesky)
        return torch.cholesky_solve(right.reshape(len(right), -1), cholesky).cpu().numpy().reshape(columns.shape)

    inverse = scipy.sparse.linalg.LinearOperator(
        cholesky.shape, matvec=solve, rmatvec=solve, matmat=solve, rmatmat=solve, dtype=np.float64
    )
    estimate = scipy.sparse.linalg.onenormest(inverse)
    return 1 / (norm * estimate) if math.isfinite(estimate) and estimate > 0 else 0.0
