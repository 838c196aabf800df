"""The inverse of a dense matrix: by its Cholesky factor at one λ, or by its eigendecomposition at any."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import ClassVar

import torch

from .._check import all_finite, must_be
from ..operators import Dense, Eigenvectors, add_to_diagonal, check_dense_memory
from ..results import InverseHvpResult
from ..solvers.krylov import default_rtol
from .base import InverseOperator, relative_residual
from .condition import norm1, own_units, rcond
from .definite import proven_bound
from .spectral_inverse import SpectralInverse

__all__ = ["CHOLESKY_COPIES", "CholeskyInverse", "factorise"]

# Matrices of p × p at the peak, as measured: H, its factor, and the factor by columns; then what `eigh` takes beside H.
CHOLESKY_COPIES, EIGEN_COPIES = 3, 3
# The relative residual up to which a solution in float32 is left as the factor gives it: what `cg` asks for.
REFINED = default_rtol(torch.float32)


def factorise(A: Dense, hessian_perturbation: float, rtol: float) -> InverseOperator:
    """Return the inverse of a dense matrix plus λI: by Cholesky where that is good enough, else by eigenvectors."""
    if not all_finite(A.matrix):
        raise ValueError(must_be("The curvature", "finite", "NaN or infinity", "Look at the parameters."))
    found = _cholesky(A, hessian_perturbation)
    if found is not None:
        inverse = CholeskyInverse(A, found[0], hessian_perturbation, rtol)
        if inverse.serves(found[1]):
            return inverse
        # One matrix less beside what `eigh` takes.
        del inverse, found
    return _decompose(A, hessian_perturbation, rtol)


class CholeskyInverse(InverseOperator):
    """The inverse of a positive definite A + λI by its Cholesky factor; at another λ by the eigendecomposition of A."""

    _fields: ClassVar[dict[str, str]] = {
        "curvature": "Dense",
        "cholesky": "tensor[p,p]",
        "hessian_perturbation": "float",
        "rtol": "float",
        "judges": "bool|missing",
    }
    _transient = ("exact", "_spectral", "_inverse")

    name = "direct"
    positive_definite = True
    curvature: Dense
    # Made when another λ is asked for.
    _spectral: SpectralInverse | None = None
    # Made when there are more rows than parameters.
    _inverse: torch.Tensor | None = None

    def __init__(self, A: Dense, cholesky: torch.Tensor, hessian_perturbation: float, rtol: float) -> None:
        self.curvature, self.cholesky, self.rtol = A, cholesky, rtol
        self.hessian_perturbation = float(hessian_perturbation)

    @property
    def moves(self) -> bool:
        """Whether another λ needs no factorisation: here it does."""
        return False

    @property
    def takes_products(self) -> bool:
        """Whether a solve takes products with the exact curvature: the matrix is at hand."""
        return False

    @property
    def all_eigenvalues(self) -> torch.Tensor | None:
        """All eigenvalues, where another λ was asked for."""
        return None if self._spectral is None else self._spectral.all_eigenvalues

    @property
    def tolerance(self) -> float:
        """``rtol``."""
        return self.rtol

    @property
    def lower_bound(self) -> float:
        """λ + min(penalty) of a semi-definite A where that is positive; else what a Cholesky factorisation proves."""
        known, truth = super().lower_bound, self.truth
        return known if known > 0 or truth is None else proven_bound(self.curvature, truth, self.hessian_perturbation)

    def solve(self, B: torch.Tensor) -> InverseHvpResult:
        """Return the solutions. ``info`` holds ``residual`` (k,), ``converged`` (k,) and ``approximate`` False."""
        return self.judged(B, *self._refined(B))

    @property
    def gaussian(self) -> bool:
        """Whether it has ``log_det`` and ``root``: it has."""
        return True

    def log_det(self) -> float:
        """Return 2 Σ log Lᵢᵢ."""
        return 2 * float(self.cholesky.diagonal().double().log().sum())

    @property
    def own_eigenvalues(self) -> torch.Tensor:
        """All p, by a decomposition."""
        return torch.linalg.eigvalsh(self.curvature.matrix)

    def root(self, Z: torch.Tensor) -> torch.Tensor:
        """Return the solutions of Lᵀ x = z."""
        return torch.linalg.solve_triangular(self.cholesky.mT, Z.mT, upper=True).mT

    def at(self, hessian_perturbation: float) -> SpectralInverse:
        """Return the inverse at another λ, from the eigendecomposition of A."""
        return self._decomposed().at(hessian_perturbation).judged_as(self)

    def solve_path(self, B: torch.Tensor, hessian_perturbations: Iterable[float]) -> list[InverseHvpResult]:
        """Return the results at every λ, from the eigendecomposition of A."""
        shifts = list(hessian_perturbations)
        return self._decomposed().solve_path(B, shifts) if shifts else []

    def serves(self, units: torch.Tensor | None) -> bool:
        """Return whether a random right-hand side, in the parameters' own units if given, is solved to ``rtol``."""
        generator = torch.Generator("cpu").manual_seed(0)
        b = torch.randn(1, self.size, dtype=torch.float64, generator=generator, device="cpu").to(self.cholesky)
        b = b if units is None else b / units
        return bool((self._refined(b)[1] <= self.rtol).all())

    def _decomposed(self) -> SpectralInverse:
        if self._spectral is None:
            self._spectral = _decompose(self.curvature, self.hessian_perturbation, self.rtol)
        return self._spectral

    def _refined(self, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the solutions and their residuals, with a step of refinement where a float32 matrix needs one."""
        X = self._solve_once(B)
        residual = relative_residual(self.operator, B, X)
        # Not (residual > ...): NaN compares false.
        rows = ~(residual <= min(REFINED, self.rtol))
        if bool(rows.any()):
            R = self.curvature.refining_residual(B[rows], X[rows], self.hessian_perturbation)
            if R is not None:
                X[rows] += self._solve_once(R)
                residual[rows] = relative_residual(self.operator, B[rows], X[rows])
        return X, residual

    def _solve_once(self, B: torch.Tensor) -> torch.Tensor:
        # A product with the inverse is several times as fast as substitution; refinement makes up for its rounding.
        if self._inverse is None and self.dtype == torch.float32 and len(B) > self.size:
            self._inverse = torch.cholesky_inverse(self.cholesky)
        if self._inverse is not None:
            return B @ self._inverse
        return torch.cholesky_solve(B.mT, self.cholesky).mT.contiguous()


def _cholesky(A: Dense, hessian_perturbation: float) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Return the Cholesky factor of A + λI, or None where there is none, or the condition is near 1 / eps.

    A semi-definite curvature is judged in the parameters' own units too, which are returned then: a column of inputs in
    dollars beside one in thousands of them is no reason to leave a direction out. Of others a small entry may be
    rounding of larger ones.
    """
    matrix = A.matrix
    floor = 10 * math.sqrt(len(matrix)) * torch.finfo(matrix.dtype).eps
    # In place, and back: one matrix less at the peak.
    diagonal = matrix.diagonal().clone()
    try:
        add_to_diagonal(matrix, hessian_perturbation or None)
        norm = norm1(matrix)
        cholesky, info = torch.linalg.cholesky_ex(matrix)
        if int(info) != 0:
            return None
        if rcond(cholesky, norm) >= floor:
            return cholesky, None
        units = own_units(matrix.diagonal()) if A.is_psd else None
        if units is None:
            return None
        norm = norm1(matrix, units)
    finally:
        matrix.diagonal().copy_(diagonal)
    found = rcond(cholesky.mul_(units[:, None]), norm)
    cholesky.div_(units[:, None])
    return (cholesky, units) if found >= floor else None


def _decompose(A: Dense, hessian_perturbation: float, rtol: float) -> SpectralInverse:
    """Return the inverse by the eigendecomposition of the matrix."""
    check_dense_memory(A, EIGEN_COPIES)
    eigenvalues, eigenvectors = torch.linalg.eigh(A.matrix)
    rounding = torch.finfo(A.dtype).eps ** 0.5 * float(eigenvalues.abs().max())
    if A.is_psd and bool((eigenvalues >= -rounding).all()):
        # Rounding alone makes zero eigenvalues slightly negative; where there is more, the claim is wrong.
        eigenvalues = eigenvalues.clamp(min=0)
    basis = Eigenvectors(eigenvectors.mT)
    return SpectralInverse(basis, eigenvalues, hessian_perturbation, name="direct", source=A, hint=A.hint, rtol=rtol)
