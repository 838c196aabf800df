"""DataInf: the inverse of a mean taken as the mean of the samples' own inverses."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from .._check import check_hessian_perturbation, must_be
from .._memory import check_memory, rows_within
from ..operators import LinearOperator, LowRank
from ..results import InverseHvpResult
from .base import InverseOperator, Method, relative_residual, warn_of_overflow

__all__ = ["HarmonicMean"]

# Squares of the gradients' entries that are made at once.
SQUARES = 2**20


class HarmonicMean(Method):
    r"""x = Σᵢ (wᵢ/Σw) (gᵢgᵢᵀ + D)⁻¹ b, with D = λ + the penalty's diagonal: closed form, by Sherman and Morrison.

    .. math:: x = D^{-1} b - D^{-1} \sum_i \frac{w_i}{\sum w} \frac{g_i^\top D^{-1} b}{1 + g_i^\top D^{-1} g_i} g_i

    For the empirical Fisher E = Σ wᵢ gᵢgᵢᵀ / Σw; plain rows are gᵢ. An approximation: the order of mean and inverse is
    exchanged, which overstates x wherever samples differ. It is good where λ is large against ‖gᵢ‖², and exact for a
    single sample. λ > 0 is required. Cost: per-sample gradients once, then 2·n·p per right-hand side. Memory: n·p
    numbers.

    ``info["residual"]`` is against the exact E + λI, and says how good the approximation is; ``converged`` goes by it.
    The matrix that this inverts has no closed form that costs less than n²·p: ``residual_of_approximation`` is NaN.

    References
    ----------
    Kwon, Wu, Wu & Zou (2024), "DataInf: efficiently estimating data influence in LoRA-tuned LLMs and diffusion
    models", eq. 4 and 5. There λ is chosen per layer; here it is ``hessian_perturbation``.

    Examples
    --------
    One sample g = (1, 0): (ggᵀ + I)⁻¹ = diag(1/2, 1).

    >>> from skinvert.curvature import Gram
    >>> inverse = HarmonicMean().invert(Gram(torch.tensor([[1.0, 0.0]])), 1.0)
    >>> inverse.solve(torch.tensor([[2.0, 2.0]])).x
    tensor([[1., 2.]])
    """

    name: ClassVar[str] = "harmonic_mean"
    requires: ClassVar[tuple[str, ...]] = ("gradient_rows",)
    default_curvature: ClassVar[str] = "empirical_fisher"
    cost: ClassVar[str] = "one pass for the gradients; 2 n p a row"
    memory: ClassVar[str] = "n p"
    exactness: ClassVar[str] = "the mean of inverses for the inverse of a mean"
    choose_it_for: ClassVar[str] = "n small, λ large"

    def invert(self, A: Any, hessian_perturbation: float, verbose: int = 0) -> InverseOperator:
        """Compute the per-sample gradients."""
        n, p = A.factor_shape
        way_out = 'Try method="cg", which keeps no gradients, or fewer parameters with `params`.'
        check_memory(2 * n * p * A.dtype.itemsize, f"{n:,} gradients of {p:,} parameters", way_out, A.device)
        rows, weights = A.gradient_rows(verbose)
        # In place: n p numbers are held once.
        rows.mul_(weights.sqrt()[:, None])
        inverse = HarmonicMeanInverse(rows, weights, A.penalty, hessian_perturbation)
        inverse.rough = A.eps > torch.finfo(A.dtype).eps
        return inverse.judged_by(A)


class HarmonicMeanInverse(InverseOperator):
    """D⁻¹ − D⁻¹ Fᵀ diag(c) F D⁻¹, with rows fᵢ = √(wᵢ/Σw) gᵢ of F and cᵢ = 1 / (1 + gᵢᵀD⁻¹gᵢ)."""

    _fields: ClassVar[dict[str, str]] = {
        "rows": "tensor[n,p]",
        "weights": "tensor[n]",
        "judges": "bool|missing",
        "hessian_perturbation": "float",
        "scale": "float",
        "relative": "tensor[p]",
        "penalty": "tensor[p]|None",
        "shift": "tensor[p]",
        "damping": "tensor[n]",
        "rough": "bool|missing",
    }

    approximate = True
    positive_definite = True
    name = "harmonic_mean"
    # Whether the gradients were computed in a lesser dtype: then E is not at hand with them.
    rough: bool = False

    def __init__(
        self,
        rows: torch.Tensor,
        weights: torch.Tensor,
        penalty: torch.Tensor | None,
        hessian_perturbation: float,
    ) -> None:
        if not hessian_perturbation > 0:
            hint = "Each sample's own matrix is singular without it."
            raise ValueError(must_be("hessian_perturbation for harmonic_mean", "> 0", hessian_perturbation, hint))
        self.hessian_perturbation = check_hessian_perturbation(hessian_perturbation)
        self.rows, self.weights, self.penalty = rows, weights, penalty
        shift = torch.full_like(rows[0], self.hessian_perturbation, dtype=torch.float64)
        shift = shift if penalty is None else shift + penalty
        # D = s D₁ with D₁ ≥ 1: 1 / D and its products with squares overflow at a small λ, those of D₁ do not.
        self.scale = float(shift.min())
        self.shift, self.relative = shift.to(rows.dtype), (shift / self.scale).to(rows.dtype)
        # Few squares at a time stay in the caches.
        chunk = min(self._chunk(), max(1, SQUARES // rows.shape[1]))
        along = torch.cat([(part.square() @ (1 / self.relative)).double() for part in rows.split(chunk)])
        # A row of weight zero is zero: it has no part in the mean but D⁻¹.
        along = torch.where(weights > 0, along / weights.double(), 0.0)
        # D⁻¹ fᵢ cᵢ fᵢᵀ D⁻¹ = D₁⁻¹ fᵢ (s + fᵢᵀD₁⁻¹fᵢ/wᵢ)⁻¹ fᵢᵀ D₁⁻¹ / s
        self.damping = torch.where(along > 0, 1 / (self.scale + along), 0.0).to(rows.dtype)

    @property
    def operator(self) -> LinearOperator:
        """E + λI, against which the residual is taken."""
        return LowRank(self.rows, self.shift)

    @property
    def truth(self) -> LinearOperator | None:
        """The exact E + λI: with the rows at hand, in float64, where no other is."""
        double = self.exact is None and self.rows.dtype == torch.float64
        return self.operator if double else super().truth

    @property
    def takes_products(self) -> bool:
        """Whether a solve takes products with the exact curvature: the gradients are at hand."""
        return super().takes_products if self.rough else False

    def solve(self, B: torch.Tensor) -> InverseHvpResult:
        """Return the mean of the samples' solutions.

        ``info`` holds ``residual`` (k,) against the exact E + λI, ``converged`` (k,) by it,
        ``residual_of_approximation`` (k,), NaN, and ``approximate`` True.
        """
        X = self.apply(B)
        unknown = torch.full((len(B),), torch.nan, dtype=torch.float64, device=B.device)
        return InverseHvpResult(X, self.verdict(B, X, unknown))

    def true_residual(self, B: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
        """Return ‖(E + λI)x − b‖ / ‖b‖ (k,): E is at hand with its rows."""
        own = self.judges and not self.rough
        return relative_residual(self.operator, B, X) if own else super().true_residual(B, X)

    def apply(self, V: torch.Tensor) -> torch.Tensor:
        """Return the solutions alone."""
        scaled, total = V / self.relative, torch.zeros_like(V)
        chunk = self._chunk(len(V))
        for rows, damping in zip(self.rows.split(chunk), self.damping.split(chunk), strict=True):
            total += ((scaled @ rows.mT) * damping) @ rows
        X = (scaled - total / self.relative).to(torch.float64) / self.scale
        return warn_of_overflow(self.name, X.to(V.dtype))

    def at(self, hessian_perturbation: float) -> HarmonicMeanInverse:
        """Return the inverse at another λ, from the same gradients."""
        other = HarmonicMeanInverse(self.rows, self.weights, self.penalty, hessian_perturbation)
        other.rough = self.rough
        return other.judged_as(self)

    def _chunk(self, k: int = 0) -> int:
        """Rows at a time: their squares, or their products with k right-hand sides, fit the working memory."""
        return rows_within((self.rows.shape[1] + 2 * k) * self.rows.element_size())
