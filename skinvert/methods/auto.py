"""The method that chooses a method."""

from __future__ import annotations

from typing import ClassVar

from .._memory import available_memory
from ..operators import LinearOperator
from .base import InverseOperator, Method
from .cg import CG
from .direct import Direct, few_rows
from .minres import MINRES

__all__ = ["Auto"]

# The most rows of a matrix to factorise.
SIDE = 5000


class Auto(Method):
    """Choose by p, the rows of the factor, the memory and the curvature; ``method_`` says what was chosen.

    The first row that holds:

    ==========================================================  ========
    the curvature                                               method
    ==========================================================  ========
    p ≤ 5,000, and 4 p² numbers fit the memory                  direct
    a factor of r < p rows, r ≤ 5,000, that fits; λ > 0         direct
    positive semi-definite by construction (not the Hessian)    cg
    otherwise: perhaps indefinite                               minres
    ==========================================================  ========

    Examples
    --------
    >>> import torch
    >>> from skinvert.operators import DiagonalMatrix
    >>> Auto().choose(DiagonalMatrix(torch.ones(3)), 0.0)
    Direct()
    """

    name: ClassVar[str] = "auto"
    cost: ClassVar[str] = "the chosen method's"
    memory: ClassVar[str] = "the chosen method's"
    exactness: ClassVar[str] = "the chosen method's"
    choose_it_for: ClassVar[str] = "a first answer: `direct` where it fits, else `cg` or `minres`"

    def choose(self, A: LinearOperator, hessian_perturbation: float) -> Method:
        """Return the method for A."""
        free = available_memory(A.device) // A.dtype.itemsize
        if A.size <= SIDE and 4 * A.size**2 < free:
            return Direct()
        most = min(A.size - 1, SIDE, free // (3 * A.size) - 1)
        if hessian_perturbation > 0 and few_rows(A, most):
            return Direct()
        return CG() if A.is_psd else MINRES()

    def invert(self, A: LinearOperator, hessian_perturbation: float, verbose: int = 0) -> InverseOperator:
        """Invert with the chosen method."""
        return self.choose(A, hessian_perturbation).invert(A, hessian_perturbation, verbose)
