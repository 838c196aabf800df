"""Minimal residuals: the recurrences of Paige & Saunders, for many rows at once, each judged on its true residual."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .._scaling import norms
from .krylov import Problem, check_finite, default_rtol

__all__ = ["MINRESRun", "pays"]

# Steps between two recomputations of r.
REFRESH = 50
# What a tenfold longer x must take off the residual: one part in a hundred, else it is rounding along the null space.
GAIN = 0.01


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


class MINRESRun:
    """One solve: X of every row, and the recurrences of the ``rows`` still under way."""

    def __init__(self, problem: Problem, tolerance: torch.Tensor) -> None:
        B = problem.B
        self.products, self.B, self.tolerance, self.steps, self.n_products = problem.products, B, tolerance, 0, 0
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
        # Whether X was looked at since it last changed.
        self.known = torch.ones_like(self.stagnated)
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
        self.known[rows] = False
        self.state = _Recurrence(s.current, rest, s.w, w, s.beta, beta, dbar, s.sn * beta, sn * s.phibar, cs, sn)
        if bool(null.any()):
            self.stagnated[rows[null]] = True
            self._keep(rows[null])
            self._leave(null)
        self._check(self.state.phibar <= torch.maximum(self.tolerance, self.floor)[self.rows])

    def apply(self, V: torch.Tensor) -> torch.Tensor:
        """Return the products with the rows of V, and count them."""
        self.n_products += len(V)
        return self.products(V)

    def result(self) -> torch.Tensor:
        """Return the best X of each row."""
        rows = self.rows[~self.known[self.rows]]
        if len(rows):
            self._keep(rows)
        return self.best

    def residual(self) -> torch.Tensor:
        """Return the true residuals of the best X, as each was looked at: ‖Ax − b‖ / ‖b‖ (k,), of b = 0 ‖Ax‖."""
        size = norms(self.B)
        return torch.where(size > 0, self.best_size / size, self.best_size)

    def _lanczos(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return v, α, and the next vector with its norm β."""
        s, rows = self.state, self.rows
        self.steps += 1
        self.n_iter[rows] += 1
        v = s.current / _column(s.beta, s.current)
        rest = self.apply(v) - _column(s.beta / s.beta_before, s.previous) * s.previous
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
        R = self.B[rows] - self.apply(self.X[rows])
        self.known[rows] = True
        size, norm = norms(R), norms(self.X[rows])
        better, decades = size < self.best_size[rows], torch.log10(norm / self.own_norm[rows])
        paid = better & (pays(decades, size, self.own_size[rows]) | (size <= self.tolerance[rows]))
        better &= paid | (decades <= 1)
        self.best[rows[better]], self.best_size[rows[better]] = self.X[rows[better]], size[better]
        self.own_norm[rows[paid]], self.own_size[rows[paid]] = norm[paid], size[paid]
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


def pays(decades: torch.Tensor, size: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """Return which x, so many decades longer, take enough off a residual of size ``before``."""
    return GAIN * decades <= 1 - size / before


def _column(scalars: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return scalars[:, None].to(like)
