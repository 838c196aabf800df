"""The method that chooses a method."""

from __future__ import annotations

import math
from typing import ClassVar

from .._memory import available_memory
from ..operators import LinearOperator
from .base import InverseOperator, Method
from .cg import CG
from .direct import Direct

__all__ = ["Auto"]


class Auto(Method):
    """``direct`` where its matrix is small, else ``cg``.

    ========================================  ==========
    the curvature                             the method
    ========================================  ==========
    p ≤ 5,000, and 3 p² numbers fit           direct
    a factor of r < p rows, r ≤ 5,000, λ > 0  direct
    otherwise                                 cg
    ========================================  ==========
    """

    name: ClassVar[str] = "auto"
    cost: ClassVar[str] = "the chosen method's"
    memory: ClassVar[str] = "the chosen method's"
    exactness: ClassVar[str] = "the chosen method's"
    choose_it_for: ClassVar[str] = "in doubt"

    def choose(self, A: LinearOperator, hessian_perturbation: float) -> Method:
        """Return the method for A."""
        rows = getattr(A, "factor_shape", (math.inf, 0))[0]
        side = min(A.size, rows) if hessian_perturbation > 0 else A.size
        held = side * (A.size if side == rows else side)
        fits = 3 * held * A.dtype.itemsize < available_memory(A.device)
        return Direct() if side <= 5000 and fits else CG()

    def invert(self, A: LinearOperator, hessian_perturbation: float, verbose: int = 0) -> InverseOperator:
        """Invert with the chosen method."""
        return self.choose(A, hessian_perturbation).invert(A, hessian_perturbation, verbose)
