"""Minimal residuals for indefinite curvatures, on many right-hand sides at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch

from .._check import check_choice, check_shift, finite_rows
from .._progress import progress
from ..operators import LinearOperator
from ..reasons import Reason, reasons
from ..results import InverseHvpResult
from ..solvers.block_cg import LEAST_ROWS
from ..solvers.block_minres import BlockMINRESRun
from ..solvers.krylov import Problem, check_settings, products_with, starting_point, warn_of_lost, within
from ..solvers.minres import MINRESRun
from .advice import advise
from .base import InverseOperator, Method, warn_not_converged, warn_of_overflow

__all__ = ["MINRES"]


class MINRES(Method):
    r"""Minimal residuals: x in the Krylov space of b that minimises ‖(A + λI)x − b‖; A + λI may be indefinite.

    One product with A per iteration, for all right-hand sides under way together. Each row stops on its own true
    residual: where the recurrence claims convergence r is recomputed, and a row whose claim was wrong goes on from
    there. A + λI may be singular: b in its range gives the pseudo-inverse's solution; b outside it a least-squares one,
    its part in the null space arbitrary, whose reason is STAGNATED. Memory: nine arrays of the size of b, each row with
    its own Lanczos recurrence; in the block form ten, and two rows of p for each direction that is kept: up to 1,024
    of them, as scikit-learn's ``working_memory`` allows.

    Parameters
    ----------
    rtol : float, default=None
        A row has converged when its true ‖Ax − b‖ ≤ max(rtol ‖b‖, atol). None is 1e-5 in float32, 1e-8 in float64.
    atol : float, default=0.0
        Absolute tolerance.
    maxiter : int, default=None
        Most iterations of a row. None is 10·p, at most 1,000.
    x0 : array or tensor of shape (k, p) or (1, p), default=None
        Where to start; copied, never written to. None is zero.
    block : bool, default=None
        Whether the least residual of each row is over the Krylov space of all rows. None does so for k ≥ 8 rows of
        p > 256. Fewer products, and O(p k) arithmetic for each direction kept, beside them.

    References
    ----------
    Paige & Saunders (1975), "Solution of sparse indefinite systems of linear equations", sec. 5 and 6.
    Choi, Paige & Saunders (2011), "MINRES-QLP: a Krylov subspace method for indefinite or singular symmetric systems",
    sec. 2.2 and 3, for singular systems; its QLP factorisation is not used.
    O'Leary (1980), "The block conjugate gradient algorithm and related methods", sec. 4, and Jiránek & Rozložník
    (2010), "Adaptive version of simpler GMRES", sec. 2, for the block form.

    Examples
    --------
    >>> from skinvert.operators import DiagonalMatrix
    >>> inverse = MINRES().invert(DiagonalMatrix(torch.tensor([1.0, -3.0])), 1.0)
    >>> x, info = inverse.solve(torch.tensor([[2.0, 2.0]]))
    >>> x, info["converged"], info["n_iter"]
    (tensor([[ 1.0000, -1.0000]]), tensor([True]), tensor([2]))
    """

    name: ClassVar[str] = "minres"
    cost: ClassVar[str] = "one product per iteration, shared by all rows"
    memory: ClassVar[str] = "9 k p; block: 10 k p, and 2 p a direction kept"
    exactness: ClassVar[str] = "to `rtol`"
    choose_it_for: ClassVar[str] = "A indefinite, p too large for a matrix"
    keeps_operator: ClassVar[bool] = True

    @classmethod
    def tight(cls) -> Self:
        """Return it asked for all digits."""
        return cls(rtol=1e-12, maxiter=10_000)

    def __init__(
        self,
        *,
        rtol: float | None = None,
        atol: float = 0.0,
        maxiter: int | None = None,
        x0: Any = None,
        block: bool | None = None,
    ) -> None:
        self.rtol, self.atol, self.maxiter, self.x0, self.block = rtol, atol, maxiter, x0, block

    def invert(self, A: LinearOperator, hessian_perturbation: float, verbose: int = 0) -> InverseOperator:
        """Check the settings; the work is all in ``solve``."""
        settings = check_settings(self, A)
        check_choice(self.block, "The 'block' parameter of MINRES", [None, True, False])
        return MINRESInverse(A, check_shift(hessian_perturbation, A.dtype), *settings, self.x0, self.block, verbose)


@dataclass
class MINRESInverse(InverseOperator):
    """(A + λI)⁻¹ by minimal residuals."""

    curvature: LinearOperator
    hessian_perturbation: float
    rtol: float
    atol: float
    maxiter: int
    x0: Any = None
    block: bool | None = None
    verbose: int = 0
    keeps_operator: bool = True

    @property
    def tolerance(self) -> float:
        """``rtol``."""
        return self.rtol

    def at(self, hessian_perturbation: float) -> MINRESInverse:
        """Return the inverse at another λ, over the same operator."""
        return replace(self, hessian_perturbation=check_shift(hessian_perturbation, self.dtype)).judged_as(self)

    def started_at(self, x0: torch.Tensor) -> Self:
        """Return this inverse with ``x0`` (k, p) in place of its own."""
        return replace(self, x0=x0).judged_as(self)

    def scale_free(self) -> Self:
        """Return this inverse without ``atol`` and ``x0``, which are on the scale of b."""
        return replace(self, atol=0.0, x0=None).judged_as(self)

    def roughly(self, rtol: float, maxiter: int) -> Self:
        """Return this inverse with iterations that stop at ``rtol``, or after ``maxiter``, where they do not before."""
        return replace(self, rtol=max(self.rtol, rtol), maxiter=min(self.maxiter, maxiter)).judged_as(self)

    def solve(self, B: torch.Tensor) -> InverseHvpResult:
        """Return the solutions of each row.

        ``info`` holds ``residual`` (k,), ``converged`` (k,), ``n_iter`` (k,), ``n_products``, of one row with A, and
        ``reason`` (k,), STAGNATED where the dtype's floor was reached above the tolerance, or b has a part outside the
        range of a singular A + λI.
        """
        problem = Problem.of(self.operator, B, self.atol, starting_point(self.x0, B), products_with(self.operator))
        block = len(B) >= LEAST_ROWS and self.size > 256 if self.block is None else self.block
        run = self._block_run(problem) if block else self._row_run(problem)
        X, residual = run.result(), run.residual()
        unknown = residual.isnan()
        if bool(unknown.any()):
            residual[unknown] = problem.residual(X, unknown)
        if problem.X is None:
            # Of a space that rounding has spoilt: x = 0 is nearer.
            worse = torch.isfinite(residual) & (residual > 1)
            X, residual = torch.where(worse[:, None], 0.0, X), torch.where(worse, 1.0, residual)
        X, lost = problem.back(X, residual)
        held = finite_rows(warn_of_overflow("minres", X))
        converged = within(residual, problem.B, self.rtol, problem.atol)
        stagnated = run.stagnated & ~converged
        hint = self._hint(bool(stagnated.any()))
        warn_not_converged("minres", residual[held], converged[held], self.rtol, hint)
        warn_of_lost("minres", lost, B.dtype)
        converged &= ~lost
        info = {
            "residual": residual,
            "converged": converged,
            "reason": reasons(
                converged, Reason.MAX_ITERATIONS, (Reason.STAGNATED, stagnated), (Reason.OUT_OF_RANGE, lost | ~held)
            ),
            "n_iter": run.n_iter,
            "n_products": run.n_products,
            "approximate": False,
        }
        return InverseHvpResult(X, info)

    def _block_run(self, problem: Problem) -> BlockMINRESRun | MINRESRun:
        start = None if problem.X is None else problem.X.clone()
        run = BlockMINRESRun(problem.products, problem.B, start, self._goal(problem), None, problem.R)
        for _ in progress(range(self.maxiter), "minimal residuals", self.verbose):
            if not len(run.rows):
                break
            run.step()
            if run.odd:
                return self._row_by_row(run, problem)
        return run

    def _row_by_row(self, block: BlockMINRESRun, problem: Problem) -> MINRESRun:
        """Go on from a block's iterates with rows of their own: what overflows ends its own row alone."""
        moved = block.X.any(1) & finite_rows(block.X) & finite_rows(block.R)
        X, R = torch.where(moved[:, None], block.X, 0.0), problem.B.clone()
        if bool(moved.any()):
            R[moved] -= block.apply(X[moved])
        run = self._row_run(replace(problem, X=X, R=R), self.maxiter - block.steps)
        run.n_iter += block.n_iter
        run.n_products += block.n_products
        return run

    def _row_run(self, problem: Problem, maxiter: int | None = None) -> MINRESRun:
        run = MINRESRun(problem, self._goal(problem))
        for _ in progress(range(self.maxiter if maxiter is None else maxiter), "minimal residuals", self.verbose):
            if not len(run.rows):
                break
            run.step()
        return run

    def _goal(self, problem: Problem) -> torch.Tensor:
        """Return a hair less than is asked, so that the judgement, which may sum in another order, agrees."""
        return 0.95 * problem.tolerance(self.rtol)

    def _hint(self, stagnated: bool) -> str:
        if not stagnated:
            return advise(self.operator, "a larger `maxiter`", "a larger hessian_perturbation")
        hint = "A + λI is singular with b outside its range, or rounding does not allow less."
        more = " or dtype=torch.float64" if self.dtype == torch.float32 else ""
        return f"{hint} Try a larger hessian_perturbation{more}."
