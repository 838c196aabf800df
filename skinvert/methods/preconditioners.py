"""Methods as preconditioners of conjugate gradients, and as what finds a start for them."""

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

__all__ = ["PRECONDITIONERS", "as_preconditioner", "rough_inverse"]

# A preconditioner need not be as good as a solution: the sketch stops where its error is ten times λ.
PRECONDITIONERS = {"jacobi": Diagonal(), "nystroem": Nystroem(tol=10.0), "kfac": KFAC(), "ekfac": EKFAC()}


def as_preconditioner(
    preconditioner: Any, A: LinearOperator, hessian_perturbation: float, verbose: int = 0
) -> InverseOperator | None:
    """Return the inverse that preconditions A + λI, or None; raise where it is not positive definite."""
    inverse = rough_inverse(preconditioner, "preconditioner", A, hessian_perturbation, verbose)
    if inverse is not None and not inverse.preconditions:
        name = preconditioner.name if isinstance(preconditioner, Method) else preconditioner
        got = f"one that is not, at hessian_perturbation={hessian_perturbation:.3g}"
        hint = f"Try a larger one, or no preconditioner. {A.hint}".rstrip()
        raise ValueError(must_be(f"The preconditioner {name}", "positive definite", got, hint))
    return inverse


def rough_inverse(
    method: Any, setting: str, A: LinearOperator, hessian_perturbation: float, verbose: int = 0
) -> InverseOperator | None:
    """Return the approximate inverse of A + λI that a setting of a method names, or None.

    Nyström, which serves semi-definite curvatures alone, sketches the companion of one that need not be: A + λI may be
    positive definite all the same.
    """
    if method is None:
        return None
    if not isinstance(method, Method):
        hint = "A configured method, such as Nystroem(rank=200), is taken too."
        method = PRECONDITIONERS[check_choice(method, setting, PRECONDITIONERS, hint)]
    own = clone(method)
    for needed in own.requires:
        if needed not in A.faces:
            must = f"a method that this curvature serves (it has no `{needed}`)"
            raise ValueError(must_be(setting, must, repr(own), 'Try "jacobi".'))
    companion = A.psd_companion() if isinstance(own, Nystroem) else None
    return own.invert(A if companion is None else companion, hessian_perturbation, verbose)
