"""Minimal residuals for indefinite curvatures, on many right-hand sides at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch

from .._progress import progress
from .._scaling import norms
from .._validation import check_shift
from ..operators import LinearOperator
from ..reasons import Reason, reasons
from ..results import InverseHvpResult
from .advice import advise
from .base import InverseOperator, Method, warn_not_converged, warn_of_overflow
from .krylov import (
    Problem,
    check_finite,
    check_settings,
    default_rtol,
    products_with,
    starting_point,
    warn_of_lost,
    within,
)

__all__ = ["MINRES"]

# Steps between two recomputations of r.
REFRESH = 50
# What a tenfold longer x must take off the residual: one part in a hundred, else it is rounding along the null space.
GAIN = 0.01


class MINRES(Method):
    r"""Minimal residuals: x in the Krylov space of b that minimises ‖(A + λI)x − b‖; A + λI may be indefinite.

    One product with A per iteration, for all right-hand sides under way together. Each row has its own Lanczos
    recurrence and stops on its own true residual: where the recurrence claims convergence r is recomputed, and a row
    whose claim was wrong goes on from there. A + λI may be singular: b in its range gives the pseudo-inverse's
    solution; b outside it a least-squares one, its part in the null space arbitrary, flagged ``stagnated`` and never
    ``converged``. Memory: nine arrays of
    the size of b.

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

    References
    ----------
    Paige & Saunders (1975), "Solution of sparse indefinite systems of linear equations", sec. 5 and 6.
    Choi, Paige & Saunders (2011), "MINRES-QLP: a Krylov subspace method for indefinite or singular symmetric systems",
    sec. 2.2 and 3, for singular systems; its QLP factorisation is not used.

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
    memory: ClassVar[str] = "6 k p"
    exactness: ClassVar[str] = "to `rtol`"
    choose_it_for: ClassVar[str] = "A indefinite, p too large for a matrix"
    matrix_free: ClassVar[bool] = True

    @classmethod
    def tight(cls) -> Self:
        """Return it asked for all digits."""
        return cls(rtol=1e-12, maxiter=10_000)

    def __init__(
        self, *, rtol: float | None = None, atol: float = 0.0, maxiter: int | None = None, x0: Any = None
    ) -> None:
        self.rtol, self.atol, self.maxiter, self.x0 = rtol, atol, maxiter, x0

    def invert(self, A: LinearOperator, hessian_perturbation: float, verbose: int = 0) -> InverseOperator:
        """Check the settings; the work is all in ``solve``."""
        shift = check_shift(hessian_perturbation, A.dtype)
        return MINRESInverse(A, shift, *check_settings(self, A), self.x0, verbose)


@dataclass
class MINRESInverse(InverseOperator):
    """(A + λI)⁻¹ by minimal residuals."""

    curvature: LinearOperator
    hessian_perturbation: float
    rtol: float
    atol: float
    maxiter: int
    x0: Any = None
    verbose: int = 0
    keeps_operator: bool = True

    @property
    def tolerance(self) -> float:
        """``rtol``."""
        return self.rtol

    def at(self, hessian_perturbation: float) -> MINRESInverse:
        """Return the inverse at another λ, over the same operator."""
        return replace(self, hessian_perturbation=check_shift(hessian_perturbation, self.dtype)).judged_as(self)

    def scale_free(self) -> Self:
        """Return this inverse without ``atol`` and ``x0``, which are on the scale of b."""
        return replace(self, atol=0.0, x0=None).judged_as(self)

    def solve(self, B: torch.Tensor) -> InverseHvpResult:
        """Return the solutions of each row.

        ``info`` holds ``residual`` (k,), ``converged`` (k,), ``n_iter`` (k,) and ``stagnated`` (k,): the dtype's floor
        was reached above the tolerance, or b has a part outside the range of a singular A + λI.
        """
        problem = Problem.of(self.operator, B, self.atol, starting_point(self.x0, B), products_with(self.operator))
        # A hair less than is asked, so that the judgement, which sums in another order, agrees.
        run = _Run(problem, 0.95 * problem.tolerance(self.rtol))
        for _ in progress(range(self.maxiter), "minimal residuals", self.verbose):
            if not len(run.rows):
                break
            run.step()
        X = run.result()
        residual = problem.residual(X)
        X, lost = problem.back(X, residual)
        held = torch.isfinite(warn_of_overflow("minres", X)).all(1)
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
            "stagnated": stagnated,
        }
        return InverseHvpResult(X, info)

    def _hint(self, stagnated: bool) -> str:
        if not stagnated:
            return advise(self.operator, "a larger `maxiter`", "a larger hessian_perturbation")
        hint = "A + λI is singular with b outside its range, or rounding does not allow less."
        more = " or dtype=torch.float64" if self.dtype == torch.float32 else ""
        return f"{hint} Try a larger hessian_perturbation{more}."


@dataclass
class _Recurrence:
    """Lanczos and the QR factors of its T, of the rows under way: vectors (a, p) and scalars (a,), as in the paper."""

    previous: torch.Tensor
    current: torch.Tensor
    w_before: torch.Tensor
    w: torch.Tensor
    beta_before: torch.Tensor
    beta: torch.Tensor
    dbar: torch.Tensor
    epsilon: torch.Tensor
    phibar: torch.Tensor
    cs: torch.Tensor
    sn: torch.Tensor

    @classmethod
    def of(cls, R: torch.Tensor) -> _Recurrence:
        """Begin with residuals R."""
        beta, none, zero = norms(R), torch.zeros_like(R), torch.zeros(len(R), dtype=torch.float64, device=R.device)
        return cls(none, R, none, none, zero + 1, beta, zero, zero, beta, zero - 1, zero)

    def of_rows(self, rows: torch.Tensor) -> _Recurrence:
        """Return the recurrences of some rows."""
        return _Recurrence(*(value[rows] for value in vars(self).values()))

    def replaced(self, rows: torch.Tensor, other: _Recurrence) -> _Recurrence:
        """Return these with ``other`` in the place of some rows."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return _Recurrence(*(mine.index_put((rows,), new) for mine, new in pairs))


class _Run:
    """One solve: X of every row, and the recurrences of the ``rows`` still under way."""

    def __init__(self, problem: Problem, tolerance: torch.Tensor) -> None:
        B = problem.B
        self.products, self.B, self.tolerance, self.steps = problem.products, B, tolerance, 0
        self.eps, self.least = torch.finfo(B.dtype).eps, default_rtol(B.dtype)
        self.X = torch.zeros_like(B) if problem.X is None else problem.X
        self.state = _Recurrence.of(B.clone() if problem.R is None else problem.R)
        self.n_iter = torch.zeros(len(B), dtype=torch.int64, device=B.device)
        self.stagnated = torch.zeros(len(B), dtype=torch.bool, device=B.device)
        # Per row: the largest column of T so far, which estimates ‖A‖; the best X and its true residual; the best
        # residual when the recurrence was lost last.
        self.norm = torch.zeros_like(tolerance)
        self.best, self.best_size = self.X.clone(), self.state.beta.clone()
        self.last_size = torch.full_like(tolerance, torch.inf)
        # ‖x‖ and ‖r‖ of the last X whose length paid, and ‖r‖ where x was last a least-squares solution.
        self.own_norm, self.own_size = self.last_size.clone(), self.last_size.clone()
        self.least_size = self.last_size.clone()
        # Where the recurrence has nothing more to tell: rounding of what it began with.
        self.floor = self.eps * self.state.beta
        self.rows = torch.arange(len(B), device=B.device)
        self._leave(self.state.beta <= tolerance)

    def step(self) -> None:
        """Advance all rows under way by one iteration."""
        v, alpha, rest, beta = self._lanczos()
        s, rows = self.state, self.rows

        self.norm[rows] = torch.maximum(self.norm[rows], torch.hypot(alpha, beta))
        # The last rotation on the new column of T, then the rotation that clears what is below its diagonal.
        delta, gbar, dbar = s.cs * s.dbar + s.sn * alpha, s.sn * s.dbar - s.cs * alpha, -s.cs * beta
        # ‖Ar‖ / ‖r‖ before this step: where it is rounding, r is in the null space and x a least-squares solution.
        slope = torch.hypot(gbar, dbar)
        null = slope <= 10 * self.eps * self.norm[rows]
        # A least-squares solution to the digits that are left: from here rounding may only lead away.
        least = (slope <= self.least * self.norm[rows]) & (s.phibar <= 0.5 * self.least_size[rows])
        if bool(least.any()):
            self.least_size[rows[least]] = s.phibar[least]
            self._keep(rows[least])
        gamma = torch.where(null, 1.0, torch.hypot(gbar, beta))
        cs, sn = gbar / gamma, beta / gamma

        w = (v - _column(s.epsilon, v) * s.w_before - _column(delta, v) * s.w) / _column(gamma, v)
        self.X[rows] += _column(torch.where(null, 0.0, cs * s.phibar), w) * w
        self.state = _Recurrence(s.current, rest, s.w, w, s.beta, beta, dbar, s.sn * beta, sn * s.phibar, cs, sn)
        if bool(null.any()):
            self.stagnated[rows[null]] = True
            self._keep(rows[null])
            self._leave(null)
        self._check(self.state.phibar <= torch.maximum(self.tolerance, self.floor)[self.rows])

    def result(self) -> torch.Tensor:
        """Return the best X of each row."""
        if len(self.rows):
            self._keep(self.rows)
        return self.best

    def _lanczos(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return v, α, and the next vector with its norm β."""
        s, rows = self.state, self.rows
        self.steps += 1
        self.n_iter[rows] += 1
        v = s.current / _column(s.beta, s.current)
        rest = self.products(v) - _column(s.beta / s.beta_before, s.previous) * s.previous
        alpha = (v * rest).sum(1).to(s.beta)
        rest = rest - _column(alpha / s.beta, rest) * s.current
        beta = norms(rest)
        finite = torch.isfinite(alpha) & torch.isfinite(beta)
        if bool(finite.all()):
            return v, alpha, rest, beta
        # What overflows ends its own row alone, as long as another row has a product.
        if self.steps == 1 and not bool(finite.any()):
            check_finite("minres", rest, self.steps)
        self.stagnated[rows[~finite]] = True
        self._leave(~finite)
        return v[finite], alpha[finite], rest[finite], beta[finite]

    def _check(self, claims: torch.Tensor) -> None:
        """Recompute r where a row claims to be done, and for all now and then; the others go on from their true r."""
        which = torch.ones_like(claims) if self.steps % REFRESH == 0 else claims
        if not bool(which.any()):
            return
        rows = self.rows[which]
        R = self._keep(rows)
        size = norms(R)
        lost = claims[which] | (size > 2 * self.state.phibar[which])
        # Lost twice, with the residual not halved in between: the dtype's floor, or a least-squares solution.
        done, stuck = size <= self.tolerance[rows], lost & (self.best_size[rows] > 0.5 * self.last_size[rows])
        self.last_size[rows[lost]] = self.best_size[rows[lost]]
        self.stagnated[rows[stuck & ~done]] = True
        self._restart(which, lost, R)
        leaving = torch.zeros_like(which)
        leaving[which] = done | stuck
        self._leave(leaving)

    def _keep(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the true r of some rows; X is kept where it is better than the best so far, and not merely longer.

        Near a least-squares solution of a singular system, rounding gives r a part that only a huge x in the null space
        would seem to take away.
        """
        R = self.B[rows] - self.products(self.X[rows])
        size, norm = norms(R), norms(self.X[rows])
        better, decades = size < self.best_size[rows], torch.log10(norm / self.own_norm[rows])
        pays = better & ((GAIN * decades <= 1 - size / self.own_size[rows]) | (size <= self.tolerance[rows]))
        better &= pays | (decades <= 1)
        self.best[rows[better]], self.best_size[rows[better]] = self.X[rows[better]], size[better]
        self.own_norm[rows[pays]], self.own_size[rows[pays]] = norm[pays], size[pays]
        return R

    def _restart(self, which: torch.Tensor, lost: torch.Tensor, R: torch.Tensor) -> None:
        """Begin anew from the true r where the recurrence ended or has drifted from it."""
        where = torch.zeros_like(which)
        where[which] = lost
        self.state = self.state.replaced(where, _Recurrence.of(R[lost]))
        self.floor[self.rows[where]] = self.eps * norms(R[lost])

    def _leave(self, leaving: torch.Tensor) -> None:
        if bool(leaving.any()):
            self.rows, self.state = self.rows[~leaving], self.state.of_rows(~leaving)


def _column(scalars: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return scalars[:, None].to(like)
