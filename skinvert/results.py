"""What a solve returns, and the names of the built-in methods."""

from __future__ import annotations

import numbers
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
import torch

from ._check import must_be
from .reasons import views

__all__ = ["InverseHvpResult", "InversionMethod", "Spectrum"]


class InversionMethod(str, Enum):  # noqa: UP042 (the contract: `str, Enum`)
    """The names that the functional face fixes; a registry takes a user's own names beside them.

    Examples
    --------
    >>> InversionMethod("cg") is InversionMethod.Cg, InversionMethod.Direct == "direct"
    (True, True)
    """

    Direct = "direct"
    Cg = "cg"
    Lissa = "lissa"
    Arnoldi = "arnoldi"
    Auto = "auto"
    Minres = "minres"
    Nystroem = "nystroem"
    Kfac = "kfac"
    Ekfac = "ekfac"
    HarmonicMean = "harmonic_mean"
    Diagonal = "diagonal"


@dataclass(frozen=True)
class InverseHvpResult:
    """Solutions of (H + λI) x = b, one per row, and what is known of them.

    Unpacks as ``x, info``.

    Parameters
    ----------
    x : tensor or array of shape (k, p)
        The solutions, of the kind, dtype and device of b.
    info : dict
        Every entry that a method may tell; (k,) is one value a row, of the kind of b.

        =============================  ===============================================================================
        ``residual``                   (k,) ‖(H + λI)x − b‖ / ‖b‖, 0 where b = 0, against the exact curvature H,
                                       whatever the method inverts, recomputed after the solve: 0 is exact, and above
                                       1 x = 0 would be better. NaN where H is not at hand (an approximate method,
                                       loaded or unpickled) or not asked for (``check_residual=False``)
        ``converged``                  (k,) bool: whether that is within the tolerance; False where it is NaN
        ``reason``                     (k,) int8: the ``Reason`` of each row, which says what to try:
                                       ``Reason(info["reason"][0]).cure``
        ``stagnated``                  (k,) bool: made of ``reason``, for one release more
        ``negative_curvature``         (k,) bool: made of ``reason``, for one release more
        ``approximate``                bool: whether the method inverts another operator than H + λI
        ``residual_of_approximation``  (k,) against that operator, where there may be one; NaN too where none is asked
                                       for
        ``n_iter``                     (k,) int: iterations, of ``cg``, ``minres`` and ``lissa`` (steps of all
                                       repetitions together)
        ``n_products``                 int: products of one row with H, all rows' together, of ``cg`` and ``minres``
        ``scale``                      float: s of the steps of ``lissa``, as it was set or estimated
        ``blocks``                     list of dict: the entries of each block's own system, in their order, where
                                       ``blocks`` are inverted
        =============================  ===============================================================================

        A method or function that a user registered may tell more, and less.

    Examples
    --------
    >>> x, info = InverseHvpResult([[1.0]], {"converged": [True]})
    >>> x, info["converged"]
    ([[1.0]], [True])
    """

    x: Any
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Add what follows from the reasons, so that no method says it twice."""
        reason = self.info.get("reason")
        if isinstance(reason, torch.Tensor | np.ndarray):
            object.__setattr__(self, "info", {**self.info, **views(reason)})

    def __iter__(self) -> Iterator[Any]:
        """Yield x, then info."""
        return iter((self.x, self.info))

    def __len__(self) -> int:
        """Return 2: x and info."""
        return 2

    def __getitem__(self, index: Any) -> Any:
        """Return x for 0 and info for 1, as of the pair that it unpacks to."""
        if isinstance(index, numbers.Integral | slice):
            return (self.x, self.info)[index]
        hint = f"Try `.info[{index!r}]`." if isinstance(index, str) else "Rows of x are those of `.x`."
        raise TypeError(must_be("The index of a result", "0 for x or 1 for info", repr(index), hint))


@dataclass(frozen=True)
class Spectrum:
    """The eigenvalues of a curvature H, or nodes and weights of their density.

    The mean of f over the spectrum is ``np.sum(weights * f(eigenvalues))``; times p it is tr f(H).

    Parameters
    ----------
    eigenvalues : ndarray of shape (m,), float64
        Ascending: all of H's, or the nodes of a density.
    weights : ndarray of shape (m,), float64
        Share of the spectrum at each; their sum is 1.
    exact : bool
        Whether these are the eigenvalues themselves.
    smallest, largest : tuple of (float, float)
        The extreme eigenvalues, each with a bound of its error: an eigenvalue of H lies within it. 0 where exact.

    Examples
    --------
    >>> spectrum = Spectrum(np.array([1.0, 3.0]), np.array([0.5, 0.5]), True, (1.0, 0.0), (3.0, 0.0))
    >>> float(np.sum(spectrum.weights * np.log(spectrum.eigenvalues)))  # log det H / p
    0.549...
    """

    eigenvalues: np.ndarray
    weights: np.ndarray
    exact: bool
    smallest: tuple[float, float]
    largest: tuple[float, float]
