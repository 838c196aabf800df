"""Dense inversion: Cholesky with a condition estimate, else an eigendecomposition; sample space where n < p."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable
from typing import Any, ClassVar

import torch

from .._check import check_hessian_perturbation, check_number, must_be
from .._memory import rows_within
from ..operators import Dense, LinearOperator, add_to_diagonal, check_dense_memory
from ..reasons import Reason, reasons
from ..results import InverseHvpResult
from .assembly import assembled
from .base import InverseOperator, Method, default_tolerance, relative_residual, warn_not_converged
from .condition import norm1, rcond
from .null_space import invert_spectrum, warn_of_indefinite, warn_of_null_part
from .sample_space import SampleSpaceInverse

__all__ = ["Direct"]

# Matrices of p × p at the peak, as measured: H, its factor, and the factor by columns; then what `eigh` takes beside H.
CHOLESKY_COPIES, EIGEN_COPIES = 3, 3


class Direct(Method):
    r"""Assemble H once and factorise it: exact, O(p³) once and O(p²) per right-hand side, 8·2p² bytes in float64.

    A + λI is factorised by Cholesky, and its reciprocal condition number rcond is estimated, because Cholesky
    "succeeds" on singular matrices. Where it fails, or rcond < 10·√p·eps, or a random right-hand side is not solved to
    ``rtol``, an eigendecomposition takes over: eigenvalues within (10 + √p)·eps·max|eig| of zero are left out (the
    pseudo-inverse), and a right-hand side with a part in their span is warned of. Negative eigenvalues are inverted as
    they are, with a warning that says how negative. Where λ > 0 and the curvature is positive semi-definite by
    construction nothing is left out.

    A curvature with a factor of fewer rows than p, H = FᵀF + R with R + λ > 0, is inverted in sample space by
    Woodbury's identity, or by the singular vectors of F where λ is so small that Cholesky would lose it.

    The matrix, or the factor, is held against one product with H first: where they differ it is assembled anew by
    products, and where these differ too, that is an error.

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
    >>> from skinvert.operators import DiagonalMatrix
    >>> inverse = Direct().invert(DiagonalMatrix(torch.tensor([1.0, 3.0])), 1.0)
    >>> inverse.solve(torch.tensor([[2.0, 2.0]])).x
    tensor([[1.0000, 0.5000]])
    """

    name: ClassVar[str] = "direct"
    cost: ClassVar[str] = "p products (Hessian) or one GEMM of the factor; p³ once, p² a row"
    memory: ClassVar[str] = "3 to 4 p², or 3 r p for a factor of r < p rows"
    exactness: ClassVar[str] = "exact"
    choose_it_for: ClassVar[str] = "p up to some 5,000; many right-hand sides; many λ"

    def __init__(self, *, rtol: float | None = None) -> None:
        self.rtol = rtol

    def invert(self, A: LinearOperator, hessian_perturbation: float, verbose: int = 0) -> InverseOperator:
        """Factorise A + λI, in sample space where that is smaller."""
        rtol = default_tolerance(A.dtype) if self.rtol is None else self.rtol
        rtol = check_number(rtol, "rtol", owner="Direct", low=0.0)
        shift = _positive_shift(A, hessian_perturbation)
        if shift is not None and few_rows(A, A.size - 1):
            return SampleSpaceInverse(A, hessian_perturbation, shift, rtol, verbose)
        # The matrix and its factor; an eigendecomposition asks for more when it is needed.
        check_dense_memory(A, CHOLESKY_COPIES)
        matrix = assembled(A, hessian_perturbation, verbose)
        return DenseInverse(matrix, hessian_perturbation, rtol, A.hint, A.is_psd)


class DenseInverse(InverseOperator):
    """The factorised inverse of a dense matrix plus λI."""

    _fields: ClassVar[dict[str, str]] = {
        "matrix": "tensor[p,p]",
        "hessian_perturbation": "float",
        "rtol": "float",
        "hint": "str",
        "is_psd": "bool",
        "judges": "bool|missing",
        "cut": "float|None|missing",
        "cholesky": "tensor[p,p]|None",
        "eigenvalues": "tensor[p]|None",
        "eigenvectors": "tensor[p,p]|None",
        "inverted": "tensor[p]|None",
        "positive_definite": "bool",
    }

    name = "direct"

    def __init__(
        self, matrix: torch.Tensor, hessian_perturbation: float, rtol: float, hint: str, is_psd: bool = False
    ) -> None:
        self.matrix, self.rtol, self.hint = matrix, rtol, hint
        self.hessian_perturbation = float(hessian_perturbation)
        self.is_psd = is_psd
        if not bool(torch.isfinite(matrix).all()):
            raise ValueError(must_be("The curvature", "finite", "NaN or infinity", "Look at the parameters."))
        self.cholesky: torch.Tensor | None = None
        # All or none: with the eigenvalues of A come its eigenvectors and the inverted eigenvalues of A + λI.
        self.eigenvalues: torch.Tensor | None = None
        self.eigenvectors: Any = None
        self.inverted: Any = None
        self.cut = 0.0
        self.positive_definite = True
        self._factorise()
        if self.cholesky is None:
            self._decompose()

    @property
    def curvature(self) -> LinearOperator:  # type: ignore[override]  # Made of the matrix when asked for.
        """A."""
        return Dense(self.matrix)

    def solve(self, B: torch.Tensor) -> InverseHvpResult:
        """Return the solutions, or pseudo-solutions where A + λI is singular.

        ``info`` holds ``residual`` (k,), ``converged`` (k,) and ``approximate`` False.
        """
        return self._solved(B, None if self.cholesky is not None else B @ self.eigenvectors)

    @property
    def moves(self) -> bool:
        """Whether the eigenvalues are known; a Cholesky factor serves one λ."""
        return self.eigenvalues is not None

    @property
    def all_eigenvalues(self) -> torch.Tensor | None:
        """All eigenvalues, where they are known."""
        return self.eigenvalues

    @property
    def tolerance(self) -> float:
        """``rtol``."""
        return self.rtol

    def at(self, hessian_perturbation: float) -> DenseInverse:
        """Return the inverse at another λ, from the eigendecomposition of A."""
        if self.eigenvalues is None:
            self._decompose()
        other = copy.copy(self)
        other.hessian_perturbation, other.cholesky = check_hessian_perturbation(hessian_perturbation), None
        other._judge()
        return other

    def solve_path(self, B: torch.Tensor, hessian_perturbations: Iterable[float]) -> list[InverseHvpResult]:
        """Return the results at every λ: B is projected once."""
        inverses = [self.at(shift) for shift in hessian_perturbations]
        along = B @ inverses[0].eigenvectors if inverses else B
        return [inverse._solved(B, along) for inverse in inverses]

    def _solved(self, B: torch.Tensor, along: torch.Tensor | None) -> InverseHvpResult:
        """Solve, with the coefficients B U (k, p) where there are eigenvectors."""
        outside = torch.zeros(len(B), dtype=torch.bool, device=B.device)
        if along is not None:
            outside = torch.where(self.inverted == 0, along, 0.0).norm(dim=1) > self.rtol * B.norm(dim=1)
            self._warn_outside(outside)
        X = self._refined(B, self._solve_once(B, along))
        residual = relative_residual(self.operator, B, X)
        converged = residual <= self.rtol
        hint = "Rounding does not allow less. Try dtype=torch.float64 or a larger hessian_perturbation."
        warn_not_converged("direct", residual[~outside], converged[~outside], self.rtol, hint)
        reason = reasons(converged, Reason.STAGNATED, (Reason.SINGULAR, outside))
        info = {"residual": residual, "converged": converged, "reason": reason, "approximate": False}
        return InverseHvpResult(X, info)

    def check(self) -> None:
        """Raise ValueError where the factors contradict each other, or the matrix."""
        parts = [self.eigenvalues, self.eigenvectors, self.inverted]
        if self.eigenvalues is None or any(part is None for part in parts):
            if self.cholesky is None or any(part is not None for part in parts) or not self.positive_definite:
                must = "a positive definite one with a Cholesky factor, or one with all of the eigendecomposition"
                raise ValueError(must_be("DenseInverse", must, "neither"))
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.compare(self.at(self.hessian_perturbation), but=("cholesky",))
        b = torch.ones(1, self.size, dtype=self.dtype, device=self.device)
        rebuilt = (b @ self.eigenvectors * self.eigenvalues) @ self.eigenvectors.mT
        gap = (rebuilt - b @ self.matrix).double().norm()
        # Not (gap > ...): NaN compares false.
        if not bool(gap <= 1e-3 * norm1(self.matrix) * b.double().norm()):
            raise ValueError(must_be("The eigendecomposition", "that of the matrix", f"another, by {gap:.3g}"))

    def _factorise(self) -> None:
        """Take the Cholesky factor of A + λI where it is good enough."""
        # In place, and back: one matrix less at the peak.
        diagonal = self.matrix.diagonal().clone()
        try:
            add_to_diagonal(self.matrix, self.hessian_perturbation or None)
            norm = norm1(self.matrix)
            cholesky, info = torch.linalg.cholesky_ex(self.matrix)
        finally:
            self.matrix.diagonal().copy_(diagonal)
        floor = 10 * math.sqrt(self.size) * torch.finfo(self.matrix.dtype).eps
        if int(info) == 0 and rcond(cholesky, norm) >= floor:
            self.cholesky = cholesky
            generator = torch.Generator("cpu").manual_seed(0)
            b = torch.randn(1, self.size, dtype=torch.float64, generator=generator, device="cpu").to(cholesky)
            residual = relative_residual(self.operator, b, self._refined(b, self._solve_once(b)))
            if not bool((residual <= self.rtol).all()):
                self.cholesky = None

    def _decompose(self) -> None:
        check_dense_memory(Dense(self.matrix), EIGEN_COPIES)
        self.eigenvalues, self.eigenvectors = torch.linalg.eigh(self.matrix)
        rounding = torch.finfo(self.dtype).eps ** 0.5 * float(self.eigenvalues.abs().max())
        if self.is_psd and bool((self.eigenvalues >= -rounding).all()):
            # Rounding alone makes zero eigenvalues slightly negative; where there is more, the claim is wrong.
            self.eigenvalues = self.eigenvalues.clamp(min=0)
        self._judge()

    def _judge(self) -> None:
        """Find which eigenvalues count as zero, and warn where one is negative."""
        assert self.eigenvalues is not None
        found = invert_spectrum(self.eigenvalues, self.hessian_perturbation, self.size)
        self.inverted, self.cut, self.positive_definite = found.inverse, found.cut, found.positive_definite
        if found.indefinite:
            least = f"its smallest eigenvalue is {found.least:.3g}"
            consequence = "The solution is exact, but it is no minimiser."
            warn_of_indefinite(least, self.hessian_perturbation, consequence, self.hint)

    def _solve_once(self, B: torch.Tensor, along: torch.Tensor | None = None) -> torch.Tensor:
        if self.cholesky is not None:
            return torch.cholesky_solve(B.mT, self.cholesky).mT.contiguous()
        along = B @ self.eigenvectors if along is None else along
        return (along * self.inverted) @ self.eigenvectors.mT

    def _refined(self, B: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
        """Take one step of refinement on a float64 residual: float32 alone loses the digits of the condition."""
        return X + self._solve_once(self._residual64(B, X)) if self.dtype == torch.float32 else X

    def _residual64(self, B: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
        """Return b − (A + λI) x, summed in float64 over blocks of A, rounded to the dtype of B."""
        X64 = X.double()
        residual = B.double() - self.hessian_perturbation * X64
        step = rows_within(8 * self.size, self.size)
        for start in range(0, self.size, step):
            rows = slice(start, start + step)
            residual -= X64[:, rows] @ self.matrix[rows].double()
        return residual.to(B.dtype)

    def _warn_outside(self, outside: torch.Tensor) -> None:
        larger = "dtype=torch.float64 or " if self.dtype == torch.float32 else ""
        warn_of_null_part(
            f"A = H + λI is singular (rank {int((self.inverted != 0).sum())} of {self.size})",
            outside,
            f"Try {larger}a larger hessian_perturbation: eigenvalues within {self.cut:.2g} of zero count as zero.",
        )


def _positive_shift(A: LinearOperator, hessian_perturbation: float) -> torch.Tensor | None:
    """Return R + λ as (p,), or None where an entry is too small to divide by."""
    if "factor" not in A.faces:
        return None
    penalty = A.penalty
    shift = torch.full((A.size,), hessian_perturbation, dtype=A.dtype, device=A.device)
    shift = shift if penalty is None else shift + penalty
    return shift if bool((shift > 0).all()) else None


def few_rows(A: LinearOperator, most: int) -> bool:
    """Return whether A has a factor of at most so many rows."""
    return A.factor_shape is not None and A.factor_shape[0] <= most
