"""Which eigenvalues count as zero, which as negative, and what becomes of them: one rule for every factorisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .._check import check_choice, must_be
from .._storage import HERE, Storage, room
from ..operators import Basis, BlockBasis, zero_cut

__all__ = ["FILTERS", "InvertedSpectrum", "invert_spectrum", "without_rounding"]


def pseudo_inverse(values: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Return 1 / t, and 0 where t counts as zero."""
    return torch.where(zero, 0.0, 1 / values)


def damped(values: torch.Tensor, _zero: torch.Tensor) -> torch.Tensor:
    """Return 1 / t for every t, however near to zero."""
    if bool((values == 0).any()):
        n = int((values == 0).sum())
        hint = 'Try another hessian_perturbation, or filter="pseudo_inverse".'
        raise ValueError(must_be('θ + λ for filter="damped"', "other than 0", f"{n} that are 0", hint))
    return 1 / values


# What becomes of t = θ + λ, of which some count as zero.
FILTERS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "pseudo_inverse": pseudo_inverse,
    "damped": damped,
}


@dataclass(frozen=True)
class InvertedSpectrum:
    """The filtered inverse of θ + λ, entry by entry.

    Attributes
    ----------
    values : tensor of shape (r,)
        θ + λ.
    cuts : tensor of shape (r,)
        Within which distance of zero each counts as zero.
    inverse : tensor of shape (r,)
        f(θ + λ).
    lost : tensor of bool of shape (r,)
        Which count as zero and are left out.
    """

    values: torch.Tensor
    cuts: torch.Tensor
    inverse: torch.Tensor
    lost: torch.Tensor

    @property
    def least(self) -> float:
        """The smallest θ + λ."""
        return float(self.values.min()) if self.values.numel() else float("inf")

    @property
    def positive_definite(self) -> bool:
        """Whether every θ + λ is positive."""
        return bool((self.values > self.cuts).all())

    @property
    def n_negative(self) -> int:
        """How many θ + λ are negative."""
        return int((self.values < -self.cuts).sum())

    @property
    def n_lost(self) -> int:
        """How many are left out."""
        return int(self.lost.sum())


def invert_spectrum(
    basis: Basis,
    eigenvalues: torch.Tensor,
    hessian_perturbation: float,
    filter: str = "pseudo_inverse",
    storage: Storage = HERE,
) -> InvertedSpectrum:
    """Return f(θ + λ) of the eigenvalues θ along a basis, which says which of them round together.

    In a storage it is made one block of the basis after the other.

    Examples
    --------
    >>> from skinvert.operators import StandardBasis
    >>> invert_spectrum(StandardBasis(2), torch.tensor([0.0, 2.0]), 0.0).inverse
    tensor([0.0000, 0.5000])
    >>> invert_spectrum(StandardBasis(2), torch.tensor([0.0, 2.0]), 1e-20).inverse
    tensor([1.0000e+20, 5.0000e-01])
    """
    if storage is not HERE and isinstance(basis, BlockBasis):
        return _by_blocks(basis, eigenvalues, hessian_perturbation, filter, storage)
    values = eigenvalues + hessian_perturbation
    cuts = basis.zero_cuts(eigenvalues, hessian_perturbation)
    zero = values.abs() <= cuts
    inverse = FILTERS[check_choice(filter, "filter", FILTERS)](values, zero)
    return InvertedSpectrum(values, cuts, inverse, zero & (inverse == 0))


def _by_blocks(
    basis: BlockBasis, eigenvalues: torch.Tensor, hessian_perturbation: float, filter: str, storage: Storage
) -> InvertedSpectrum:
    numbers, device = [eigenvalues.dtype] * 3 + [torch.bool], eigenvalues.device
    storage.reserve({"inverted": sum(room(eigenvalues.shape, dtype) for dtype in numbers)})
    whole = [storage.empty(eigenvalues.shape, dtype, device, "inverted") for dtype in numbers]
    # Another λ has a file of its own, which goes with it.
    storage.close(["inverted"])
    for own, theta, *parts in zip(basis.bases, *map(basis.parts, (eigenvalues, *whole)), strict=True):
        found = invert_spectrum(own, theta, hessian_perturbation, filter)
        for part, made in zip(parts, (found.values, found.cuts, found.inverse, found.lost), strict=True):
            part.copy_(made)
    return InvertedSpectrum(*whole)


def without_rounding(entries: torch.Tensor) -> torch.Tensor:
    """Return a diagonal with 0 in place of what is negative by no more than rounding of its largest entry.

    A difference of terms whose size is not known: only what is negative can be told to be rounding.
    """
    return torch.where((entries < 0) & (entries >= -zero_cut(entries, 1)), 0.0, entries)
