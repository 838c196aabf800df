"""Solutions of the exact A + λI by solves with a rough copy of it: what low precision leaves, a few products mend."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any, Self

import torch

from .._check import check_shift, finite_rows
from .._checkpoint import NOWHERE, Checkpoint
from .._progress import progress
from .._scaling import far_exponents, lost_rows, norms, times_powers
from ..operators import LinearOperator
from ..reasons import Reason, reasons
from ..results import InverseHvpResult
from ..solvers.krylov import starting_point, warn_of_lost, within
from ..solvers.residuals import relative_residual
from .base import InverseOperator, Method, warn_not_converged, warn_of_overflow

__all__ = ["MixedPrecision", "inverted"]

# To what relative residual, and by how many iterations, an iterative method solves with the rough operator: what comes
# after is its rounding.
ROUGHLY, STEPS = 0.1, 100
# Most rounds, the directions that later ones are held orthogonal to, and by how much a round must bring a row nearer.
ROUNDS, KEPT, FALLS = 30, 4, 0.9


def inverted(
    method: Method, A: LinearOperator, hessian_perturbation: float, checkpoint: Checkpoint = NOWHERE, verbose: int = 0
) -> InverseOperator:
    """Return the inverse of A + λI by a method: of the rough copy where A has one, its solutions mended by A itself.

    An approximate method's are left as they are, and judged against A.
    """
    inverse = method.resume(A if A.rough is None else A.rough, hessian_perturbation, checkpoint, verbose)
    if A.rough is None:
        return inverse
    if inverse.approximate:
        return inverse.judged_by(A)
    # What the rounds have of those that iterate.
    asked: dict[str, Any] = {"atol": getattr(inverse, "atol", 0.0), "x0": getattr(inverse, "x0", None)}
    rough, maxiter = inverse.scale_free().roughly(ROUGHLY, STEPS), getattr(inverse, "maxiter", None)
    shift, rtol = inverse.hessian_perturbation, inverse.tolerance
    return MixedPrecision(A, shift, rough, rtol, **asked, maxiter=maxiter, verbose=verbose, name=method.name)


@dataclass
class MixedPrecision(InverseOperator):
    r"""(A + λI)⁻¹ by rounds x + Σ αⱼdⱼ with d = M⁻¹r, M⁻¹ a method's inverse of a rough copy of A + λI.

    Each round costs one solve with the rough copy, whose products may be in bfloat16, and one exact product; ‖r‖ is the
    least over the last directions, and so never grows, however rough the copy is.

    Parameters
    ----------
    curvature : LinearOperator
        A, exact.
    hessian_perturbation : float
        λ.
    inverse : InverseOperator
        M⁻¹.
    rtol, atol : float
        A row has converged when its true ‖Ax − b‖ ≤ max(rtol ‖b‖, atol).
    x0 : tensor of shape (k, p) or None
        Where to start.
    maxiter : int or None
        Most iterations of a row, of all rounds together.
    verbose : int
        1 shows a bar.
    name : str
        The method's.

    References
    ----------
    Carson & Higham (2018), "Accelerating the solution of linear systems by iterative refinement in three precisions",
    alg. 1.1; the rounds are made one Krylov space by Eisenstat, Elman & Schultz (1983), "Variational iterative methods
    for nonsymmetric systems of linear equations", sec. 3 (truncated GCR).

    Examples
    --------
    A copy that is off by a tenth:

    >>> from skinvert.methods import Diagonal
    >>> from skinvert.operators import DiagonalMatrix
    >>> rough = Diagonal().invert(DiagonalMatrix(torch.tensor([1.1, 1.8])), 0.0)
    >>> x, info = MixedPrecision(DiagonalMatrix(torch.tensor([1.0, 2.0])), 0.0, rough, 1e-6).solve(torch.ones(1, 2))
    >>> x, info["converged"]
    (tensor([[1.0000, 0.5000]]), tensor([True]))
    """

    curvature: LinearOperator
    hessian_perturbation: float
    inverse: InverseOperator
    rtol: float
    atol: float = 0.0
    x0: Any = None
    maxiter: int | None = None
    verbose: int = 0
    name: str = ""
    keeps_operator: bool = True

    @property
    def tolerance(self) -> float:
        """``rtol``."""
        return self.rtol

    def at(self, hessian_perturbation: float) -> MixedPrecision:
        """Return the inverse at another λ."""
        shift = check_shift(hessian_perturbation, self.dtype)
        return replace(self, hessian_perturbation=shift, inverse=self.inverse.at(shift)).judged_as(self)

    def started_at(self, x0: torch.Tensor) -> Self:
        """Return this inverse with ``x0`` (k, p) in place of its own; an error where the method takes none."""
        self.inverse.started_at(x0)
        return replace(self, x0=x0).judged_as(self)

    def scale_free(self) -> Self:
        """Return this inverse without ``atol`` and ``x0``, which are on the scale of b."""
        return replace(self, atol=0.0, x0=None).judged_as(self)

    def solve(self, B: torch.Tensor) -> InverseHvpResult:
        """Return the solutions of each row.

        ``info`` holds ``residual`` (k,), ``converged`` (k,), ``reason`` (k,), and, of a method that iterates,
        ``n_iter`` (k,), its iterations of all rounds.
        """
        powers = far_exponents(B)
        run = _Rounds(self, times_powers(B, -powers), powers)
        for _ in progress(range(ROUNDS), "mixed precision", self.verbose):
            if not len(run.rows):
                break
            run.step()
        # Not what the rounds have added up, which drifts.
        residual = relative_residual(self.operator, run.B, run.X)
        converged = within(residual, run.B, self.rtol, run.atol)
        X = warn_of_overflow(self.name, times_powers(run.X, powers))
        held, lost = finite_rows(X), lost_rows(run.X, X)
        warn_of_lost(self.name, lost, X.dtype)
        converged &= held & ~lost
        rest = held & ~lost
        warn_not_converged(self.name, residual[rest], converged[rest], self.rtol, self._hint(run))
        causes = (Reason.MAX_ITERATIONS, run.spent), (Reason.NEGATIVE_CURVATURE, run.negative)
        reason = reasons(converged, Reason.STAGNATED, *causes, (Reason.OUT_OF_RANGE, lost | ~held))
        info = {"residual": residual, "converged": converged, "reason": reason, "approximate": False}
        return InverseHvpResult(X, {**info, **({} if run.n_iter is None else {"n_iter": run.n_iter})})

    def _hint(self, run: _Rounds) -> str:
        if bool(run.negative.any()):
            return (
                "The curvature as bfloat16 has it is indefinite, and so may be the exact one: try autocast=None, "
                f"which tells, or a larger hessian_perturbation. {self.operator.hint}"
            )
        if bool(run.spent.any()):
            return "Try a larger `maxiter`, autocast=None, or a larger hessian_perturbation."
        return (
            "More rounds with bfloat16 products bring these no nearer: try autocast=None, or a larger "
            "hessian_perturbation."
        )


class _Rounds:
    """The rows under way: solutions X, residuals R, and the last directions with their images, orthonormal."""

    def __init__(self, inverse: MixedPrecision, B: torch.Tensor, powers: torch.Tensor) -> None:
        self.inverse, self.A, self.B = inverse, inverse.operator, B
        self.X, self.R = torch.zeros_like(B), B.clone()
        self.atol = torch.ldexp(torch.full((len(B),), inverse.atol, dtype=torch.float64, device=B.device), -powers)
        start = starting_point(inverse.x0, B)
        if start is not None:
            self.X = times_powers(start, -powers)
            self.R = B - self.A.apply(self.X)
        self.goal = torch.maximum(0.9 * inverse.rtol * norms(B), self.atol)
        self.n_iter: torch.Tensor | None = None
        self.negative = torch.zeros(len(B), dtype=torch.bool, device=B.device)
        self.spent = self.negative.clone()
        self.rows = torch.nonzero(norms(self.R) > self.goal)[:, 0]
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def step(self) -> None:
        """Take a round: a rough solution of what is left, its exact image, and the best multiple of it."""
        before = norms(self.R)[self.rows]
        D = self._direction()
        Q = self.A.apply(D)
        for P, image in self.kept:
            along = (Q * image).sum(1, keepdim=True)
            D, Q = D - along * P, Q - along * image
        size = norms(Q)[:, None].to(Q)
        # Of a direction that is zero, or of no number, nothing is taken.
        usable = (size > 0) & torch.isfinite(size) & finite_rows(D)[:, None]
        D, Q = (torch.where(usable, part / torch.where(usable, size, 1.0), 0.0) for part in (D, Q))
        length = (self.R[self.rows] * Q).sum(1, keepdim=True)
        self.X[self.rows] += length * D
        self.R[self.rows] -= length * Q
        after = norms(self.R)[self.rows]
        left = after > self.goal[self.rows]
        self.spent[self.rows] = left & self._all_iterations()
        self._leave(left & (after < FALLS * before) & ~self.spent[self.rows], (D, Q))

    def _direction(self) -> torch.Tensor:
        """Return rough solutions of the residuals, on whose way nothing is told: the rounds are judged."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            D, info = self.inverse.inverse.solve(self.R[self.rows])
        if "n_iter" in info:
            if self.n_iter is None:
                self.n_iter = torch.zeros(len(self.B), dtype=torch.int64, device=self.B.device)
            self.n_iter[self.rows] += info["n_iter"].to(self.n_iter)
        if "reason" in info:
            self.negative[self.rows] |= info["reason"] == int(Reason.NEGATIVE_CURVATURE)
        return D

    def _all_iterations(self) -> torch.Tensor:
        """Return which of the rows under way have taken all iterations that they may."""
        most = self.inverse.maxiter
        if self.n_iter is None or most is None:
            return torch.zeros(len(self.rows), dtype=torch.bool, device=self.rows.device)
        return self.n_iter[self.rows] >= most

    def _leave(self, stay: torch.Tensor, pair: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.rows = self.rows[stay]
        self.kept = [(P[stay], image[stay]) for P, image in [*self.kept, pair][-KEPT:]]
