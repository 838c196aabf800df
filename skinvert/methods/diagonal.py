"""The inverse of the curvature's diagonal: the cheapest approximation."""

from __future__ import annotations

from typing import ClassVar

import scipy.linalg
import torch

from .._check import check_hessian_perturbation, must_be
from .._telling import warn
from ..operators import DiagonalMatrix, LinearOperator
from ..results import InverseHvpResult
from .base import InverseOperator, Method, default_tolerance, relative_residual
from .null_space import zero_cut

__all__ = ["Diagonal"]


class Diagonal(Method):
    r"""x = b / (diag(A) + λ), with the exact diagonal of the chosen curvature.

    What it inverts is diag(A) + λI, not A + λI. Entries are judged one by one, since parameters may differ in scale by
    many decades: a positive one counts, however small; one that is zero, or below it by no more than rounding of the
    largest, is zero. With λ > 0 none is left out; at λ = 0 zeros are (the pseudo-inverse), and right-hand sides with a
    part there are warned of. Negative entries, which only an indefinite curvature has, are inverted as they are, with a
    warning. ``info["residual"]`` is against the exact A + λI.

    Cost: the diagonal, one pass of per-sample gradients or Jacobians over the data (``empirical_fisher``, ``ggn``) or p
    products (``hessian``); then O(p) per right-hand side, and a product for its true residual. Memory: p numbers.

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
    cost: ClassVar[str] = "p products (Hessian) or one pass of the factor"
    memory: ClassVar[str] = "p"
    exactness: ClassVar[str] = "the diagonal alone"
    choose_it_for: ClassVar[str] = "the cheapest baseline; preconditioning"

    def invert(self, A: LinearOperator, hessian_perturbation: float, verbose: int = 0) -> InverseOperator:
        """Compute the diagonal of A."""
        return DiagonalInverse(A.diagonal(), hessian_perturbation, A.hint).judged_by(A)


class DiagonalInverse(InverseOperator):
    """(diag(A) + λI)⁻¹, or its pseudo-inverse."""

    _fields: ClassVar[dict[str, str]] = {
        "entries": "tensor[p]",
        "hessian_perturbation": "float",
        "hint": "str",
        "judges": "bool|missing",
        "values": "tensor[p]",
        "inverted": "tensor[p]",
        "positive_definite": "bool",
    }

    approximate = True
    name = "diagonal"

    def __init__(self, entries: torch.Tensor, hessian_perturbation: float, hint: str) -> None:
        if not bool(torch.isfinite(entries).all()):
            raise ValueError(must_be("The curvature", "finite", "NaN or infinity", "Look at the parameters."))
        self.entries, self.hint = entries, hint
        self.hessian_perturbation = check_hessian_perturbation(hessian_perturbation)
        # A difference of terms whose size is not known: only what is negative can be told to be rounding.
        rounding = (entries < 0) & (entries >= -zero_cut(entries, 1))
        self.values = torch.where(rounding, 0.0, entries) + self.hessian_perturbation
        self.inverted = torch.where(self.values != 0, 1 / self.values, 0.0)
        least = float(self.values.min()) if len(entries) else 1.0
        self.positive_definite = least > 0
        if least < 0:
            warn(
                f"diag(A) + λI is indefinite: its smallest entry is {least:.3g}, at hessian_perturbation="
                f"{self.hessian_perturbation:.3g}. It is inverted as it is. {self.hint}",
                scipy.linalg.LinAlgWarning,
            )

    @property
    def operator(self) -> LinearOperator:
        """The diagonal matrix diag(A) + λI."""
        return DiagonalMatrix(self.values)

    @property
    def preconditions(self) -> bool:
        """Whether no entry is negative: where one is zero, so are the row and the column of a semi-definite A."""
        return bool((self.values >= 0).all())

    def solve(self, B: torch.Tensor) -> InverseHvpResult:
        """Return the solutions, or pseudo-solutions where an entry is zero.

        ``info`` holds ``residual`` (k,) against the exact A + λI, ``converged`` (k,) by it,
        ``residual_of_approximation`` (k,), of diag(A) + λI, and ``approximate`` True.
        """
        X = self.apply(B)
        own = relative_residual(self.operator, B, X)
        outside = (B * (self.inverted == 0)).norm(dim=1) > default_tolerance(B.dtype) * B.norm(dim=1)
        if bool(outside.any()):
            warn(
                f"diag(A) + λI is singular ({int((self.inverted == 0).sum())} of {self.size} entries are zero) and "
                f"{int(outside.sum())} of {len(B)} right-hand sides have a part there: it is left out. "
                "Try hessian_perturbation > 0.",
                scipy.linalg.LinAlgWarning,
            )
        return InverseHvpResult(X, self.verdict(B, X, own, outside))

    def apply(self, V: torch.Tensor) -> torch.Tensor:
        """Return the solutions alone."""
        return V * self.inverted

    def precondition(self, R: torch.Tensor) -> torch.Tensor:
        """Return the solutions, with r itself where an entry is zero, so that no direction is lost."""
        return torch.where(self.inverted == 0, R, R * self.inverted)

    def at(self, hessian_perturbation: float) -> DiagonalInverse:
        """Return the inverse at another λ, from the same diagonal."""
        other = DiagonalInverse(self.entries, hessian_perturbation, self.hint)
        return other.judged_as(self)
