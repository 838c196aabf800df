"""The spectrum of a curvature: its eigenvalues by rank, or their density, and λ among them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .._check import check_number
from .._types import Array
from ..inverter import HessianInverter
from ..results import Spectrum
from ..selection import HessianInverterCV
from .canvas import canvas
from .given import check_same_shape, finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["SpectrumDisplay"]

BINS = 30


class SpectrumDisplay:
    """Eigenvalues of H by their rank, largest first, on a logarithmic scale; of a density a histogram.

    Negative ones are drawn by their size, in another colour. Those that are 0 to rounding are counted, not drawn.

    Parameters
    ----------
    eigenvalues : array of shape (m,)
        Of H, without λ.
    weights : array of shape (m,), default=None
        The share of the spectrum at each, where they are nodes of a density; None: they are all of H's.
    hessian_perturbation : float, default=0.0
        λ; above 0 it is drawn too.

    Attributes
    ----------
    n_zero : int
        How many are 0 to rounding: at most (10 + √m) · 2.2e-16 of the largest.
    ax_, figure_ : matplotlib Axes and Figure
        Where it is drawn.
    positive_, negative_ : matplotlib artist or None
        A line, or bars, where there are such eigenvalues.
    level_ : matplotlib Line2D or None
        λ.

    Examples
    --------
    >>> from skinvert.plotting import SpectrumDisplay
    >>> SpectrumDisplay([0.0, 1.0, 10.0, -0.5]).n_zero
    1
    """

    def __init__(self, eigenvalues: Array, *, weights: Array = None, hessian_perturbation: float = 0.0) -> None:
        self.eigenvalues = finite(eigenvalues, "eigenvalues").ravel()
        self.weights = None if weights is None else finite(weights, "weights").ravel()
        if self.weights is not None:
            check_same_shape(self.weights, self.eigenvalues, ("weights", "eigenvalues"))
        self.hessian_perturbation = check_number(hessian_perturbation, "hessian_perturbation", low=0.0)
        sizes = np.abs(self.eigenvalues)
        # The rule by which methods take an eigenvalue for 0.
        self._counts = sizes > (10 + np.sqrt(len(sizes))) * np.finfo(np.float64).eps * sizes.max()
        self.n_zero = int((~self._counts).sum())

    @classmethod
    def from_predictions(
        cls, spectrum: Spectrum | Array, *, hessian_perturbation: float = 0.0, ax: Axes | None = None, **artist: Any
    ) -> SpectrumDisplay:
        """Draw eigenvalues.

        Parameters
        ----------
        spectrum : Spectrum or array of shape (m,)
            What ``HessianInverter.spectrum`` returns, or eigenvalues.
        hessian_perturbation
            As for the class.
        ax : matplotlib Axes, default=None
            None: new ones.
        **artist
            For ``ax.plot``, or ``ax.hist`` of a density.

        Returns
        -------
        SpectrumDisplay
            Drawn.
        """
        if not isinstance(spectrum, Spectrum):
            return cls(spectrum, hessian_perturbation=hessian_perturbation).plot(ax, **artist)
        weights = None if spectrum.exact else spectrum.weights
        # One eigenvalue may stand for many, such as those that a factor of few rows leaves out.
        times = np.rint(spectrum.weights / spectrum.weights.min()).astype(int) if spectrum.exact else 1
        values = np.repeat(spectrum.eigenvalues, times)
        return cls(values, weights=weights, hessian_perturbation=hessian_perturbation).plot(ax, **artist)

    @classmethod
    def from_estimator(
        cls,
        inverter: HessianInverter | HessianInverterCV,
        *,
        of: str = "curvature",
        n_probes: int = 10,
        steps: int = 60,
        ax: Axes | None = None,
        **artist: Any,
    ) -> SpectrumDisplay:
        """Draw the spectrum of a fitted inverter, and its λ.

        Parameters
        ----------
        inverter : HessianInverter or HessianInverterCV
            Fitted.
        of, n_probes, steps
            As for ``HessianInverter.spectrum``.
        ax, **artist
            As for ``from_predictions``.

        Returns
        -------
        SpectrumDisplay
            Drawn.
        """
        found = inverter.spectrum(of=of, n_probes=n_probes, steps=steps)
        return cls.from_predictions(found, hessian_perturbation=inverter.hessian_perturbation_, ax=ax, **artist)

    def plot(self, ax: Axes | None = None, **artist: Any) -> SpectrumDisplay:
        """Draw it.

        Parameters
        ----------
        ax, **artist
            As for ``from_predictions``.

        Returns
        -------
        SpectrumDisplay
            Itself.
        """
        self.figure_, self.ax_ = canvas(ax)
        draw = self._draw_ranks if self.weights is None else self._draw_density
        zeros = f" ({self.n_zero} more are 0)" if self.n_zero else ""
        self.positive_ = draw(self._counts & (self.eigenvalues > 0), f"positive{zeros}", {"color": "C0", **artist})
        self.negative_ = draw(self._counts & (self.eigenvalues < 0), "negative, by size", {"color": "C3"})
        self.level_ = None
        if self.hessian_perturbation:
            line = self.ax_.axhline if self.weights is None else self.ax_.axvline
            label = f"λ = {self.hessian_perturbation:.3g}"
            self.level_ = line(self.hessian_perturbation, color="0.4", linestyle="--", linewidth=1, label=label)
        self.ax_.legend()
        return self

    def _draw_ranks(self, chosen: np.ndarray, label: str, settings: dict[str, Any]) -> Any:
        self.ax_.set(xlabel="Rank", ylabel="Eigenvalue", yscale="log")
        if not chosen.any():
            return None
        sizes = np.sort(np.abs(self.eigenvalues[chosen]))[::-1]
        marked = {"marker": ".", "linestyle": "none" if len(sizes) < 3 else "-", "label": label, **settings}
        (line,) = self.ax_.plot(np.arange(1, len(sizes) + 1), sizes, **marked)
        return line

    def _draw_density(self, chosen: np.ndarray, label: str, settings: dict[str, Any]) -> Any:
        self.ax_.set(xlabel="Eigenvalue", ylabel="Share of the spectrum", xscale="log")
        if self.weights is None or not chosen.any():
            return None
        sizes = np.abs(self.eigenvalues[self._counts])
        # A little beyond the ends: rounding of the edges must leave none out.
        bins = np.geomspace(sizes.min() * 0.99, sizes.max() * 1.01, BINS + 1)
        drawn = {"bins": bins, "alpha": 0.6, "label": label, **settings}
        _, _, bars = self.ax_.hist(np.abs(self.eigenvalues[chosen]), weights=self.weights[chosen], **drawn)
        return bars
