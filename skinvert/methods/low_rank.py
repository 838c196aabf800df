"""What arnoldi and nystroem share: the inverse of r eigenpairs plus one value on all that is orthogonal to them."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import ClassVar

import torch

from .._check import check_hessian_perturbation, must_be
from ..operators import LinearOperator, Spectral
from ..reasons import Reason, reasons
from ..results import InverseHvpResult
from .base import InverseOperator, default_tolerance, relative_residual, warn_not_converged
from .null_space import invert_spectrum, warn_of_indefinite, warn_of_null_part

__all__ = ["LowRankInverse"]


class LowRankInverse(InverseOperator):
    """Uᵀ (θ + λ)⁻¹ U + (I − UᵀU) / (λ + τ), for r eigenpairs of A; λ enters last, so that one set serves every λ.

    Where some θ + λ are zero to rounding, they are left out (the pseudo-inverse), and a right-hand side with a part
    along them is warned of.

    Parameters
    ----------
    eigenvalues : tensor of shape (r,)
        θ.
    eigenvectors : tensor of shape (r, p)
        U, orthonormal rows.
    complement : float or None
        τ, what stands for the other p − r eigenvalues of A; None leaves the complement out.
    hessian_perturbation : float
        λ.
    approximate : bool
        Whether the operator differs from the exact curvature.
    name, hint : str
        The method's name, and what to try where A + λI is indefinite.
    """

    _fields: ClassVar[dict[str, str]] = {
        "eigenvalues": "tensor[r]",
        "eigenvectors": "tensor[r,p]",
        "complement": "float|None",
        "approximate": "bool",
        "name": "str",
        "judges": "bool|missing",
        "hint": "str",
        "rtol": "float",
        "hessian_perturbation": "float",
        "rest": "float",
        "cut": "float",
        "inverted": "tensor[r]",
        "_lost": "mask[r]",
        "positive_definite": "bool",
    }
    # Whether rows that are not solved are warned of.
    _tells: bool = True
    _transient = ("exact", "_tells")

    eigenvalues: torch.Tensor

    def __init__(
        self,
        eigenvalues: torch.Tensor,
        eigenvectors: torch.Tensor,
        complement: float | None,
        hessian_perturbation: float,
        *,
        approximate: bool,
        name: str,
        hint: str = "",
    ) -> None:
        self.eigenvalues, self.eigenvectors, self.complement = eigenvalues, eigenvectors, complement
        self.approximate, self.name, self.hint = approximate, name, hint
        self.rtol = default_tolerance(eigenvectors.dtype)
        self._set(hessian_perturbation)

    @property
    def size(self) -> int:
        """Number p of parameters."""
        return self.eigenvectors.shape[1]

    @property
    def rank(self) -> int:
        """Number r of eigenpairs."""
        return len(self.eigenvalues)

    @property
    def all_eigenvalues(self) -> torch.Tensor | None:
        """All eigenvalues of the exact A, where these are all."""
        return None if self.approximate or self.rank < self.size else self.eigenvalues

    @property
    def operator(self) -> LinearOperator:
        """Uᵀ diag(θ + λ) U + (λ + τ)(I − UᵀU)."""
        return Spectral(self.eigenvalues + self.hessian_perturbation, self.eigenvectors, self.rest)

    @property
    def tolerance(self) -> float:
        """``rtol``."""
        return self.rtol

    def at(self, hessian_perturbation: float) -> LowRankInverse:
        """Return the inverse at another λ, over the same eigenpairs."""
        other = copy.copy(self)
        other._set(hessian_perturbation)
        return other

    def check(self) -> None:
        """Raise ValueError where an attribute contradicts the eigenpairs."""
        super().check()
        if self.approximate != (self.rank < self.size):
            raise ValueError(must_be("LowRankInverse.approximate", "whether eigenpairs are left out", self.approximate))

    def solve(self, B: torch.Tensor) -> InverseHvpResult:
        """Return the solutions, or pseudo-solutions where the operator is singular.

        ``info`` holds ``residual`` (k,), against the exact curvature, and ``converged`` (k,) by it;
        ``residual_of_approximation`` (k,), with what the pseudo-inverse leaves out; ``approximate``.
        """
        return self._solved(B, *self._split(B))

    def solve_path(self, B: torch.Tensor, hessian_perturbations: Iterable[float]) -> list[InverseHvpResult]:
        """Return the results at every λ: B is projected once."""
        along, across = self._split(B)
        return [self.at(shift)._solved(B, along, across) for shift in hessian_perturbations]

    def _solved(self, B: torch.Tensor, along: torch.Tensor, across: torch.Tensor) -> InverseHvpResult:
        """Solve, with the coefficients along U (k, r) and the part across (k, p)."""
        outside = self._warn_of_null_part(along, B)
        X = self._combine(along, across)
        own = relative_residual(self.operator, B, X)
        # A complement that was dropped as asked is no failure to solve.
        judged = relative_residual(self.operator, B - across, X) if self._drops else own
        if self.approximate:
            info = self.verdict(B, X, own, outside)
        else:
            info = {"residual": self.true_residual(B, X), "residual_of_approximation": own, "approximate": False}
            judged = torch.where(info["residual"].isnan(), judged, info["residual"])
            info["converged"] = converged = info["residual"] <= self.rtol
            unknown = (Reason.NOT_JUDGED, info["residual"].isnan())
            info["reason"] = reasons(converged, Reason.STAGNATED, unknown, (Reason.SINGULAR, outside))
        hint = "Try dtype=torch.float64 or a larger λ."
        if self._tells:
            warn_not_converged(self.name, judged[~outside], judged[~outside] <= self.rtol, self.rtol, hint)
        return InverseHvpResult(X, info)

    def untold(self) -> LowRankInverse:
        """Return this inverse without warnings of rows that it does not solve, for callers that solve them anew."""
        other = copy.copy(self)
        other._tells = False
        return other

    def apply(self, V: torch.Tensor) -> torch.Tensor:
        """Return the solutions alone, by two GEMMs."""
        rest = 0.0 if self._drops else 1 / self.rest
        return rest * V + ((V @ self.eigenvectors.mT) * (self.inverted - rest)) @ self.eigenvectors

    def precondition(self, R: torch.Tensor) -> torch.Tensor:
        """Return P⁻¹ r with P⁻¹ = (θ_r + λ) Uᵀ (θ + λ)⁻¹ U + (I − UᵀU), θ_r the smallest of the eigenvalues kept.

        The form of Frangella, Tropp & Udell (2023), eq. 1.3 and 5.3: the eigenvalues that are left out count as the
        smallest one kept, and not as zero.
        """
        values = self.eigenvalues + self.hessian_perturbation
        # Not R + …: what cancels along U would outweigh small values.min() / values.
        along, across = self._split(R)
        return across + (along * (values.min() / values)) @ self.eigenvectors

    @property
    def _drops(self) -> bool:
        """Whether nothing is inverted on the complement: none is wanted, or there is none."""
        return self.complement is None or self.rank == self.size

    def _set(self, hessian_perturbation: float) -> None:
        self.hessian_perturbation = check_hessian_perturbation(hessian_perturbation)
        self.rest = 0.0 if self._drops or self.complement is None else self.hessian_perturbation + self.complement
        if not self._drops and self.rest == 0:
            raise ValueError(self._singular())
        found = invert_spectrum(self.eigenvalues, self.hessian_perturbation, self.size)
        self.inverted, self._lost, self.cut = found.inverse, found.lost, found.cut
        least = min(found.least, float("inf") if self._drops else self.rest)
        self.positive_definite = found.positive_definite and (self._drops or self.rest > 0)
        if least < -found.cut:
            what = f"{self.name} found the eigenvalue {least:.3g}"
            warn_of_indefinite(what, self.hessian_perturbation, "The solution is no minimiser.", self.hint)

    def _singular(self) -> str:
        what = f"hessian_perturbation + {self.complement:.3g}" if self.complement else "hessian_perturbation"
        hint = f"The {self.size - self.rank} eigenvalues that are not computed count as {self.complement:.3g}. "
        return must_be(f"{what} for {self.name} with rank < p", "> 0", self.rest, hint + "Try 1e-3, or rank=p.")

    def _split(self, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the coefficients B Uᵀ (k, r), and the part of B across U (k, p)."""
        along = B @ self.eigenvectors.mT
        if self.rank == self.size:
            return along, torch.zeros_like(B)
        across = B - along @ self.eigenvectors
        # Twice: 1/λ would magnify what rounding leaves along U.
        more = across @ self.eigenvectors.mT
        return along + more, across - more @ self.eigenvectors

    def _combine(self, along: torch.Tensor, across: torch.Tensor) -> torch.Tensor:
        X = (along * self.inverted) @ self.eigenvectors
        return X if self._drops else X + across / self.rest

    def _warn_of_null_part(self, along: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        """Warn of rows with a part along eigenvectors that are left out, and return which they are."""
        outside = (along * self._lost).norm(dim=1) > self.rtol * B.norm(dim=1)
        warn_of_null_part(
            f"A = H + λI is singular ({int(self._lost.sum())} of {self.rank} eigenvalues are zero)",
            outside,
            f"Try hessian_perturbation > 0: eigenvalues within {self.cut:.2g} of zero count as zero.",
        )
        return outside
