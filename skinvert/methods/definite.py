"""A proof that a dense matrix is positive definite: a number that no eigenvalue is below, by Cholesky."""

from __future__ import annotations

import math

import torch

from ..operators import Dense, LinearOperator, add_to_diagonal, check_dense_memory
from .quadratic import rounding_of

__all__ = ["proven_bound"]

# Shares of the smallest eigenvalue, as computed, that are tried one after the other.
SHARES = (0.999, 0.9, 0.5, 0.1)
# The matrix, a shifted one and its factor.
COPIES = 3


def proven_bound(matrix: Dense, truth: LinearOperator, shift: float) -> float:
    """Return a number that no eigenvalue of the exact A + λI is below; NaN where none above zero is proven.

    The Cholesky factorisation of A + λI − sI runs to its end in floating point only where no eigenvalue of A + λI is
    below s − γ/(1 − γ) tr(A + λI − sI), γ = (p + 1)u/(1 − (p + 1)u). From that, what the assembly of the matrix rounds
    is taken away. s is the smallest eigenvalue as computed, and a little less. 5/3 p³ once, kept with the matrix.

    Parameters
    ----------
    matrix : Dense
        A as it was assembled; where that is in float32 it is assembled anew, from ``truth``.
    truth : LinearOperator
        The exact A + λI, in float64.
    shift : float
        λ.

    References
    ----------
    Rump (2006), "Verification of positive definiteness", BIT 46, thm. 2.3.

    Examples
    --------
    >>> from skinvert.operators import Shifted
    >>> A = Dense(torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64))
    >>> proven_bound(A, Shifted(A, 0.5), 0.5)
    1.49...
    """
    if shift not in matrix.proven:
        check_dense_memory(truth, COPIES)
        double = matrix.dtype == torch.float64
        whole = add_to_diagonal(matrix.to_dense(), shift) if double else truth.to_dense()
        matrix.proven[shift] = _proven(whole, truth.size**0.5 * rounding_of(truth))
    return matrix.proven[shift]


def _proven(whole: torch.Tensor, lost: float) -> float:
    least = float(torch.linalg.eigvalsh(whole)[0])
    gamma = (len(whole) + 2) * torch.finfo(torch.float64).eps / 2
    for share in SHARES if least > 0 else ():
        moved = add_to_diagonal(whole.clone(), -share * least)
        if int(torch.linalg.cholesky_ex(moved)[1]) == 0:
            bound = share * least - 2 * gamma * float(moved.trace()) - lost
            return bound if bound > 0 else math.nan
    return math.nan
