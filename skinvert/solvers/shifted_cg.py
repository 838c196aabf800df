"""Conjugate gradients for many λ at once: one Krylov space, from the smallest λ, serves them all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .._check import check_hessian_perturbation
from .._memory import rows_within
from .._progress import progress
from .._scaling import norms
from ..operators import LinearOperator, Shifted
from .krylov import Problem, check_finite

__all__ = ["shifted_cg"]

# Times that an iterate is taken up again from its true residual.
POLISHES = 5


def shifted_cg(
    A: LinearOperator,
    B: torch.Tensor,
    shifts: Iterable[float],
    rtol: float,
    atol: float,
    maxiter: int,
    verbose: int = 0,
) -> tuple[torch.Tensor, dict[str, Any]]:
    r"""Return the solutions of (A + λI) x = b for each λ and each row b, by one run of conjugate gradients.

    The seed is the smallest λ, σ. The residual of every other is a multiple of its own, r_λ = ζ_λ r, with

    ζ⁺/ζ = 1 / (1 + (λ − σ) α + (α β₋ / α₋)(1 − ζ/ζ₋)),  α_λ = α ζ⁺/ζ,  β_λ = β (ζ⁺/ζ)²,

    so that one product with A serves all. A λ is frozen when its residual is small enough, before ζ underflows. Then
    the true residual of each is computed, and those that rounding has left too large are polished: conjugate gradients
    on the correction, each at its own λ. Memory: 2 n_λ k p numbers. Cost: a solve at σ, and a product per λ and row.
    A + σI and each row are brought near one by powers of two: their sizes change no digit.

    Parameters
    ----------
    A : LinearOperator
        Without a shift.
    B : tensor of shape (k, p)
        Right-hand sides.
    shifts : iterable of float
        λ ≥ 0, in any order. A + λI must be positive definite at each.
    rtol, atol : float
        A row has converged when its true ‖(A + λI)x − b‖ ≤ max(rtol ‖b‖, atol).
    maxiter : int
        Most iterations, of the run and of each polish.

    Returns
    -------
    X : tensor of shape (n_λ, k, p)
        The solutions.
    info : dict
        ``residual``, ``converged`` and ``negative_curvature``, each (n_λ, k); ``n_products``: of one row with A.

    References
    ----------
    Jegerlehner (1996), "Krylov space solvers for shifted linear systems", arXiv:hep-lat/9612014, sec. 2.4;
    Frommer & Maass (1999), "Fast CG-based methods for Tikhonov–Phillips regularization", Alg. 3.3.

    Examples
    --------
    >>> from skinvert.operators import DiagonalMatrix
    >>> A, B = DiagonalMatrix(torch.tensor([1.0, 3.0])), torch.tensor([[2.0, 4.0]])
    >>> shifted_cg(A, B, [0.0, 1.0], rtol=1e-5, atol=0.0, maxiter=10)[0]
    tensor([[[2.0000, 1.3333]],
            [[1.0000, 1.0000]]])
    """
    sigma = torch.tensor([check_hessian_perturbation(shift) for shift in shifts], dtype=torch.float64, device="cpu")
    least = float(sigma.min()) if len(sigma) else 0.0
    problem = Problem.of(Shifted(A, least), B, atol)
    path = _Path(problem, (sigma - least).to(B.device), maxiter, verbose)
    tolerance, size = problem.tolerance(rtol), norms(problem.B)
    X = B.new_zeros(len(sigma), *B.shape)
    residual = size.expand(X.shape[:2]).clone()
    negative, open_ = torch.zeros_like(residual, dtype=torch.bool), torch.nonzero(size > tolerance)[:, 0]
    for rows in open_.split(rows_within(max(1, 4 * len(sigma) * A.size * B.element_size()))) if len(sigma) else ():
        found = path.run(problem.B[rows], tolerance[rows])
        X[:, rows], residual[:, rows], negative[:, rows] = path.polish(found, problem.B[rows], tolerance[rows])
    X, lost = problem.back(X, residual)
    converged = (residual <= tolerance) & ~lost
    negative &= ~converged
    relative = torch.where(size > 0, residual / size, residual)
    info = {"residual": relative, "converged": converged, "negative_curvature": negative}
    return X, {**info, "n_products": path.n_products}


@dataclass
class _Path:
    """A + λI at every λ, by what each exceeds the smallest, ``delta`` (n_λ,), float64; the ``problem`` has that one."""

    problem: Problem
    delta: torch.Tensor
    maxiter: int
    verbose: int = 0
    n_products: int = 0

    def products(self, V: torch.Tensor, delta: torch.Tensor | None = None) -> torch.Tensor:
        """Return the scaled A v + λ v, each row with its own λ; None is the smallest."""
        self.n_products += len(V)
        product = self.problem.products(V)
        return product if delta is None else product + self.scaled(delta)[:, None].to(V) * V

    def scaled(self, delta: torch.Tensor) -> torch.Tensor:
        """Return what some λ exceed the smallest, on the scale that the first product has told."""
        with np.errstate(over="ignore"):
            found = np.ldexp(delta.cpu().numpy(), -self.problem.products.exponent)
        return torch.from_numpy(found).to(delta)

    def run(self, B: torch.Tensor, tolerance: torch.Tensor) -> torch.Tensor:
        """Return the iterates (n_λ, k, p) of one run of conjugate gradients from the smallest λ."""
        state = _Shifted(len(self.delta), B, tolerance)
        for step in progress(range(self.maxiter), "conjugate gradients", self.verbose):
            rows = state.rows
            if not len(rows):
                break
            AP = self.products(state.P[rows])
            curvature = (state.P[rows] * AP).sum(1)
            if not step and not bool(torch.isfinite(norms(AP)).any()):
                check_finite("cg", AP, step)
            state.advance(rows, AP, curvature, self.scaled(self.delta)[:, None])
        # A row that overflowed is polished from zero.
        return torch.where(torch.isfinite(state.X).all(2, keepdim=True), state.X, 0.0)

    def polish(
        self, X: torch.Tensor, B: torch.Tensor, tolerance: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Correct what misses its tolerance; return iterates, ‖(A + λI)x − b‖ and where the curvature is negative."""
        residual = torch.empty(X.shape[:2], dtype=torch.float64, device=X.device)
        for each, delta in enumerate(self.delta):
            residual[each] = self._gaps(X[each], B, delta)[1]
        negative = torch.zeros_like(residual, dtype=torch.bool)
        open_ = residual > tolerance
        for _ in range(POLISHES):
            i, j = open_.nonzero(as_tuple=True)
            if not len(i):
                break
            before, x, delta = residual[i, j], X[i, j], self.delta[i]
            R = self._gaps(x, B[j], delta)[0]
            D, negative[i, j] = self._correct(R, delta, tolerance[j])
            after = self._gaps(x + D, B[j], delta)[1]
            better = after < before
            X[i[better], j[better]] = (x + D)[better]
            residual[i, j] = torch.minimum(before, after)
            # A correction that does not halve the residual has met the dtype's floor, or `maxiter`.
            open_[i, j] = (after > tolerance[j]) & (after <= 0.5 * before) & ~negative[i, j]
        return X, residual, negative

    def _gaps(self, X: torch.Tensor, B: torch.Tensor, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        R = B - self.products(X, delta.expand(len(X)))
        size = norms(R)
        return R, torch.where(torch.isfinite(size), size, torch.inf)

    def _correct(
        self, R: torch.Tensor, delta: torch.Tensor, tolerance: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Solve (A + λI) d = r, each row with its own λ; say where negative curvature was met."""
        X, R, P, rr = torch.zeros_like(R), R.clone(), R.clone(), norms(R).square()
        negative, most = torch.zeros(len(R), dtype=torch.bool, device=R.device), 0.0
        rows = torch.arange(len(R), device=R.device)
        for _ in range(self.maxiter):
            # Half of the tolerance: the recurrence may drift by the other half.
            rows = rows[rr[rows].sqrt() > 0.5 * tolerance[rows]]
            if not len(rows):
                break
            AP = self.products(P[rows], delta[rows])
            curvature = (P[rows] * AP).sum(1).to(rr)
            quotient = curvature / norms(P[rows]).square()
            most = max(most, float(torch.where(torch.isfinite(quotient), quotient.abs(), 0.0).max()))
            good = torch.isfinite(quotient) & (quotient > 10 * torch.finfo(R.dtype).eps * most)
            negative[rows] = quotient < -100 * torch.finfo(R.dtype).eps * most
            rows, AP, curvature = rows[good], AP[good], curvature[good]
            alpha = (rr[rows] / curvature)[:, None].to(R)
            X[rows] += alpha * P[rows]
            R[rows] -= alpha * AP
            new = norms(R[rows]).square()
            P[rows] = R[rows] + (new / rr[rows])[:, None].to(R) * P[rows]
            rr[rows] = new
        return X, negative


class _Shifted:
    """The state of a run: the seed's residuals and directions (k, p), and those of every λ (n_λ, k, p)."""

    def __init__(self, count: int, B: torch.Tensor, tolerance: torch.Tensor) -> None:
        self.tolerance = tolerance
        self.R, self.P, self.rr = B.clone(), B.clone(), norms(B).square()
        self.X = B.new_zeros(count, *B.shape)
        self.directions = B.expand_as(self.X).clone()
        # ζ and its last ratio for every λ and row; α and β of the seed's last step.
        self.zeta = torch.ones(self.X.shape[:2], dtype=torch.float64, device=B.device)
        self.ratio = self.zeta.clone()
        self.alpha, self.beta = torch.ones_like(self.rr), torch.zeros_like(self.rr)
        self.most = 0.0
        self.active = (self.rr.sqrt() > tolerance).expand_as(self.zeta).clone()

    @property
    def rows(self) -> torch.Tensor:
        """Rows with a λ under way."""
        return self.active.any(0).nonzero()[:, 0]

    def advance(self, rows: torch.Tensor, AP: torch.Tensor, curvature: torch.Tensor, delta: torch.Tensor) -> None:
        """Take one step of the seed, and the same step for every λ that is not frozen."""
        curvature = curvature.to(self.rr)
        quotient = curvature / norms(self.P[rows]).square()
        finite = torch.isfinite(quotient) & torch.isfinite(norms(AP))
        self.most = max(self.most, float(torch.where(finite, quotient.abs(), 0.0).max()))
        good = finite & (quotient > 10 * torch.finfo(AP.dtype).eps * self.most)
        # A larger λ may still do: what has come so far is polished at its own.
        self.active[:, rows[~good]] = False
        rows, AP = rows[good], AP[good]
        alpha = torch.zeros_like(self.rr).index_put((rows,), self.rr[rows] / curvature[good])
        drag = torch.where(alpha > 0, alpha * self.beta / self.alpha, 0.0)
        ratio = 1 / (1 + delta * alpha + drag * (1 - self.ratio))
        self.R[rows] -= alpha[rows, None].to(AP) * AP
        new = norms(self.R[rows]).square()
        beta = torch.zeros_like(self.rr).index_put((rows,), new / self.rr[rows])
        self.P[rows] = self.R[rows] + beta[rows, None].to(AP) * self.P[rows]
        self.rr[rows] = new
        self._follow(alpha, beta, ratio)
        self.alpha[rows], self.beta = alpha[rows], beta

    def _follow(self, alpha: torch.Tensor, beta: torch.Tensor, ratio: torch.Tensor) -> None:
        """Advance every λ, and freeze those whose residual ζ ‖r‖ is small enough."""
        self.zeta = torch.where(self.active, self.zeta * ratio, self.zeta)
        self.ratio = ratio
        for i in self.active.any(1).nonzero()[:, 0].tolist():
            on = self.active[i].to(alpha)
            P = self.directions[i]
            self.X[i].addcmul_((on * alpha * ratio[i])[:, None].to(P), P)
            P.mul_((on * beta * ratio[i].square())[:, None].to(P)).addcmul_((on * self.zeta[i])[:, None].to(P), self.R)
        self.active &= self.zeta * self.rr.sqrt() > self.tolerance
