"""Estimates of extreme eigenvalues, with their errors."""

from __future__ import annotations

import numpy as np
import scipy.sparse.linalg

from ..operators import LinearOperator

__all__ = ["smallest_eigenvalue"]


def smallest_eigenvalue(A: LinearOperator, random_state: int = 0) -> tuple[float, float]:
    """Return the smallest eigenvalue of A and the residual of its Lanczos vector; (inf, inf) where none converged.

    A separate Lanczos run: the coefficients of conjugate gradients see the right-hand side's part of the spectrum only.
    """
    if A.size <= 32:
        return float(np.linalg.eigvalsh(A.to_dense().cpu().numpy())[0]), 0.0
    operator = A.aslinearoperator()
    start = np.random.default_rng(random_state).standard_normal(A.size).astype(operator.dtype)
    try:
        values, vectors = scipy.sparse.linalg.eigsh(operator, k=1, which="SA", v0=start, tol=1e-2, maxiter=200)
    except scipy.sparse.linalg.ArpackNoConvergence:
        return np.inf, np.inf
    theta, v = float(values[0]), vectors[:, 0]
    return theta, float(np.linalg.norm(operator @ v - theta * v))
