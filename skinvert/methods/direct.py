"""Dense inversion: Cholesky with a condition estimate, else an eigendecomposition; sample space where n < p."""

from __future__ import annotations

from typing import ClassVar

import torch

from .._check import check_number
from ..operators import Dense, LinearOperator, check_dense_memory
from .assembly import assembled
from .base import InverseOperator, Method, default_tolerance
from .dense import CHOLESKY_COPIES, factorise
from .sample_space import SampleSpaceInverse

__all__ = ["Direct"]


class Direct(Method):
    r"""Assemble H once and factorise it: exact, O(p³) once and O(p²) per right-hand side, 8·2p² bytes in float64.

    A + λI is factorised by Cholesky, and its reciprocal condition number rcond is estimated, because Cholesky
    "succeeds" on singular matrices. Where it fails, or rcond < 10·√p·eps, or a random right-hand side is not solved to
    ``rtol``, an eigendecomposition takes over: eigenvalues within (10 + √p)·eps·max|eig| of zero are left out (the
    pseudo-inverse), and a right-hand side with a part in their span is warned of. Negative eigenvalues are inverted as
    they are, with a warning that says how negative. Where λ > 0 and the curvature is positive semi-definite by
    construction nothing is left out. Such a curvature, that of a linear model too, is judged in units of each
    parameter's own: inputs of which one is in other units than the rest make rcond small, and the factor no worse.
    Where that does not save it, directions that are zero for their units alone are warned of.

    A curvature with a factor of fewer rows than p, H = FᵀF + R with R + λ > 0, is inverted in sample space by
    Woodbury's identity, or by the singular vectors of F where λ is so small that Cholesky would lose it.

    The matrix, or the factor, is held against one product with H first: where they differ it is assembled anew by
    products, and where these differ too, that is an error.

    Parameters
    ----------
    rtol : float, default=None
        A row whose part in the null space exceeds ``rtol`` ‖b‖ is warned of, and ``converged`` says whether the
        residual is within it. None is 1e-3 in float32 and 1e-6 in float64.

    References
    ----------
    Higham (2002), "Accuracy and Stability of Numerical Algorithms", ch. 15 (condition estimation), sec. 10.1 (scaling).

    Examples
    --------
    >>> from skinvert.operators import DiagonalMatrix
    >>> inverse = Direct().invert(DiagonalMatrix(torch.tensor([1.0, 3.0])), 1.0)
    >>> inverse.solve(torch.tensor([[2.0, 2.0]])).x
    tensor([[1.0000, 0.5000]])
    """

    name: ClassVar[str] = "direct"
    gaussian: ClassVar[bool] = True
    cost: ClassVar[str] = "n p², or p products (Hessian of convolutions, sequences); p³ once, p² a row"
    memory: ClassVar[str] = "3 to 4 p², or 3 r p for a factor of r < p rows"
    exactness: ClassVar[str] = "exact"
    choose_it_for: ClassVar[str] = "p up to some 5,000; many right-hand sides; many λ"

    def __init__(self, *, rtol: float | None = None) -> None:
        self.rtol = rtol

    def invert(self, A: LinearOperator, hessian_perturbation: float, verbose: int = 0) -> InverseOperator:
        """Factorise A + λI, in sample space where that is smaller."""
        rtol = default_tolerance(A.dtype) if self.rtol is None else self.rtol
        rtol = check_number(rtol, "rtol", owner="Direct", low=0.0)
        shift = _positive_shift(A, hessian_perturbation)
        if shift is not None and few_rows(A, A.size - 1):
            return SampleSpaceInverse(A, hessian_perturbation, shift, rtol, verbose)
        # The matrix and its factor; an eigendecomposition asks for more when it is needed.
        check_dense_memory(A, CHOLESKY_COPIES)
        dense = Dense(assembled(A, hessian_perturbation, verbose))
        # The Hessian of a linear model is the GGN. Not (... < 0): NaN is a bound that is not known.
        dense.is_psd, dense.hint = A.is_psd or A.lower_bound >= 0, A.hint
        return factorise(dense, hessian_perturbation, rtol)


def _positive_shift(A: LinearOperator, hessian_perturbation: float) -> torch.Tensor | None:
    """Return R + λ as (p,), or None where an entry is too small to divide by."""
    if "factor" not in A.faces:
        return None
    penalty = A.penalty
    shift = torch.full((A.size,), hessian_perturbation, dtype=A.dtype, device=A.device)
    shift = shift if penalty is None else shift + penalty
    return shift if bool((shift > 0).all()) else None


def few_rows(A: LinearOperator, most: int) -> bool:
    """Return whether A has a factor of at most so many rows."""
    return A.factor_shape is not None and A.factor_shape[0] <= most
