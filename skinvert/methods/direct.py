"""Dense inversion: Cholesky with a condition estimate, else an eigendecomposition; sample space where n < p."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
import torch

from .._memory import check_memory, rows_within
from .._validation import check_hessian_perturbation, check_number, must_be
from ..operators import Dense, LinearOperator, LowRank, Shifted, add_to_diagonal, check_dense_memory
from ..results import InverseHvpResult
from .base import InverseOperator, Method, relative_residual, warn_not_converged
from .low_rank import LowRankInverse

__all__ = ["Direct"]


class Direct(Method):
    r"""Assemble H once and factorise it: exact, O(p³) once and O(p²) per right-hand side, 8·2p² bytes in float64.

    A + λI is factorised by Cholesky, and its reciprocal condition number rcond is estimated, because Cholesky
    "succeeds" on singular matrices. Where it fails, or rcond < 10·p·eps, an eigendecomposition takes over: eigenvalues
    within p·eps·max|eig| of zero are left out (the pseudo-inverse), and a right-hand side with a part in their span is
    warned of. Negative eigenvalues are inverted as they are, with a warning that says how negative.

    A curvature with a factor of fewer rows than p, H = FᵀF + R with R + λ > 0, is inverted in sample space by
    Woodbury's identity.

    Parameters
    ----------
    rtol : float, default=None
        A row whose part in the null space exceeds ``rtol`` ‖b‖ is warned of, and ``converged`` says whether the
        residual is within it. None is 1e-3 in float32 and 1e-6 in float64.

    References
    ----------
    Higham (2002), "Accuracy and Stability of Numerical Algorithms", ch. 15 (condition estimation).

    Examples
    --------
    >>> from skinvert.operators import Diagonal
    >>> inverse = Direct().invert(Diagonal(torch.tensor([1.0, 3.0])), 1.0)
    >>> inverse.solve(torch.tensor([[2.0, 2.0]])).x
    tensor([[1.0000, 0.5000]])
    """

    name: ClassVar[str] = "direct"
    requires: ClassVar[tuple[str, ...]] = ("to_dense",)
    cost: ClassVar[str] = "p products (Hessian) or one GEMM of the factor; p³ once, p² a row"
    memory: ClassVar[str] = "3 p², or 2 r p for a factor of r < p rows"
    exactness: ClassVar[str] = "exact"
    choose_it_for: ClassVar[str] = "p up to some 5,000; many right-hand sides; many λ"

    def __init__(self, *, rtol: float | None = None) -> None:
        self.rtol = rtol

    def invert(self, A: LinearOperator, hessian_perturbation: float, verbose: int = 0) -> InverseOperator:
        """Factorise A + λI, in sample space where that is smaller."""
        rtol = {torch.float32: 1e-3}.get(A.dtype, 1e-6) if self.rtol is None else self.rtol
        rtol = check_number(rtol, "rtol", owner="Direct", low=0.0)
        rows = getattr(A, "factor_shape", (math.inf, 0))[0]
        shift = _positive_shift(A, hessian_perturbation)
        if rows < A.size and shift is not None:
            return SampleSpaceInverse(A, hessian_perturbation, shift, rtol, verbose)
        # The matrix, its factor, and room to work.
        check_dense_memory(A, 3)
        return DenseInverse(A.to_dense(verbose), hessian_perturbation, rtol, A.hint)


class DenseInverse(InverseOperator):
    """The factorised inverse of a dense matrix plus λI."""

    _fields: ClassVar[dict[str, str]] = {
        "matrix": "tensor[p,p]",
        "shift": "float",
        "rtol": "float",
        "hint": "str",
        "cholesky": "tensor[p,p]|None",
        "eigenvalues": "tensor[p]|None",
        "eigenvectors": "tensor[p,p]|None",
        "inverted": "tensor[p]|None",
        "positive_definite": "bool",
    }

    def __init__(self, matrix: torch.Tensor, hessian_perturbation: float, rtol: float, hint: str) -> None:
        self.matrix, self.shift, self.rtol, self.hint = matrix, hessian_perturbation, rtol, hint
        if not bool(torch.isfinite(matrix).all()):
            raise ValueError(must_be("The curvature", "finite", "NaN or infinity", "Look at the parameters."))
        self.cholesky: torch.Tensor | None = None
        # All or none: with the eigenvalues of A come its eigenvectors and the inverted eigenvalues of A + λI.
        self.eigenvalues: torch.Tensor | None = None
        self.eigenvectors: Any = None
        self.inverted: Any = None
        cholesky, info = torch.linalg.cholesky_ex(add_to_diagonal(matrix.clone(), self.shift or None))
        if int(info) == 0 and _rcond(cholesky, self._norm1()) >= 10 * self.size * torch.finfo(matrix.dtype).eps:
            self.cholesky, self.positive_definite = cholesky, True
        else:
            self._decompose()

    @property
    def operator(self) -> LinearOperator:  # type: ignore[override]
        """A + λI."""
        return Shifted(Dense(self.matrix), self.shift)

    def solve(self, B: torch.Tensor) -> InverseHvpResult:
        """Return the solutions, or pseudo-solutions where A + λI is singular.

        ``info`` holds ``residual`` (k,) and ``converged`` (k,).
        """
        if self.cholesky is None:
            self._warn_outside(B @ self.eigenvectors, B)
        X = self._solve_once(B)
        if self.dtype == torch.float32:
            # One step of refinement on a float64 residual: float32 alone loses the digits of the condition.
            X = X + self._solve_once(self._residual64(B, X))
        residual = relative_residual(self.operator, B, X)
        converged = residual <= self.rtol
        if self.positive_definite:
            hint = "Rounding does not allow less. Try dtype=torch.float64 or a larger hessian_perturbation."
            warn_not_converged("direct", residual, converged, self.rtol, hint)
        return InverseHvpResult(X, {"residual": residual, "converged": converged})

    def at(self, hessian_perturbation: float) -> DenseInverse:
        """Return the inverse at another λ, from the eigendecomposition of A."""
        if self.eigenvalues is None:
            self._decompose()
        other = object.__new__(DenseInverse)
        other.__dict__.update(self.__dict__, shift=hessian_perturbation, cholesky=None)
        other._judge()
        return other

    def path(self, B: torch.Tensor, hessian_perturbations: Iterable[float]) -> torch.Tensor:
        """Return the solutions (n_λ, k, p) at every λ: B is projected once, then one GEMM per λ."""
        inverses = [self.at(shift) for shift in hessian_perturbations]
        X = B.new_empty(len(inverses), *B.shape)
        along = B @ inverses[0].eigenvectors if inverses else B
        for i, inverse in enumerate(inverses):
            inverse._warn_outside(along, B)
            X[i] = (along * inverse.inverted) @ inverse.eigenvectors.mT
        return X

    def _decompose(self) -> None:
        self.eigenvalues, self.eigenvectors = torch.linalg.eigh(self.matrix)
        self._judge()

    def _judge(self) -> None:
        """Find which eigenvalues count as zero, and warn where one is negative."""
        assert self.eigenvalues is not None
        values = self.eigenvalues + self.shift
        cut = self._cut()
        self.inverted = torch.where(values.abs() > cut, 1 / values, 0.0)
        self.positive_definite = bool((values > cut).all())
        # Rounding alone makes zero eigenvalues slightly negative.
        if bool((values < -10 * cut).any()):
            least = float(values.min())
            warnings.warn(
                f"A = H + λI is indefinite: its smallest eigenvalue is {least:.3g}, at hessian_perturbation="
                f"{self.shift:.3g}. The solution is exact, but it is no minimiser. {self.hint}",
                scipy.linalg.LinAlgWarning,
                stacklevel=4,
            )

    def _cut(self) -> float:
        """Return p·eps·max|eig|, within which an eigenvalue of A + λI is zero to rounding."""
        assert self.eigenvalues is not None
        largest = float((self.eigenvalues + self.shift).abs().max())
        return self.size * torch.finfo(self.matrix.dtype).eps * largest

    def _solve_once(self, B: torch.Tensor) -> torch.Tensor:
        if self.cholesky is not None:
            return torch.cholesky_solve(B.mT, self.cholesky).mT.contiguous()
        return ((B @ self.eigenvectors) * self.inverted) @ self.eigenvectors.mT

    def _residual64(self, B: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
        """Return b − (A + λI) x, summed in float64 over blocks of A, rounded to the dtype of B."""
        X64 = X.double()
        residual = B.double() - self.shift * X64
        step = rows_within(8 * self.size, self.size)
        for start in range(0, self.size, step):
            rows = slice(start, start + step)
            residual -= X64[:, rows] @ self.matrix[rows].double()
        return residual.to(B.dtype)

    def _warn_outside(self, along: torch.Tensor, B: torch.Tensor) -> None:
        lost = torch.where(self.inverted == 0, along, 0.0).norm(dim=1)
        outside = int((lost > self.rtol * B.norm(dim=1)).sum())
        if outside:
            warnings.warn(
                f"A = H + λI is singular (rank {int((self.inverted != 0).sum())} of {self.size}) and {outside} of "
                f"{len(B)} right-hand sides have a part outside its range: the pseudo-inverse leaves it out. "
                f"Try {'dtype=torch.float64 or ' if self.dtype == torch.float32 else ''}a larger hessian_perturbation: "
                f"eigenvalues within {self._cut():.2g} of zero count as zero.",
                scipy.linalg.LinAlgWarning,
                stacklevel=4,
            )

    def _norm1(self) -> float:
        return float(add_to_diagonal(self.matrix.clone(), self.shift or None).abs().sum(0).max())


class SampleSpaceInverse(InverseOperator):
    """Woodbury: (D + FᵀF)⁻¹ = D⁻¹ − D⁻¹Fᵀ (I + F D⁻¹ Fᵀ)⁻¹ F D⁻¹, with D = R + λ > 0 diagonal."""

    _fields: ClassVar[dict[str, str]] = {
        "rows": "tensor[r,p]",
        "rtol": "float",
        "penalty": "tensor[p]|None",
        "shift": "tensor[p]",
        "inverse_shift": "tensor[p]",
        "cholesky": "tensor[r,r]",
        "positive_definite": "bool",
    }

    _transient = ("_spectral",)

    def __init__(
        self, A: LinearOperator, hessian_perturbation: float, shift: torch.Tensor, rtol: float, verbose: int
    ) -> None:
        rows = A.factor_shape[0]  # type: ignore[attr-defined]
        way_out = 'Try method="cg", which keeps no matrix.'
        check_memory(2 * rows * A.size * A.dtype.itemsize, f"A factor of {rows:,} rows", way_out, A.device)
        self.rows = A.factor(verbose)  # type: ignore[attr-defined]
        self.rtol, self.penalty = rtol, getattr(A, "penalty", None)
        self._spectral: LowRankInverse | None = None
        self._factorise(shift)
        self.positive_definite = True

    @property
    def operator(self) -> LinearOperator:  # type: ignore[override]
        """A + λI."""
        return LowRank(self.rows, self.shift)

    def solve(self, B: torch.Tensor) -> InverseHvpResult:
        """Return the solutions. ``info`` holds ``residual`` (k,) and ``converged`` (k,)."""
        X = self._apply(B)
        # One step of refinement, where it contracts: the difference of two large terms loses digits at a small shift.
        step = self._apply(B - self.operator.apply(X))
        X = torch.where((step.norm(dim=1) < 0.5 * X.norm(dim=1))[:, None], X + step, X)
        residual = relative_residual(self.operator, B, X)
        converged = residual <= self.rtol
        hint = "Rounding does not allow less at so small a shift. Try a larger hessian_perturbation"
        hint += " or dtype=torch.float64." if self.dtype == torch.float32 else "."
        warn_not_converged("direct", residual, converged, self.rtol, hint)
        return InverseHvpResult(X, {"residual": residual, "converged": converged})

    def at(self, hessian_perturbation: float) -> InverseOperator:
        """Return the inverse at another λ: from the singular vectors of F where R is a multiple of I, else anew."""
        R = self.penalty
        if R is None or bool((R == R[0]).all()):
            if self._spectral is None:
                _, sizes, vectors = torch.linalg.svd(self.rows, full_matrices=False)
                rest = 0.0 if R is None else float(R[0])
                self._spectral = LowRankInverse(
                    sizes.square() + rest, vectors, rest, hessian_perturbation, approximate=False, name="direct"
                )
                self._spectral.rtol = self.rtol
            return self._spectral.at(hessian_perturbation)
        shift = R + check_hessian_perturbation(hessian_perturbation)
        if not bool((shift > 0).all()):
            what, got = "hessian_perturbation for fewer rows than parameters", hessian_perturbation
            raise ValueError(must_be(what, "> 0 where the penalty is 0", got, "Try 1e-3."))
        other = object.__new__(SampleSpaceInverse)
        other.__dict__.update(self.__dict__)
        other._factorise(shift)
        return other

    def path(self, B: torch.Tensor, hessian_perturbations: Iterable[float]) -> torch.Tensor:
        """Return the solutions (n_λ, k, p) at every λ."""
        shifts = list(hessian_perturbations)
        first = self.at(shifts[0]) if shifts else self
        return first.path(B, shifts) if isinstance(first, LowRankInverse) else super().path(B, shifts)

    def _factorise(self, shift: torch.Tensor) -> None:
        self.shift, self.inverse_shift = shift, 1 / shift
        core = (self.rows * self.inverse_shift) @ self.rows.mT
        self.cholesky = torch.linalg.cholesky(add_to_diagonal(core, 1.0))

    def _apply(self, B: torch.Tensor) -> torch.Tensor:
        scaled = B * self.inverse_shift
        inner = torch.cholesky_solve((scaled @ self.rows.mT).mT, self.cholesky).mT
        return scaled - (inner @ self.rows) * self.inverse_shift


def _positive_shift(A: LinearOperator, hessian_perturbation: float) -> torch.Tensor | None:
    """Return R + λ as (p,), or None where an entry is too small to divide by."""
    if not hasattr(A, "factor"):
        return None
    penalty = getattr(A, "penalty", None)
    shift = torch.full((A.size,), hessian_perturbation, dtype=A.dtype, device=A.device)
    shift = shift if penalty is None else shift + penalty
    return shift if bool((shift > 0).all()) else None


def _rcond(cholesky: torch.Tensor, norm: float) -> float:
    """Estimate 1 / (‖A‖₁ ‖A⁻¹‖₁) from the Cholesky factor: LAPACK's ``pocon``, or its algorithm on a device."""
    if norm == 0 or not math.isfinite(norm):
        return 0.0
    if cholesky.device.type == "cpu":
        pocon = scipy.linalg.get_lapack_funcs("pocon", (cholesky.numpy(),))
        # Column-major: the transpose of the row-major lower factor is the upper one, without a copy.
        rcond, _ = pocon(cholesky.numpy().T, norm, uplo="U")
        return float(rcond)

    def solve(columns: np.ndarray) -> np.ndarray:
        right = torch.from_numpy(np.ascontiguousarray(columns)).to(cholesky)
        return torch.cholesky_solve(right.reshape(len(right), -1), cholesky).cpu().numpy().reshape(columns.shape)

    inverse = scipy.sparse.linalg.LinearOperator(
        cholesky.shape, matvec=solve, rmatvec=solve, matmat=solve, rmatmat=solve, dtype=np.float64
    )
    estimate = scipy.sparse.linalg.onenormest(inverse)
    return 1 / (norm * estimate) if math.isfinite(estimate) and estimate > 0 else 0.0
