"""The inverse of the curvature's diagonal: the cheapest approximation."""

from __future__ import annotations

import warnings
from typing import ClassVar

import scipy.linalg
import torch

from .. import operators
from .._validation import must_be
from ..operators import LinearOperator
from ..results import InverseHvpResult
from .base import InverseOperator, Method, relative_residual

__all__ = ["Diagonal"]


class Diagonal(Method):
    r"""x = b / (diag(A) + λ), with the exact diagonal of the chosen curvature.

    What it inverts is diag(A) + λI, not A + λI. Entries of zero at λ = 0 are left out (the pseudo-inverse), and
    right-hand sides with a part there are warned of; negative entries, which only an indefinite curvature has, are
    inverted as they are, with a warning. Cost: the diagonal, one pass of per-sample gradients or Jacobians over the
    data (``empirical_fisher``, ``ggn``) or p products (``hessian``); then O(p) per right-hand side. Memory: p numbers.

    References
    ----------
    LeCun, Denker & Solla (1990), "Optimal brain damage": the diagonal of the Hessian alone.

    Examples
    --------
    >>> from skinvert.operators import Dense
    >>> inverse = Diagonal().invert(Dense(torch.tensor([[1.0, 0.5], [0.5, 3.0]])), 1.0)
    >>> inverse.solve(torch.tensor([[2.0, 2.0]])).x
    tensor([[1.0000, 0.5000]])
    """

    name: ClassVar[str] = "diagonal"
    requires: ClassVar[tuple[str, ...]] = ("diagonal",)
    cost: ClassVar[str] = "p products (Hessian) or one pass of the factor"
    memory: ClassVar[str] = "p"
    exactness: ClassVar[str] = "the diagonal alone"
    choose_it_for: ClassVar[str] = "the cheapest baseline; preconditioning"

    def invert(self, A: LinearOperator, hessian_perturbation: float, verbose: int = 0) -> InverseOperator:
        """Compute the diagonal of A."""
        return DiagonalInverse(A.diagonal(), hessian_perturbation, A.is_psd, A.hint)


class DiagonalInverse(InverseOperator):
    """(diag(A) + λI)⁻¹, or its pseudo-inverse."""

    _fields: ClassVar[dict[str, str]] = {
        "entries": "tensor[p]",
        "shift": "float",
        "is_psd": "bool",
        "hint": "str",
        "inverted": "tensor[p]",
        "positive_definite": "bool",
    }

    def __init__(self, entries: torch.Tensor, hessian_perturbation: float, is_psd: bool, hint: str) -> None:
        if not bool(torch.isfinite(entries).all()):
            raise ValueError(must_be("The curvature", "finite", "NaN or infinity", "Look at the parameters."))
        self.entries, self.shift, self.is_psd, self.hint = entries, hessian_perturbation, is_psd, hint
        values = entries + self.shift
        # A sum of squares is exact to its last digits however small; other entries are differences of large terms.
        cut = 0.0 if is_psd else float(torch.finfo(values.dtype).eps * entries.abs().max())
        self.inverted = torch.where(values.abs() > cut, 1 / values, 0.0)
        self.positive_definite = bool((values > cut).all())
        if bool((values < -cut).any()):
            warnings.warn(
                f"diag(A) + λI is indefinite: its smallest entry is {float(values.min()):.3g}, at "
                f"hessian_perturbation={self.shift:.3g}. It is inverted as it is. {self.hint}",
                scipy.linalg.LinAlgWarning,
                stacklevel=3,
            )

    @property
    def operator(self) -> LinearOperator:  # type: ignore[override]
        """The diagonal matrix diag(A) + λI."""
        return operators.Diagonal(self.entries + self.shift)

    def solve(self, B: torch.Tensor) -> InverseHvpResult:
        """Return the solutions, or pseudo-solutions where an entry is zero.

        ``info`` holds ``residual`` (k,) and ``converged`` (k,), of diag(A) + λI, and ``approximate``.
        """
        X = B * self.inverted
        residual = relative_residual(self.operator, B, X)
        converged = residual <= 100 * torch.finfo(B.dtype).eps
        if not bool(converged.all()):
            warnings.warn(
                f"diag(A) + λI is singular ({int((self.inverted == 0).sum())} of {self.size} entries are zero) and "
                f"{int((~converged).sum())} of {len(B)} right-hand sides have a part there: it is left out. "
                "Try hessian_perturbation > 0.",
                scipy.linalg.LinAlgWarning,
                stacklevel=3,
            )
        return InverseHvpResult(X, {"residual": residual, "converged": converged, "approximate": True})

    def at(self, hessian_perturbation: float) -> DiagonalInverse:
        """Return the inverse at another λ, from the same diagonal."""
        return DiagonalInverse(self.entries, hessian_perturbation, self.is_psd, self.hint)
