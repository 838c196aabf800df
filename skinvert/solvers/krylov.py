"""What the Krylov methods share: settings, products, starting points, and the judgement of the true residual."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning

from .._check import all_finite, check_number, must_be, to_plain_array
from .._scaling import ScaledProducts, exponents, far_exponents, lost_rows, norms, times_powers
from .._telling import warn
from ..operators import LinearOperator
from .residuals import relative_residual

__all__ = [
    "Problem",
    "check_finite",
    "check_settings",
    "default_rtol",
    "products_with",
    "starting_point",
    "warn_of_lost",
    "within",
]


def default_rtol(dtype: torch.dtype) -> float:
    """Return the relative tolerance of the iterative methods: 1e-5 in float32, 1e-8 in float64."""
    return 1e-5 if dtype == torch.float32 else 1e-8


def check_settings(method: Any, A: LinearOperator) -> tuple[float, float, int]:
    """Return ``rtol``, ``atol`` and ``maxiter`` (10·p, at most 1,000) of a method's settings, checked."""
    owner = type(method).__name__
    rtol = default_rtol(A.dtype) if method.rtol is None else method.rtol
    maxiter = min(10 * A.size, 1000) if method.maxiter is None else method.maxiter
    return (
        check_number(rtol, "rtol", owner=owner, low=0.0),
        check_number(method.atol, "atol", owner=owner, low=0.0),
        check_number(maxiter, "maxiter", owner=owner, low=1, integer=True),
    )


def products_with(operator: LinearOperator) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return V ↦ A v on rows: over SciPy's LinearOperator on the CPU, in torch on an accelerator."""
    if operator.device.type != "cpu":
        return operator.apply
    columns = operator.aslinearoperator()
    return lambda V: torch.from_numpy(np.ascontiguousarray(columns.matmat(V.numpy().T).T))


def starting_point(x0: Any, B: torch.Tensor, name: str = "x0") -> torch.Tensor | None:
    """Return a copy of ``x0`` for each row of B (k, p), from (k, p), (1, p) or (p,); None stays None."""
    if x0 is None:
        return None
    given = x0 if isinstance(x0, torch.Tensor) else torch.from_numpy(np.array(to_plain_array(x0, name)))
    start = given.detach().to(B)
    start = start[None] if start.ndim == 1 else start
    if start.shape not in (B.shape, (1, B.shape[1])):
        raise ValueError(must_be(name, f"of shape {tuple(B.shape)} or (1, p)", f"shape {tuple(start.shape)}"))
    if not all_finite(start):
        raise ValueError(must_be(name, "finite", "NaN or infinity"))
    return start.expand(B.shape).clone()


def within(residual: torch.Tensor, B: torch.Tensor, rtol: float, atol: torch.Tensor | float = 0.0) -> torch.Tensor:
    """Return which relative residuals (k,) mean ‖Ax − b‖ ≤ max(rtol ‖b‖, atol)."""
    size = norms(B).to(residual)
    # A row of zeros has its absolute residual in `residual`.
    goal = torch.where(size > 0, torch.clamp(atol / size.clamp(min=1e-300), min=rtol), atol)
    return residual <= goal


def check_finite(name: str, values: torch.Tensor, step: int) -> None:
    """Raise where a product is NaN or infinite, naming the iteration."""
    if not all_finite(values):
        way = ", or try dtype=torch.float64." if values.dtype == torch.float32 else "."
        message = f"{name} met NaN or infinity in iteration {step}: the curvature overflows, or is NaN."
        message += f" Look at the parameters{way}"
        raise FloatingPointError(message)


@dataclass
class Problem:
    """(A + λI) x = b with A, the rows b, and so x, brought near one by powers of two; results are scaled back.

    Attributes
    ----------
    operator : LinearOperator
        A + λI, as it is.
    products : ScaledProducts
        Of the scaled operator.
    B : tensor of shape (k, p)
        Scaled right-hand sides.
    powers : tensor of int, shape (k,)
        b = 2 ** power · B.
    atol : tensor of shape (k,), float64
        The absolute tolerance on the scale of each row.
    X, R : tensor of shape (k, p) or None
        Where to start, scaled, and B − A x there; None is x = 0. A start that is so far off that its residual has no
        digit of b is left out, and so is one of a row of zeros, whose solution is zero. One that an approximate inverse
        finds is shortened where it is too long, so that x = 0 is never better in the norm of A.
    """

    operator: LinearOperator
    products: ScaledProducts
    B: torch.Tensor
    powers: torch.Tensor
    atol: torch.Tensor
    X: torch.Tensor | None = None
    R: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        operator: LinearOperator,
        B: torch.Tensor,
        atol: float = 0.0,
        x0: torch.Tensor | None = None,
        products: Callable[[torch.Tensor], torch.Tensor] | None = None,
        size: float | None = None,
    ) -> Problem:
        """Scale the rows; ``products`` are those of the operator if not ``apply``, ``size`` its own if known."""
        powers = far_exponents(B)
        scaled = ScaledProducts(operator.apply if products is None else products, B.dtype, size)
        with np.errstate(over="ignore"):
            sizes = torch.from_numpy(np.ldexp(float(atol), -powers.cpu().numpy())).to(B.device)
        problem = cls(operator, scaled, times_powers(B, -powers), powers, sizes)
        if x0 is not None:
            problem._start(x0, powers, 1 / torch.finfo(B.dtype).eps)
        return problem

    def start_towards(self, x0: torch.Tensor) -> None:
        """Start at rough solutions ``x0`` (k, p) for B itself, or on the way there from zero.

        Along α x the error in the norm of A, which conjugate gradients minimise, is least at α = bᵀx / xᵀAx; its best
        multiple of at most 1 is no worse than x = 0, and needs no further product.
        """
        # A row without a number begins at zero, and no product meets it.
        x0 = torch.where(torch.isfinite(x0).all(1, keepdim=True), x0, 0.0)
        # Beyond, rounding of the old residual would be half the digits of the new one.
        X, R = self._start(x0, torch.zeros_like(self.powers), torch.finfo(x0.dtype).eps ** -0.5)
        image, wide = self.B - R, X.to(torch.float64)
        curvature = (wide * image).sum(1)
        alpha = torch.where(curvature > 0, (wide * self.B).sum(1) / curvature, 0.0).clamp(0.0, 1.0)[:, None].to(X)
        self.X, self.R = alpha * X, R + (1 - alpha) * image

    def tolerance(self, rtol: float) -> torch.Tensor:
        """Return max(rtol ‖b‖, atol) (k,), float64, on the scale of each row."""
        return torch.maximum(rtol * norms(self.B), self.atol)

    def residual(self, X: torch.Tensor, rows: Any = slice(None)) -> torch.Tensor:
        """Return ‖Ax − b‖ / ‖b‖ of some rows of scaled solutions X (k, p)."""
        return relative_residual(_Scaled(self), self.B[rows], X[rows])

    def back(self, X: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the solutions (..., k, p) of the problem as it was given, and which are too small for the dtype.

        The ``residual`` of those that overflow is set to infinity; where all do, that is an error.
        """
        found = times_powers(X, self.powers - self.products.exponent)
        overflow = ~torch.isfinite(found).all(-1)
        if not bool(overflow.any()):
            return found, lost_rows(X, found)
        if bool((overflow | ~(self.B != 0).any(1)).all()):
            must = f"such that x is within the range of {X.dtype}"
            hint = "Try dtype=torch.float64, smaller right-hand sides, or a larger hessian_perturbation."
            raise ValueError(must_be("b and the curvature", must, "a solution that overflows", hint))
        residual[overflow] = torch.inf
        return found, lost_rows(X, found)

    def _start(self, x0: torch.Tensor, powers: torch.Tensor, most: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Start at 2 ** -powers · x0 where its residual is at most ``most`` ‖b‖; return X and R."""
        own = exponents(x0)
        x0 = times_powers(x0, -own)
        image = self.products(x0)
        X = times_powers(x0, own + self.products.exponent - powers)
        R = self.B - times_powers(image, own - powers + self.products.exponent)
        size = norms(self.B)
        # Not (a > b): NaN compares false.
        keep = ((size > 0) & (norms(R) <= most * size))[:, None]
        self.X, self.R = torch.where(keep, X, 0.0), torch.where(keep, R, self.B)
        return self.X, self.R


def warn_of_lost(name: str, lost: torch.Tensor, dtype: torch.dtype) -> None:
    """Warn of rows whose solution is too small for the dtype."""
    if bool(lost.any()):
        warn(
            f"{name} found {int(lost.sum())} of {lost.numel()} solutions below the range of "
            f"{dtype}: they come out as zeros or with few digits, and not as converged. Try dtype=torch.float64, or "
            "larger right-hand sides.",
            ConvergenceWarning,
        )


class _Scaled(LinearOperator):
    """The scaled operator of a problem."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.operator.size, problem.B.dtype, problem.B.device)
        self.products = problem.products

    def apply(self, V: torch.Tensor) -> torch.Tensor:
        """Return the scaled products."""
        return self.products(V)
