"""Inversion in the space of a factor's rows, by Woodbury's identity or the singular vectors of the factor."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch

from .._check import check_hessian_perturbation, must_be
from .._memory import check_memory
from ..operators import Eigenvectors, LinearOperator, LowRank, add_to_diagonal
from ..results import InverseHvpResult
from .assembly import check_factor
from .base import InverseOperator, default_tolerance, relative_residual
from .spectral_inverse import SpectralInverse

__all__ = ["SampleSpaceInverse"]


class SampleSpaceInverse(InverseOperator):
    """Woodbury: (D + FᵀF)⁻¹ = D⁻¹ − D⁻¹Fᵀ (I + F D⁻¹ Fᵀ)⁻¹ F D⁻¹, with D = R + λ > 0 diagonal."""

    _fields: ClassVar[dict[str, str]] = {
        "rows": "tensor[r,p]",
        "rtol": "float",
        "judges": "bool|missing",
        "hessian_perturbation": "float",
        "damped": "tensor[q]|None",
        "vectors": "tensor[q,p]|missing",
        "penalty": "tensor[p]|None",
        "shift": "tensor[p]",
        "inverse_shift": "tensor[p]",
        "cholesky": "tensor[r,r]|None",
        "positive_definite": "bool",
    }

    name = "direct"
    _transient = ("exact", "_spectral")

    def __init__(
        self, A: LinearOperator, hessian_perturbation: float, shift: torch.Tensor, rtol: float, verbose: int
    ) -> None:
        rows = A.factor_shape[0] if A.factor_shape else 0
        way_out = 'Try method="cg", which keeps no matrix.'
        # The factor in its parts, whole and scaled, and two matrices of r rows; at hand, it is scaled alone.
        copies = 1 if isinstance(A, LowRank) else 3
        needed = (copies * A.size + 2 * rows) * rows * A.dtype.itemsize
        check_memory(needed, f"A factor of {rows:,} rows", way_out, A.device)
        self.rows = A.factor(verbose)
        check_factor(A, self.rows, hessian_perturbation)
        self.rtol, self.penalty = rtol, A.penalty
        self._spectral: SpectralInverse | None = None
        self._factorise(shift, hessian_perturbation)
        self.positive_definite = True

    @property
    def operator(self) -> LinearOperator:
        """A + λI."""
        return LowRank(self.rows, self.shift)

    def solve(self, B: torch.Tensor) -> InverseHvpResult:
        """Return the solutions. ``info`` holds ``residual`` (k,) and ``converged`` (k,)."""
        return self.judged(B, self._refined(B))

    @property
    def gaussian(self) -> bool:
        """Whether it has ``log_det`` and ``root``: it has."""
        return True

    def log_det(self) -> float:
        """Return log det D + log det(I + F D⁻¹ Fᵀ), the matrix determinant lemma."""
        if self.cholesky is None:
            inner = -float(self.damped.double().log().sum())
        else:
            inner = 2 * float(self.cholesky.diagonal().double().log().sum())
        return float(self.shift.double().log().sum()) + inner

    @property
    def noise_size(self) -> int:
        """p, and the rows of F where these have a Cholesky factor."""
        return self.size + (0 if self.cholesky is None else len(self.rows))

    def root(self, Z: torch.Tensor) -> torch.Tensor:
        """Return y − D⁻¹Fᵀ (I + F D⁻¹ Fᵀ)⁻¹ (F y + ε), with z = (D^½ y, ε): a draw of y, conditioned on F y + ε = 0.

        By singular vectors D^-½ (I − VᵀV + Vᵀ (1 + σ²)^-½ V) z.
        """
        if self.cholesky is None:
            return self._apply_by_vectors(Z, self.damped.sqrt(), torch.ones_like(self.inverse_shift))
        y = Z[:, : self.size] * self.inverse_shift.sqrt()
        inner = torch.cholesky_solve((y @ self.rows.mT + Z[:, self.size :]).mT, self.cholesky).mT
        return y - (inner @ self.rows) * self.inverse_shift

    @property
    def moves(self) -> bool:
        """Whether another λ needs no factorisation: here it does."""
        return False

    @property
    def takes_products(self) -> bool:
        """Whether a solve takes products with the exact curvature: its factor is at hand."""
        return False

    @property
    def tolerance(self) -> float:
        """``rtol``."""
        return self.rtol

    def at(self, hessian_perturbation: float) -> InverseOperator:
        """Return the inverse at another λ: from the singular vectors of F where R is a multiple of I, else anew."""
        R = self.penalty
        if R is None or bool((R == R[0]).all()):
            if self._spectral is None:
                _check_svd(self.rows, 2)
                _, sizes, vectors = torch.linalg.svd(self.rows, full_matrices=False)
                rest = 0.0 if R is None else float(R[0])
                self._spectral = SpectralInverse(
                    Eigenvectors(vectors),
                    sizes.square() + rest,
                    hessian_perturbation,
                    name=self.name,
                    complement=rest,
                    source=LowRank(self.rows, R),
                    rtol=self.rtol,
                )
            return self._spectral.at(hessian_perturbation)
        return self._anew(hessian_perturbation)

    def _anew(self, hessian_perturbation: float) -> SampleSpaceInverse:
        R = torch.zeros_like(self.shift) if self.penalty is None else self.penalty
        shift = R + check_hessian_perturbation(hessian_perturbation)
        if not bool((shift > 0).all()):
            what, got = "hessian_perturbation for fewer rows than parameters", hessian_perturbation
            raise ValueError(must_be(what, "> 0 where the penalty is 0", got, "Try 1e-3."))
        other = copy.copy(self)
        other._factorise(shift, hessian_perturbation)
        return other

    def solve_path(self, B: torch.Tensor, hessian_perturbations: Iterable[float]) -> list[InverseHvpResult]:
        """Return the results at every λ: a row that the singular vectors do not serve is solved as by ``solve``."""
        shifts = list(hessian_perturbations)
        first = self.at(shifts[0]) if shifts else self
        if not isinstance(first, SpectralInverse):
            return super().solve_path(B, shifts)
        found = first.untold().solve_path(B, shifts)
        served = [bool(info["converged"].all()) for _, info in found]
        return [found[i] if served[i] else self._anew(shift).solve(B) for i, shift in enumerate(shifts)]

    def check(self) -> None:
        """Raise ValueError where the factors and the shifts contradict each other."""
        shift = torch.full_like(self.shift, self.hessian_perturbation)
        shift = shift if self.penalty is None else shift + self.penalty
        for kept, expected in ((self.shift, shift), (self.inverse_shift, 1 / shift)):
            if not torch.allclose(kept, expected, rtol=default_tolerance(self.dtype), atol=0.0):
                raise ValueError(must_be("SampleSpaceInverse's shift", "that of λ and the penalty", "another"))
        by_vectors = self.damped is not None
        incomplete = by_vectors and "vectors" not in self.__dict__
        if incomplete or by_vectors == (self.cholesky is not None) or not self.positive_definite:
            must = "a positive definite one with a Cholesky factor, or with damped and vectors"
            raise ValueError(must_be("SampleSpaceInverse", must, "both or neither"))

    def _factorise(self, shift: torch.Tensor, hessian_perturbation: float) -> None:
        self.shift, self.inverse_shift = shift, 1 / shift
        self.hessian_perturbation = float(hessian_perturbation)
        self.cholesky: torch.Tensor | None = None
        self.damped: Any = None
        core = add_to_diagonal((self.rows * self.inverse_shift) @ self.rows.mT, 1.0)
        # Its eigenvalues are 1 and more, so that 1 / ‖core‖ is its condition: Cholesky loses the 1 in what is larger.
        norm = float(core.abs().sum(0).max()) if len(core) else 1.0
        if norm * 10 * math.sqrt(max(1, len(core))) * torch.finfo(core.dtype).eps <= 1:
            cholesky, info = torch.linalg.cholesky_ex(core)
            self.cholesky = cholesky if int(info) == 0 and self._serves(cholesky) else None
        if self.cholesky is None:
            del core
            _check_svd(self.rows, 3)
            _, sizes, self.vectors = torch.linalg.svd(self.rows * self.inverse_shift.sqrt(), full_matrices=False)
            self.damped = (1 / (1 + sizes.double().square())).to(sizes)

    def _serves(self, cholesky: torch.Tensor) -> bool:
        """Tell whether the factor solves for rows in the range of F, as gradients are, well within ``rtol``."""
        self.cholesky = cholesky
        mix = torch.randn(3, len(self.rows), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        B = mix.to(self.rows) @ self.rows
        # Rounding varies by a few times between rows.
        return bool((relative_residual(self.operator, B, self._refined(B)) <= 0.1 * self.rtol).all())

    def _refined(self, B: torch.Tensor) -> torch.Tensor:
        X = self._apply(B)
        # One step of refinement, where it contracts: the difference of two large terms loses digits at a small shift.
        step = self._apply(B - self.operator.apply(X))
        return torch.where((step.norm(dim=1) < 0.5 * X.norm(dim=1))[:, None], X + step, X)

    def _apply(self, B: torch.Tensor) -> torch.Tensor:
        if self.cholesky is None:
            return self._apply_by_vectors(B, self.damped, self.inverse_shift.sqrt())
        scaled = B * self.inverse_shift
        inner = torch.cholesky_solve((scaled @ self.rows.mT).mT, self.cholesky).mT
        return scaled - (inner @ self.rows) * self.inverse_shift

    def _apply_by_vectors(self, B: torch.Tensor, damped: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
        """Return D^-½ (I − VᵀV + Vᵀ diag(damped) V) diag(inner) b, with V of F D^-½: no difference of large terms.

        The solution, with (1 + σ²)⁻¹ and D^-½.
        """
        scaled = B * inner
        along = scaled @ self.vectors.mT
        across = scaled - along @ self.vectors
        # Twice: what rounding leaves along V would not be damped.
        more = across @ self.vectors.mT
        across = across - more @ self.vectors
        return (((along + more) * damped) @ self.vectors + across) * self.inverse_shift.sqrt()


def _check_svd(rows: torch.Tensor, copies: int) -> None:
    """Raise MemoryError where so many copies of the factor do not fit beside it."""
    way_out = 'Try a larger hessian_perturbation, or method="cg", which keeps no matrix.'
    check_memory(copies * rows.nbytes, f"The singular vectors of {len(rows):,} rows", way_out, rows.device)
