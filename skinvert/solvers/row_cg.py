"""Conjugate gradients row by row: one batched recurrence, in which every row stops on its own residual."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .._scaling import far_exponents, norms, times_powers
from .krylov import check_finite

__all__ = ["REFRESH", "CGState", "RowRun"]

# Iterations between two recomputations of r: the recurrence drifts in float32.
REFRESH = 50

Products = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class CGState:
    """What a run of conjugate gradients, row-wise or by blocks, knows of its right-hand sides.

    Attributes
    ----------
    rows : tensor of int
        Which are still under way.
    x0, R0 : tensor of shape (k, p) or None
        Where to start, which becomes X, and B − A x there.
    tolerance : tensor of shape (k,), float64
        Of ‖b − Ax‖.
    true : tensor of shape (k,), float64
        ‖b − Ax‖ of each row that has left, recomputed at its last iterate; NaN for the others.
    floor : tensor of shape (k,), float64
        Below it the recurrence has no digit of r left: it is rounding of the residual that it began with.
    n_products : int
        Products of one row with A so far.
    """

    products: Products
    B: torch.Tensor
    x0: torch.Tensor | None
    tolerance: torch.Tensor
    precondition: Products | None = None
    R0: torch.Tensor | None = None
    least_curvature: float = 0.0
    most_curvature: float = 0.0
    steps: int = 0
    n_products: int = 0
    n_iter: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        k = len(self.B)
        self.X = torch.zeros_like(self.B) if self.x0 is None else self.x0
        self.R = self._first_residual()
        self.n_iter = torch.zeros(k, dtype=torch.int64, device=self.B.device)
        self.negative = torch.zeros(k, dtype=torch.bool, device=self.B.device)
        self.stagnated, self.null = self.negative.clone(), self.negative.clone()
        # The true residual at a row's last check: a check that finds no better one has met the dtype's floor.
        self.best = torch.full_like(self.tolerance, torch.inf)
        self.true = torch.full_like(self.tolerance, torch.nan)
        self.rows = torch.arange(k, device=self.B.device)
        size = norms(self.R)
        self.floor = torch.finfo(self.B.dtype).eps * size
        self.leave(size <= self.tolerance, size)

    def _first_residual(self) -> torch.Tensor:
        if self.x0 is None:
            return self.B.clone()
        if self.R0 is None:
            return self.B - self.apply(self.X)
        self.n_products += len(self.B)
        return self.R0.clone()

    @property
    def under_way(self) -> torch.Tensor | slice:
        """The rows under way as an index: while these are all, one that copies nothing."""
        return slice(None) if len(self.rows) == len(self.B) else self.rows

    def claims(self) -> torch.Tensor:
        """Return which of the rows under way the recurrence believes to be done, or can tell no more of."""
        return norms(self.R[self.under_way]) <= torch.maximum(self.tolerance, self.floor)[self.rows]

    def apply(self, V: torch.Tensor) -> torch.Tensor:
        """Return the products with the rows of V, and count them."""
        self.n_products += len(V)
        return self.products(V)

    def preconditioned(self, R: torch.Tensor) -> torch.Tensor:
        """Return M⁻¹ r for each row of R."""
        return R if self.precondition is None else self.precondition(R)

    def check(self, candidate: torch.Tensor) -> torch.Tensor:
        """Recompute r where a row claims to be done, and for all now and then; done is who truly is.

        Returns which of the rows under way take up the true residual, and must restart from it.
        """
        restart = torch.zeros_like(candidate)
        refresh = self.steps % REFRESH == 0
        which = torch.ones_like(candidate) if refresh else candidate
        rows = self.rows[which]
        if not len(rows):
            return restart
        R = self.B[rows] - self.apply(self.X[rows])
        size = norms(R)
        # A drifted recurrence is near the floor too; a new r with the old directions would diverge.
        claims = candidate[which] | (size > 2 * norms(self.R[rows]))
        self.R[rows[claims]] = R[claims]
        done = size <= self.tolerance[rows]
        stuck = self.ends(candidate[which], claims) & ~done & (size > 0.5 * self.best[rows])
        self.best[rows[claims]] = size[claims]
        self.floor[rows[claims]] = torch.finfo(R.dtype).eps * size[claims]
        self.stagnated[rows[stuck]] = True
        restart[which] = claims
        leaving, sizes = torch.zeros_like(candidate), torch.zeros_like(self.tolerance[self.rows])
        leaving[which], sizes[which] = done | stuck, size
        self.leave(leaving, sizes)
        return restart[~leaving]

    def ends(self, candidate: torch.Tensor, drifted: torch.Tensor) -> torch.Tensor:
        """Return which rows have met the dtype's floor if their true residuals are not halved since they last did."""
        return candidate | drifted

    def residual(self) -> torch.Tensor:
        """Return the true relative residuals (k,) of rows that have left as they were found; NaN for the others."""
        size = norms(self.B)
        return self.true / torch.where(size > 0, size, 1.0)

    def leave(self, leaving: torch.Tensor, true: torch.Tensor | None = None) -> None:
        """Take rows out, with the norms of their true residuals where these are known."""
        if true is not None:
            self.true[self.rows[leaving]] = true[leaving]
        self.rows = self.rows[~leaving]


class RowRun(CGState):
    """Each row with its own directions, whose sizes divide out: what overflows ends its own row alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.gauge = torch.zeros(len(self.B), dtype=torch.int64, device=self.B.device)
        if self.precondition is not None:
            # A preconditioner may shorten one row by all that the dtype holds, and lengthen another by as much.
            self.gauge = far_exponents(self.preconditioned(self.R))
        Z, self.rz, _ = self._descent(self.R, slice(None))
        self.P = Z.clone()

    def step(self) -> None:
        """Advance all rows under way by one iteration."""
        powers = far_exponents(self.P[self.rows])
        P = times_powers(self.P[self.rows], -powers)
        AP = self.apply(P)
        curvature, size, image = (P * AP).sum(1, dtype=torch.float64), norms(P).square(), norms(AP).square()
        finite = torch.isfinite(curvature) & torch.isfinite(image)
        if not self.steps and not bool(finite.any()):
            check_finite("cg", AP, self.steps)
        good = self._judge(curvature / size, image / size, finite)
        if not bool(good.all()):
            self.P[self.rows[~good]] = P[~good]
            P, AP, curvature, powers = P[good], AP[good], curvature[good], powers[good]
            self.leave(~good)
        if len(self.rows):
            self._advance(P, AP, curvature, powers)

    def _descent(self, R: torch.Tensor, rows: torch.Tensor | slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return Z = M⁻¹R, rᵀz, and where z = r instead, as rounding has made M indefinite."""
        if self.precondition is None:
            rz = norms(R).square()
            return R, rz, ~(rz > 0)
        Z = times_powers(self.preconditioned(R), -self.gauge[rows])
        powers = far_exponents(Z)
        rz = _times((R * times_powers(Z, -powers)).sum(1, dtype=torch.float64), powers)
        # Not (a ≤ b): NaN compares false.
        plain = ~(rz > 0)
        if bool(plain.any()):
            Z = torch.where(plain[:, None], R, Z)
            rz = torch.where(plain, norms(R).square(), rz)
        return Z, rz, plain

    def _judge(self, quotient: torch.Tensor, image: torch.Tensor, finite: torch.Tensor) -> torch.Tensor:
        """Tell rows that can go on from those that met a null or a negative direction, or what no number holds."""
        self.stagnated[self.rows[~finite]] = True
        quotient = torch.where(finite, quotient, torch.inf)
        self.most_curvature = max(self.most_curvature, float(torch.where(finite, quotient.abs(), 0.0).max()))
        eps = torch.finfo(self.B.dtype).eps * self.most_curvature
        small = quotient <= 10 * eps
        # (Ap)² ≤ |A| pᵀAp where A is positive semi-definite: a vanishing pᵀAp without a vanishing Ap proves it is not.
        null = small & (quotient >= -100 * eps) & (image <= 1e4 * eps * self.most_curvature)
        negative = small & ~null
        if bool(negative.any()):
            self.least_curvature = min(self.least_curvature, float(quotient.min()))
            self.negative[self.rows[negative]] = True
        self.stagnated[self.rows[null]] = self.null[self.rows[null]] = True
        return finite & ~(negative | null)

    def _advance(self, P: torch.Tensor, AP: torch.Tensor, curvature: torch.Tensor, powers: torch.Tensor) -> None:
        """Step along directions p = 2 ** power · P."""
        rows, rz = self.rows, self.rz[self.rows]
        alpha = (_times(rz, -powers) / curvature)[:, None].to(P)
        self.X[rows] += alpha * P
        self.R[rows] -= alpha * AP
        self.steps += 1
        self.n_iter[rows] += 1
        before = self.rows
        restart = self.check(self.claims())
        if len(self.rows) < len(before):
            stays = torch.isin(before, self.rows)
            rz = rz[stays]
        Z, new, plain = self._descent(self.R[self.rows], self.rows)
        beta = torch.where(restart | plain, 0.0, new / rz)
        self.P[self.rows], self.rz[self.rows] = Z + beta[:, None].to(Z) * self.P[self.rows], new


def _times(scalars: torch.Tensor, powers: torch.Tensor) -> torch.Tensor:
    return times_powers(scalars[:, None], powers)[:, 0]
