"""The method that chooses a method."""

from __future__ import annotations

from typing import ClassVar

from .._memory import readable
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
        method, _ = self.explain(A, hessian_perturbation)
        return method

    def explain(self, A: LinearOperator, hessian_perturbation: float) -> tuple[Method, str]:
        """Return the method for A, and which row of the table it is."""
        available, p = A.available_memory(), A.size
        free = available // A.dtype.itemsize
        room = f"{readable(4 * p**2 * A.dtype.itemsize)} for 4 p² numbers"
        if p <= SIDE and 4 * p**2 < free:
            return Direct(), f"p = {p:,} is at most {SIDE:,}, and there is {room}"
        most = min(p - 1, SIDE, free // (3 * p) - 1)
        if hessian_perturbation > 0 and few_rows(A, most):
            return Direct(), f"λ > 0, and H has a factor of few rows beside p = {p:,}"
        large = f"p = {p:,} is above {SIDE:,}" if p > SIDE else f"{readable(available)} is less than {room}"
        if A.is_psd:
            return CG(), f"{large}, and H is positive semi-definite by construction"
        return MINRES(), f"{large}, and H may be indefinite"

    def invert(self, A: LinearOperator, hessian_perturbation: float, verbose: int = 0) -> InverseOperator:
        """Invert with the chosen method."""
        return self.choose(A, hessian_perturbation).invert(A, hessian_perturbation, verbose)
