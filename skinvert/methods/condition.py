"""The condition of a factorised matrix, estimated from its factor."""

from __future__ import annotations

import math

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
import torch

from .._memory import rows_within

__all__ = ["norm1", "rcond"]


def norm1(matrix: torch.Tensor) -> float:
    """Return the largest column sum of magnitudes, by blocks of a symmetric matrix's rows."""
    step = rows_within(2 * matrix.shape[1] * matrix.element_size(), len(matrix))
    return max(float(part.abs().sum(1).max()) for part in matrix.split(step))


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
