"""The dense matrix, or the factor, of a curvature, held against one of its own products."""

from __future__ import annotations

import torch

from .._check import must_be
from .._telling import warn
from ..operators import Dense, LinearOperator, LowRank

__all__ = ["assembled", "check_factor"]

# Relative difference of two ways to one product: what rounding explains, and what it never does.
ROUNDING = {torch.float32: 1e-3}
WRONG = 0.05
# The same of products in a lesser dtype than the operator's, in roundings of one.
ROUGH = 10


def assembled(A: LinearOperator, hessian_perturbation: float, verbose: int = 0) -> torch.Tensor:
    """Return the matrix of A: its own assembly where a product agrees with it, else by products with the identity.

    An assembly takes short cuts through layers and Jacobians that a product does not share: a residual against the
    matrix alone would not see what they get wrong. Costs one product.
    """
    matrix = A.to_dense(verbose)
    if _gap(A, Dense(matrix), hessian_perturbation) > _rounding(A):
        if type(A).to_dense is not LinearOperator.to_dense:
            matrix = LinearOperator.to_dense(A, verbose)
        _judge(_gap(A, Dense(matrix), hessian_perturbation), A, "products with the identity")
    return matrix


def check_factor(A: LinearOperator, rows: torch.Tensor, hessian_perturbation: float) -> None:
    """Raise or warn where FᵀF plus the penalty is not the A of a product."""
    _judge(_gap(A, LowRank(rows, A.penalty), hessian_perturbation), A, "its factor")


def _gap(A: LinearOperator, other: LinearOperator, hessian_perturbation: float) -> float:
    """Return ‖(A − M)v‖ / ‖(M + λI)v‖ for a random row v; 0 where M is not finite, which is said elsewhere."""
    generator = torch.Generator("cpu").manual_seed(0)
    v = torch.randn(1, A.size, dtype=torch.float64, generator=generator, device="cpu").to(A.device, A.dtype)
    expected = other.apply(v).to(torch.float64)
    if not bool(torch.isfinite(expected).all()):
        return 0.0
    gap = float((A.apply(v).to(torch.float64) - expected).norm())
    size = max(float((expected + hessian_perturbation * v).norm()), float(expected.norm()))
    return gap / size if size > 0 else gap


def _rounding(A: LinearOperator) -> float:
    return max(ROUNDING.get(A.dtype, 1e-6), ROUGH * A.eps)


def _judge(gap: float, A: LinearOperator, way: str) -> None:
    if gap <= _rounding(A):
        return
    what = f"The curvature by {way} and by a product"
    hint = "A layer's derivative is wrong or random, or the data change between passes."
    if not gap <= WRONG:
        raise ValueError(must_be(what, "the same", f"a relative difference of {gap:.3g}", hint))
    warn(
        f"{what} differ by {gap:.3g}: rounding, or a derivative that is wrong. Try dtype=torch.float64.",
        RuntimeWarning,
    )
