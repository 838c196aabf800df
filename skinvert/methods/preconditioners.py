"""Methods as preconditioners of conjugate gradients."""

from __future__ import annotations

from typing import Any

from sklearn.base import clone

from .._check import check_choice, must_be
from ..operators import LinearOperator
from .base import InverseOperator, Method
from .diagonal import Diagonal
from .ekfac import EKFAC
from .kfac import KFAC
from .nystroem import Nystroem

__all__ = ["PRECONDITIONERS", "as_preconditioner"]

# A preconditioner need not be as good as a solution: the sketch stops where its error is ten times λ.
PRECONDITIONERS = {"jacobi": Diagonal(), "nystroem": Nystroem(tol=10.0), "kfac": KFAC(), "ekfac": EKFAC()}


def as_preconditioner(
    preconditioner: Any, A: LinearOperator, hessian_perturbation: float, verbose: int = 0
) -> InverseOperator | None:
    """Return the inverse that preconditions A + λI, or None; raise where it is not positive definite.

    Nyström, which serves semi-definite curvatures alone, sketches the companion of one that need not be: A + λI may be
    positive definite all the same.
    """
    if preconditioner is None:
        return None
    if not isinstance(preconditioner, Method):
        hint = "A configured method, such as Nystroem(rank=200), is taken too."
        preconditioner = PRECONDITIONERS[check_choice(preconditioner, "preconditioner", PRECONDITIONERS, hint)]
    method = clone(preconditioner)
    for needed in method.requires:
        if needed not in A.faces:
            must = f"a method that this curvature serves (it has no `{needed}`)"
            raise ValueError(must_be("preconditioner", must, repr(method), 'Try "jacobi".'))
    companion = A.psd_companion() if isinstance(method, Nystroem) else None
    inverse = method.invert(A if companion is None else companion, hessian_perturbation, verbose)
    if not inverse.preconditions:
        got = f"one that is not, at hessian_perturbation={hessian_perturbation:.3g}"
        hint = f"Try a larger one, or no preconditioner. {A.hint}".rstrip()
        raise ValueError(must_be(f"The preconditioner {method.name}", "positive definite", got, hint))
    return inverse
