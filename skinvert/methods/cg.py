"""Conjugate gradients on many right-hand sides at once, each judged on its own true residual."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning

from .._progress import progress
from .._validation import check_number, must_be, to_plain_array
from ..operators import LinearOperator, Shifted
from ..results import InverseHvpResult
from .base import InverseOperator, Method, relative_residual, shifted, warn_not_converged
from .spectrum import smallest_eigenvalue

__all__ = ["CG"]

# Products between two recomputations of r: the recurrence drifts in float32.
REFRESH = 50


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

    References
    ----------
    Hestenes & Stiefel (1952), "Methods of conjugate gradients for solving linear systems", sec. 3.

    Examples
    --------
    >>> from skinvert.operators import Diagonal
    >>> inverse = CG().invert(Diagonal(torch.tensor([1.0, 3.0])), 1.0)
    >>> x, info = inverse.solve(torch.tensor([[2.0, 2.0]]))
    >>> x, info["converged"], info["n_iter"]
    (tensor([[1.0000, 0.5000]]), tensor([True]), tensor([2]))
    """

    name: ClassVar[str] = "cg"

    def __init__(
        self, *, rtol: float | None = None, atol: float = 0.0, maxiter: int | None = None, x0: Any = None
    ) -> None:
        self.rtol, self.atol, self.maxiter, self.x0 = rtol, atol, maxiter, x0

    def invert(self, A: LinearOperator, hessian_perturbation: float, verbose: int = 0) -> InverseOperator:
        """Check the settings; the work is all in ``solve``."""
        rtol = default_rtol(A.dtype) if self.rtol is None else self.rtol
        rtol = check_number(rtol, "rtol", owner="CG", low=0.0)
        atol = check_number(self.atol, "atol", owner="CG", low=0.0)
        maxiter = min(10 * A.size, 1000) if self.maxiter is None else self.maxiter
        maxiter = check_number(maxiter, "maxiter", owner="CG", low=1, integer=True)
        return CGInverse(shifted(A, hessian_perturbation), rtol, atol, maxiter, self.x0, verbose)


def default_rtol(dtype: torch.dtype) -> float:
    """Return the relative tolerance of the iterative methods: 1e-5 in float32, 1e-8 in float64."""
    return 1e-5 if dtype == torch.float32 else 1e-8


@dataclass
class CGInverse(InverseOperator):
    """(A + λI)⁻¹ by conjugate gradients."""

    operator: Shifted
    rtol: float
    atol: float
    maxiter: int
    x0: Any = None
    verbose: int = 0
    keeps_operator: bool = True

    def at(self, hessian_perturbation: float) -> CGInverse:
        """Return the inverse at another λ, over the same operator."""
        operator = shifted(self.operator.operator, hessian_perturbation)
        return CGInverse(operator, self.rtol, self.atol, self.maxiter, self.x0, self.verbose)

    def solve(self, B: torch.Tensor) -> InverseHvpResult:
        """Return the solutions of each row.

        ``info`` holds ``residual`` (k,), ``converged`` (k,), ``n_iter`` (k,), ``stagnated`` (k,): the dtype's floor was
        reached above the tolerance, and ``negative_curvature`` (k,): A is not positive definite.
        """
        run = self._run(B, self._start(B))
        X = self._without_null_part(run) if bool(run.null.any()) else run.X
        residual = relative_residual(self.operator, B, X)
        size = B.norm(dim=1).to(residual)
        # A row of zeros has its absolute residual in `residual`.
        goal = torch.where(size > 0, run.tolerance.to(residual) / size.clamp(min=1e-300), self.atol)
        converged = (residual <= goal) & ~run.negative
        self._warn(run, residual, converged)
        info = {
            "residual": residual,
            "converged": converged,
            "n_iter": run.n_iter,
            "stagnated": run.stagnated & ~converged,
            "negative_curvature": run.negative,
        }
        return InverseHvpResult(X, info)

    def _run(self, B: torch.Tensor, x0: torch.Tensor | None) -> _Run:
        run = _Run(self._products(), B, x0, torch.clamp(self.rtol * B.norm(dim=1), min=self.atol))
        for _ in progress(range(self.maxiter), "conjugate gradients", self.verbose):
            if not len(run.rows):
                break
            run.step()
        return run

    def _without_null_part(self, run: _Run) -> torch.Tensor:
        """Solve again without b's part along the null direction that a row met: the pseudo-inverse's solution."""
        X, rows, last, start = run.X, torch.nonzero(run.null)[:, 0], run, self._start(run.B)
        # The direction met is null to rounding, so what a first pass leaves, a second removes.
        for _ in range(3):
            met = last.null
            V = torch.nn.functional.normalize(last.P[met], dim=1)
            inside = last.B[met] - (last.B[met] * V).sum(1, keepdim=True) * V
            last = self._run(inside, None if start is None else start[rows].clone())
            X[rows] = last.X
            run.n_iter[rows] += last.n_iter
            run.negative[rows] |= last.negative
            rows = rows[last.null]
            if not len(rows):
                break
        return X

    def _products(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Products with A + λI: over SciPy's LinearOperator on the CPU, in torch on an accelerator."""
        if self.device.type != "cpu":
            return self.operator.apply
        operator = self.operator.aslinearoperator()
        return lambda V: torch.from_numpy(np.ascontiguousarray(operator.matmat(V.numpy().T).T))

    def _start(self, B: torch.Tensor) -> torch.Tensor | None:
        if self.x0 is None:
            return None
        x0 = self.x0 if isinstance(self.x0, torch.Tensor) else torch.from_numpy(to_plain_array(self.x0, "x0").copy())
        x0 = x0.detach().to(B)
        x0 = x0[None] if x0.ndim == 1 else x0
        if x0.shape not in (B.shape, (1, B.shape[1])):
            raise ValueError(must_be("x0", f"of shape {tuple(B.shape)} or (1, p)", f"shape {tuple(x0.shape)}"))
        if not bool(torch.isfinite(x0).all()):
            raise ValueError(must_be("x0", "finite", "NaN or infinity"))
        return x0.expand(B.shape).clone()

    def _warn(self, run: _Run, residual: torch.Tensor, converged: torch.Tensor) -> None:
        if bool(run.negative.any()):
            warnings.warn(self._indefinite(run), ConvergenceWarning, stacklevel=3)
        rest = ~run.negative
        if bool((run.stagnated & ~converged)[rest].any()):
            hint = "Rounding does not allow less."
            if bool(run.null.any()):
                hint = "A is singular to rounding and their part outside its range is left out: λ > 0 would keep it."
            hint += " Try dtype=torch.float64." if self.dtype == torch.float32 else " Try a larger λ or rtol."
        else:
            hint = 'Try a larger `maxiter`, a larger hessian_perturbation, or method="direct".'
        warn_not_converged("cg", residual[rest], converged[rest], self.rtol, hint)

    def _indefinite(self, run: _Run) -> str:
        theta, error = smallest_eigenvalue(self.operator)
        known = np.isfinite(error)
        # A Rayleigh quotient bounds the smallest eigenvalue from above.
        theta = min(theta, run.least_curvature)
        error = error if known else 0.0
        lowest = theta - self.operator.shift
        say = "" if known else " (not converged: λ may have to be larger)"
        need = f"hessian_perturbation must be > {-lowest:.3g} for cg here"
        met = f"{int(run.negative.sum())} of {len(run.negative)} right-hand sides met it and stopped"
        hint = f'Try hessian_perturbation={1.5 * (abs(lowest) + error):.6g}, or method="direct". {self.operator.hint}'
        return f"{need}: the curvature has eigenvalue {lowest:.3g}{say}, and {met}. {hint}"


@dataclass
class _Run:
    """One solve: the state of every row, of which ``rows`` are still under way."""

    products: Callable[[torch.Tensor], torch.Tensor]
    B: torch.Tensor
    x0: torch.Tensor | None
    tolerance: torch.Tensor
    least_curvature: float = 0.0
    most_curvature: float = 0.0
    steps: int = 0
    n_iter: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        k = len(self.B)
        self.X = torch.zeros_like(self.B) if self.x0 is None else self.x0
        self.R = self.B.clone() if self.x0 is None else self.B - self.products(self.X)
        self.P, self.rr = self.R.clone(), self.R.square().sum(1)
        self.n_iter = torch.zeros(k, dtype=torch.int64, device=self.B.device)
        self.negative = torch.zeros(k, dtype=torch.bool, device=self.B.device)
        self.stagnated, self.null = self.negative.clone(), self.negative.clone()
        # The true residual at a row's last check: a check that finds no better one has met the dtype's floor.
        self.best = torch.full_like(self.rr, torch.inf)
        self.rows = torch.arange(k, device=self.B.device)
        self._leave(self.rr.sqrt() <= self.tolerance)

    def step(self) -> None:
        """Advance all rows under way by one iteration."""
        P = self.P[self.rows]
        AP = self.products(P)
        curvature = (P * AP).sum(1)
        if not bool(torch.isfinite(curvature).all()):
            message = f"cg met NaN or infinity in iteration {self.steps}. Look at the parameters, or use float64."
            raise FloatingPointError(message)
        size = P.square().sum(1)
        good = self._judge(curvature / size, AP.square().sum(1) / size)
        if not bool(good.all()):
            P, AP, curvature = P[good], AP[good], curvature[good]
            self._leave(~good)
        self._advance(P, AP, curvature)

    def _judge(self, quotient: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Tell rows that can go on from those that met a null or a negative direction."""
        if not len(quotient):
            return quotient > 0
        self.most_curvature = max(self.most_curvature, float(quotient.abs().max()))
        eps = torch.finfo(quotient.dtype).eps * self.most_curvature
        small = quotient <= 10 * eps
        # (Ap)² ≤ |A| pᵀAp where A is positive semi-definite: a vanishing pᵀAp without a vanishing Ap proves it is not.
        null = small & (quotient >= -100 * eps) & (image <= 1e4 * eps * self.most_curvature)
        negative = small & ~null
        if bool(negative.any()):
            self.least_curvature = min(self.least_curvature, float(quotient.min()))
            self.negative[self.rows[negative]] = True
        self.stagnated[self.rows[null]] = self.null[self.rows[null]] = True
        return ~(negative | null)

    def _advance(self, P: torch.Tensor, AP: torch.Tensor, curvature: torch.Tensor) -> None:
        rows = self.rows
        alpha = (self.rr[rows] / curvature)[:, None]
        self.X[rows] += alpha * P
        R = self.R[rows] - alpha * AP
        self.steps += 1
        self.n_iter[rows] += 1
        rr = R.square().sum(1)
        self.P[rows] = R + (rr / self.rr[rows])[:, None] * P
        self.R[rows], self.rr[rows] = R, rr
        self._check(rr.sqrt() <= self.tolerance[rows])

    def _check(self, candidate: torch.Tensor) -> None:
        """Recompute r where a row claims to be done, and for all now and then; done is who truly is."""
        refresh = self.steps % REFRESH == 0
        if not refresh and not bool(candidate.any()):
            return
        which = torch.ones_like(candidate) if refresh else candidate
        rows = self.rows[which]
        if not len(rows):
            return
        R = self.B[rows] - self.products(self.X[rows])
        rr = R.square().sum(1)
        # A drifted recurrence is near the floor too.
        claims = candidate[which] | (rr > 4 * self.rr[rows])
        # Restarted from the true residual; a new r with the old directions would diverge.
        self.P[rows[claims]] = self.R[rows[claims]] = R[claims]
        self.rr[rows[claims]] = rr[claims]
        done = rr.sqrt() <= self.tolerance[rows]
        stuck = claims & ~done & (rr.sqrt() > 0.5 * self.best[rows])
        self.best[rows[claims]] = rr.sqrt()[claims]
        self.stagnated[rows[stuck]] = True
        leaving = torch.zeros_like(candidate)
        leaving[which] = done | stuck
        self._leave(leaving)

    def _leave(self, leaving: torch.Tensor) -> None:
        self.rows = self.rows[~leaving]
