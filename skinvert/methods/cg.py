"""Conjugate gradients on many right-hand sides at once, each judged on its own true residual."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning

from .._check import check_choice, check_shift, finite_rows, must_be
from .._progress import progress
from .._scaling import ScaledProducts, norms
from .._telling import warn
from ..operators import LinearOperator
from ..reasons import Reason, reasons
from ..results import InverseHvpResult
from ..solvers.block_cg import LEAST_ROWS, BlockRun
from ..solvers.extremes import smallest_eigenvalue
from ..solvers.krylov import Problem, check_settings, products_with, starting_point, warn_of_lost, within
from ..solvers.row_cg import CGState, RowRun
from ..solvers.shifted_cg import shifted_cg
from .advice import advise, direct_fits
from .base import InverseOperator, Method, warn_not_converged, warn_of_overflow
from .preconditioners import as_preconditioner, rough_inverse

__all__ = ["CG"]


class CG(Method):
    r"""Conjugate gradients: matrix-free, one product with A per iteration for all right-hand sides together.

    A + λI must be positive definite. A direction of negative curvature stops its row, which is never reported as
    converged; the warning names a λ that would do. Memory: four arrays of the size of b.

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
    start : {"jacobi", "nystroem", "kfac", "ekfac"} or Method, default=None
        A method whose approximate solution is where to start, in place of ``x0``; it need not be positive definite.
        Made once, in ``fit``. Each row takes its best multiple of at most 1, which is never worse than zero in the norm
        of A, and costs one product.
    preconditioner : {"jacobi", "nystroem", "kfac", "ekfac"} or Method, default=None
        A method whose (positive definite) approximate inverse of A + λI preconditions; made once, in ``fit``.
    block : bool, default=None
        Whether all rows share their directions (block conjugate gradients). None does so for k ≥ 8 rows of p > 256:
        256 rows of an MLP then take 4 iterations instead of 20. Fewer products, and O(p k²) arithmetic beside them.

    References
    ----------
    Hestenes & Stiefel (1952), "Methods of conjugate gradients for solving linear systems", sec. 3;
    Ji & Li (2017), "A breakdown-free block conjugate gradient method", Alg. 2.

    Examples
    --------
    >>> from skinvert.operators import DiagonalMatrix
    >>> inverse = CG().invert(DiagonalMatrix(torch.tensor([1.0, 3.0])), 1.0)
    >>> x, info = inverse.solve(torch.tensor([[2.0, 2.0]]))
    >>> x, info["converged"], info["n_iter"]
    (tensor([[1.0000, 0.5000]]), tensor([True]), tensor([2]))
    """

    name: ClassVar[str] = "cg"
    cost: ClassVar[str] = "one product per iteration, shared by all rows"
    memory: ClassVar[str] = "4 k p"
    exactness: ClassVar[str] = "to `rtol`"
    choose_it_for: ClassVar[str] = "p too large for a matrix, A positive definite"
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
        start: Any = None,
        preconditioner: Any = None,
        block: bool | None = None,
    ) -> None:
        self.rtol, self.atol, self.maxiter, self.x0, self.start = rtol, atol, maxiter, x0, start
        self.preconditioner, self.block = preconditioner, block

    def invert(self, A: LinearOperator, hessian_perturbation: float, verbose: int = 0) -> InverseOperator:
        """Check the settings, make the preconditioner and what finds a start; the rest of the work is in ``solve``."""
        rtol, atol, maxiter = check_settings(self, A)
        check_choice(self.block, "The 'block' parameter of CG", [None, True, False])
        if self.start is not None and self.x0 is not None:
            raise _two_starts(self.start)
        M = as_preconditioner(self.preconditioner, A, hessian_perturbation, verbose)
        with _quiet():
            start = rough_inverse(self.start, "start", A, hessian_perturbation, verbose)
        shift = check_shift(hessian_perturbation, A.dtype)
        return CGInverse(A, shift, rtol, atol, maxiter, self.x0, M, self.block, verbose, start)


@dataclass
class CGInverse(InverseOperator):
    """(A + λI)⁻¹ by conjugate gradients."""

    curvature: LinearOperator
    hessian_perturbation: float
    rtol: float
    atol: float
    maxiter: int
    x0: Any = None
    preconditioner: InverseOperator | None = None
    block: bool | None = None
    verbose: int = 0
    start: InverseOperator | None = None
    keeps_operator: bool = True

    @property
    def tolerance(self) -> float:
        """``rtol``."""
        return self.rtol

    def at(self, hessian_perturbation: float) -> CGInverse:
        """Return the inverse at another λ, over the same operator and the same λ-free preconditioner and start."""
        shift = check_shift(hessian_perturbation, self.dtype)
        M = None if self.preconditioner is None else self.preconditioner.at(shift)
        with _quiet():
            start = None if self.start is None else self.start.at(shift)
        return replace(self, hessian_perturbation=shift, preconditioner=M, start=start).judged_as(self)

    def started_at(self, x0: torch.Tensor) -> Self:
        """Return this inverse with ``x0`` (k, p) in place of its own."""
        if self.start is not None:
            raise _two_starts(self.start.name)
        return replace(self, x0=x0).judged_as(self)

    def scale_free(self) -> Self:
        """Return this inverse without ``atol`` and ``x0``, which are on the scale of b."""
        start = None if self.start is None else self.start.scale_free()
        return replace(self, atol=0.0, x0=None, start=start).judged_as(self)

    def roughly(self, rtol: float, maxiter: int) -> Self:
        """Return this inverse with iterations that stop at ``rtol``, or after ``maxiter``, where they do not before."""
        return replace(self, rtol=max(self.rtol, rtol), maxiter=min(self.maxiter, maxiter)).judged_as(self)

    def solve(self, B: torch.Tensor) -> InverseHvpResult:
        """Return the solutions of each row.

        ``info`` holds ``residual`` (k,), ``converged`` (k,), ``reason`` (k,), ``n_iter`` (k,) and ``n_products``:
        products of one row with A.
        """
        problem = Problem.of(self.operator, B, self.atol, starting_point(self.x0, B), products_with(self.operator))
        if self.start is not None:
            with _quiet():
                rough = self.start.apply(problem.B)
            problem.start_towards(rough)
        run = self._run(problem)
        if self.operator.is_psd:
            # It has no negative curvature: what looked like it is rounding.
            run.stagnated |= run.negative
            run.negative[:] = False
        X = self._without_null_part(run, problem) if bool(run.null.any()) else run.X
        residual = self._residual(run, problem, X)
        X, lost = problem.back(X, residual)
        converged = within(residual, problem.B, self.rtol, problem.atol) & ~run.negative & ~lost
        held = finite_rows(warn_of_overflow("cg", X))
        self._warn(run, residual, converged, problem, lost, held)
        info = {
            "residual": residual,
            "converged": converged,
            "reason": reasons(
                converged,
                Reason.MAX_ITERATIONS,
                (Reason.STAGNATED, run.stagnated),
                (Reason.SINGULAR, run.null),
                (Reason.OUT_OF_RANGE, lost | ~held),
                (Reason.NEGATIVE_CURVATURE, run.negative),
            ),
            "n_iter": run.n_iter,
            "n_products": run.n_products,
            "approximate": False,
        }
        return InverseHvpResult(X, info)

    def solve_path(self, B: torch.Tensor, hessian_perturbations: Iterable[float]) -> list[InverseHvpResult]:
        """Return the result at every λ: by one Krylov run without a preconditioner and a start, else one by one.

        The ``info`` of one run is ``residual``, ``converged`` and ``reason``, each (k,), and ``n_products``, of all λ
        together. A λ at which a row has not converged is solved again by ``solve``, and judged and warned of as there.
        """
        if self.preconditioner is not None or self.x0 is not None or self.start is not None:
            each = progress(list(hessian_perturbations), "path", self.verbose)
            return [self.at(shift).solve(B) for shift in each]
        shifts = list(hessian_perturbations)
        X, info = shifted_cg(self.curvature, B, shifts, self.rtol, self.atol, self.maxiter, self.verbose)
        whole = {"n_products": info["n_products"], "approximate": False}
        results = []
        for x, residual, converged, shift in zip(X, info["residual"], info["converged"], shifts, strict=True):
            if bool(converged.all()):
                own = {"residual": residual, "converged": converged, "reason": reasons(converged, Reason.STAGNATED)}
                results.append(InverseHvpResult(x, own | whole))
            else:
                results.append(self.at(shift).solve(B))
        return results

    def _run(self, problem: Problem) -> CGState:
        B, M = problem.B, self.preconditioner
        # The size of M divides out as that of A does.
        precondition = None if M is None else ScaledProducts(M.precondition, B.dtype)
        start = None if problem.X is None else problem.X.clone()
        args = (problem.products, B, start, problem.tolerance(self.rtol), precondition, problem.R)
        block = len(B) >= LEAST_ROWS and self.size > 256 if self.block is None else self.block
        run = BlockRun(*args) if block else RowRun(*args)
        for _ in progress(range(self.maxiter), "conjugate gradients", self.verbose):
            if not len(run.rows):
                break
            if isinstance(run, BlockRun) and run.odd:
                return self._row_by_row(run)
            run.step()
        return run

    def _row_by_row(self, run: BlockRun) -> CGState:
        """Go on from a block's iterates with rows of their own, which tell who met a null or negative direction."""
        start = torch.where(torch.isfinite(run.X).all(1, keepdim=True), run.X, 0.0)
        args = (run.products, run.B, start, run.tolerance, run.precondition)
        rest = RowRun(*args)
        rest.n_iter, rest.steps, rest.n_products = run.n_iter, run.steps, rest.n_products + run.n_products
        while len(rest.rows) and rest.steps < self.maxiter:
            rest.step()
        return rest

    def _without_null_part(self, run: CGState, problem: Problem) -> torch.Tensor:
        """Solve again without b's part along the null direction that a row met: the pseudo-inverse's solution."""
        X, rows, last, start = run.X, torch.nonzero(run.null)[:, 0], run, problem.X
        # The direction met is null to rounding, so what a first pass leaves, a second removes.
        for _ in range(3):
            met = last.null
            V = last.P[met]  # type: ignore[attr-defined]
            V = V / norms(V)[:, None].to(V)
            inside = last.B[met] - (last.B[met] * V).sum(1, keepdim=True) * V
            args = (run.products, inside, None if start is None else start[rows].clone(), run.tolerance[rows])
            last, left = RowRun(*args, run.precondition), self.maxiter - run.n_iter[rows]
            while len(last.rows):
                last.leave(last.n_iter[last.rows] >= left[last.rows])
                if len(last.rows):
                    last.step()
            # A row that had no iteration left keeps what it has.
            X[rows[left > 0]] = last.X[left > 0]
            # Of b less its null part; the residual of b itself is computed anew.
            run.true[rows] = torch.nan
            run.n_iter[rows] += last.n_iter
            run.n_products += last.n_products
            run.negative[rows] |= last.negative
            rows = rows[last.null]
            if not len(rows):
                break
        return X

    def _residual(self, run: CGState, problem: Problem, X: torch.Tensor) -> torch.Tensor:
        """Return the true relative residuals: those known from a row's last check, and the rest computed."""
        residual = run.residual()
        unknown = residual.isnan()
        if bool(unknown.any()):
            residual[unknown] = problem.residual(X, unknown)
        return residual

    def _warn(
        self,
        run: CGState,
        residual: torch.Tensor,
        converged: torch.Tensor,
        problem: Problem,
        lost: torch.Tensor,
        held: torch.Tensor,
    ) -> None:
        if bool(run.negative.any()):
            warn(self._indefinite(run, problem), ConvergenceWarning)
        warn_of_lost("cg", lost, problem.B.dtype)
        rest = ~run.negative & ~lost & held
        if bool((run.stagnated & ~converged)[rest].any()):
            hint = "Rounding does not allow less."
            if bool(run.null.any()):
                hint = (
                    "A + λI is singular to rounding and their part outside its range is left out: a larger λ keeps it."
                )
            hint += " Try dtype=torch.float64." if self.dtype == torch.float32 else " Try a larger λ or rtol."
        else:
            ways = ["dtype=torch.float64"] if self.dtype == torch.float32 else []
            hint = advise(self.operator, *ways, "a larger `maxiter`", "a larger hessian_perturbation")
        warn_not_converged("cg", residual[rest], converged[rest], self.rtol, hint)

    def _indefinite(self, run: CGState, problem: Problem) -> str:
        theta, error = smallest_eigenvalue(self.operator)
        known = np.isfinite(error)
        # A Rayleigh quotient bounds the smallest eigenvalue from above.
        theta = min(theta, math.ldexp(run.least_curvature, problem.products.exponent))
        error = error if known else 0.0
        lowest = theta - self.hessian_perturbation
        say = "" if known else " (not converged: λ may have to be larger)"
        need = f"hessian_perturbation must be > {-lowest:.3g} for cg here"
        met = f"{int(run.negative.sum())} of {len(run.negative)} right-hand sides met it and stopped"
        direct = ' or "direct"' if direct_fits(self.operator) else ""
        hint = f"Try hessian_perturbation={1.5 * (abs(lowest) + error):.6g}, or"
        hint += f' method="minres"{direct}. {self.operator.hint}'
        return f"{need}: the curvature has eigenvalue {lowest:.3g}{say}, and {met}. {hint}"


def _two_starts(start: object) -> ValueError:
    return ValueError(must_be("x0", f"None beside start={start!r}", "both", "Leave out one of them."))


@contextmanager
def _quiet() -> Iterator[None]:
    """Take no warning of a start: where it leads to is judged by its residual, and is no solution yet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
