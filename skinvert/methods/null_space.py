"""Which eigenvalues count as zero, which as negative, and what becomes of them: one rule for every factorisation."""

from __future__ import annotations

from dataclasses import dataclass

import scipy.linalg
import torch

from .._telling import warn

__all__ = ["InvertedSpectrum", "invert_spectrum", "warn_of_indefinite", "warn_of_null_part", "zero_cut"]


def zero_cut(values: torch.Tensor, size: int) -> float:
    """Return (10 + √p)·eps·max|θ|: how far from zero a null eigenvalue of a p × p matrix comes out by rounding.

    Within it an eigenvalue is zero, below its negative it is negative. eps is that of the dtype in which the matrix was
    made and decomposed; the rounding of p entries in a row adds up like √p, and 10 is for matrices of few.
    """
    return (10 + size**0.5) * torch.finfo(values.dtype).eps * (float(values.abs().max()) if values.numel() else 0.0)


@dataclass(frozen=True)
class InvertedSpectrum:
    """1 / (θ + λ) where that is no division by zero.

    Attributes
    ----------
    inverse : tensor
        1 / (θ + λ), of the shape of θ; 0 where it is lost.
    lost : tensor of bool
        Which θ + λ count as zero.
    least : float
        The smallest θ + λ.
    cut : float
        What counts as zero.
    """

    inverse: torch.Tensor
    lost: torch.Tensor
    least: float
    cut: float

    @property
    def positive_definite(self) -> bool:
        """Whether every θ + λ is positive."""
        return self.least > self.cut

    @property
    def indefinite(self) -> bool:
        """Whether some θ + λ is negative."""
        return self.least < -self.cut


def invert_spectrum(eigenvalues: torch.Tensor, hessian_perturbation: float, size: int) -> InvertedSpectrum:
    """Return the inverted θ + λ of a p × p matrix.

    With θ ≥ 0 and λ > 0 nothing is lost, however small λ is: θ + λ is then as exact as λ.

    Examples
    --------
    >>> invert_spectrum(torch.tensor([0.0, 2.0]), 0.0, 2).inverse
    tensor([0.0000, 0.5000])
    >>> invert_spectrum(torch.tensor([0.0, 2.0]), 1e-20, 2).inverse
    tensor([1.0000e+20, 5.0000e-01])
    """
    values = eigenvalues + hessian_perturbation
    safe = hessian_perturbation > 0 and bool((eigenvalues >= 0).all())
    cut = 0.0 if safe else zero_cut(eigenvalues, size)
    lost = values.abs() <= cut
    least = float(values.min()) if values.numel() else float("inf")
    return InvertedSpectrum(torch.where(lost, torch.zeros_like(values), 1 / values), lost, least, cut)


def warn_of_indefinite(found: str, hessian_perturbation: float, consequence: str, hint: str) -> None:
    """Warn of negative eigenvalues, which are inverted as they are."""
    warn(
        f"A = H + λI is indefinite: {found}, at hessian_perturbation={hessian_perturbation:.3g}. {consequence} {hint}",
        scipy.linalg.LinAlgWarning,
    )


def warn_of_null_part(what: str, outside: torch.Tensor, hint: str) -> None:
    """Warn of the rows with a part outside the range of a singular A + λI, which the pseudo-inverse leaves out."""
    if bool(outside.any()):
        warn(
            f"{what} and {int(outside.sum())} of {len(outside)} right-hand sides have a part outside its range: the "
            f"pseudo-inverse leaves it out. {hint}",
            scipy.linalg.LinAlgWarning,
        )
