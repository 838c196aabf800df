"""Exact powers of two that bring rows near one: squares and products then neither over- nor underflow."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from ._check import all_finite

__all__ = ["ScaledProducts", "exponents", "far_exponents", "lost_rows", "norms", "times_powers"]

# Magnitudes within 2 ** ± this are left as they are: squares of their residuals are far from the dtype's limits.
NEAR = {torch.float32: 10, torch.float64: 64}
# What brings a product that overflows, or vanishes, back into the dtype's range.
FAR = {torch.float32: 100, torch.float64: 900}
# Numbers whose copies stay in the caches.
AT_ONCE = 2**17


def norms(V: torch.Tensor) -> torch.Tensor:
    """Return the norms (k,) of rows, of squares summed in float64."""
    # Few at a time: in float64 they are copied.
    step = max(1, AT_ONCE // max(1, V.shape[-1]))
    if V.ndim != 2 or len(V) <= step:
        return torch.linalg.vector_norm(V, dim=-1, dtype=torch.float64)
    return torch.cat([torch.linalg.vector_norm(part, dim=-1, dtype=torch.float64) for part in V.split(step)])


def exponents(V: torch.Tensor) -> torch.Tensor:
    """Return e (k,), with the largest magnitude of each row in [2^(e-1), 2^e); 0 for rows of zeros."""
    if not V.numel():
        return torch.zeros(len(V), dtype=torch.int64, device=V.device)
    largest = torch.maximum(V.amax(1), -V.amin(1))
    return torch.frexp(largest.to(torch.float64)).exponent.to(torch.int64)


def far_exponents(V: torch.Tensor, near: int | None = None) -> torch.Tensor:
    """Return ``exponents`` with 0 for all that are ``near`` 0: those rows are left as they are, to the last bit."""
    e = exponents(V)
    return torch.where(e.abs() > (NEAR[V.dtype] if near is None else near), e, 0)


def times_powers(V: torch.Tensor, powers: torch.Tensor | int) -> torch.Tensor:
    """Return each row of V (..., k, p) times 2 ** its power, exact but for over- and underflow; V itself for powers 0.

    Powers are made by ``ldexp`` on the CPU, as an accelerator's ``exp2`` rounds, and applied in parts that the dtype
    can hold.
    """
    left = np.asarray(powers.cpu().numpy() if isinstance(powers, torch.Tensor) else powers)
    while left.any():
        step = np.clip(left, -FAR[V.dtype], FAR[V.dtype])
        left = left - step
        factor = torch.from_numpy(np.ldexp(1.0, np.atleast_1d(step))).to(V.device, V.dtype)
        V = V * factor[:, None]
    return V


def lost_rows(exact: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Return which rows (..., k) are not zero in ``exact``, and below the range of normal numbers in ``found``."""
    small = found.abs().amax(-1) < torch.finfo(found.dtype).tiny
    return small & (exact != 0).any(-1) if bool(small.any()) else small


class ScaledProducts:
    """V ↦ 2⁻ᵉ A v on rows near one, with 2ᵉ about the size of A: found from the first product, at no further cost.

    The size divides out of every Krylov method; as a power of two it changes no digit. Half of it goes on v and half
    on A v, so that A itself meets no extreme numbers.

    Parameters
    ----------
    apply : function
        V ↦ A v on rows.
    dtype : torch.dtype
        Of rows.
    size : float or None
        Of A, where it is known.
    """

    def __init__(
        self, apply: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype, size: float | None = None
    ) -> None:
        self.apply, self.dtype, self.far = apply, dtype, FAR[dtype]
        self.gauged, self.exponent = False, 0
        if size is not None:
            self._gauge(math.frexp(size)[1])

    def like(self, apply: Callable[[torch.Tensor], torch.Tensor]) -> ScaledProducts:
        """Return the products of another operator on the same scale."""
        other = ScaledProducts(apply, self.dtype)
        other.gauged, other.exponent = self.gauged, self.exponent
        return other

    def __call__(self, V: torch.Tensor) -> torch.Tensor:
        """Return the products of rows, each about as large as its row."""
        if not self.gauged and len(V):
            return self._first(V)
        return self._product(V, -(self.exponent // 2), -self.exponent + self.exponent // 2)

    def _product(self, V: torch.Tensor, before: int, after: int) -> torch.Tensor:
        return times_powers(self.apply(times_powers(V, before)), after)

    def _first(self, V: torch.Tensor) -> torch.Tensor:
        """Return the first products, and take the size of A from them."""
        product, shift = self.apply(V), 0
        if not all_finite(product):
            shift = -self.far
        elif float(product.abs().max()) < 2.0**-self.far:
            shift = self.far
        if shift:
            product = self.apply(times_powers(V, shift))
        some = (product != 0).any(1) & (V != 0).any(1)
        if bool(some.any()) and all_finite(product):
            # The largest over rows: no vector makes A look larger than it is.
            self._gauge(int((exponents(product[some]) - exponents(V[some])).max()) - shift)
        return times_powers(product, -self.exponent - shift)

    def _gauge(self, exponent: int) -> None:
        self.gauged, self.exponent = True, exponent if abs(exponent) > NEAR[self.dtype] else 0
