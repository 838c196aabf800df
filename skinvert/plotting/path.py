"""The λ-path: the score that chooses λ, and the residual of solutions, at each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .._check import check_rows, must_be
from .._types import Array
from ..inverter import HessianInverter
from ..perturbation import check_perturbation, resolve
from ..selection import HessianInverterCV
from .canvas import canvas
from .given import finite, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import PathCollection
    from matplotlib.container import ErrorbarContainer
    from matplotlib.lines import Line2D

__all__ = ["PathDisplay"]

# A λ far too small scores thousands of times worse: the others would seem to be one line.
WIDE = 30


class PathDisplay:
    """The cross-validated score at each λ, and the largest relative residual of some right-hand sides.

    Scores on the left axis, with ± one standard deviation over the folds; residuals on the right one.

    Parameters
    ----------
    hessian_perturbations : array of shape (m,)
        λ ≥ 0.
    scores : array of shape (m,) or (m, n_splits), default=None
        Held-out quadratics, larger is better; −inf where A is indefinite, which is marked and not drawn.
    residuals : array of shape (m,) or (m, k), default=None
        ‖Ax − b‖ / ‖b‖ of k right-hand sides; the largest is drawn.
    chosen : float, default=None
        The λ that was chosen.

    Attributes
    ----------
    mean, deviation : ndarray of shape (m,) or None
        Of the scores over the folds.
    ax_, figure_ : matplotlib Axes and Figure
        Where scores are drawn; residuals alone too.
    residual_ax_ : matplotlib Axes or None
        Where residuals are.
    score_line_, residual_line_, chosen_line_, indefinite_ : matplotlib artists or None
        What is drawn.

    Examples
    --------
    >>> from skinvert.plotting import PathDisplay
    >>> display = PathDisplay([0.1, 0.01], [[1.0, 3.0], [0.0, 2.0]])
    >>> display.hessian_perturbations, display.mean  # ascending
    (array([0.01, 0.1 ]), array([1., 2.]))
    """

    def __init__(
        self,
        hessian_perturbations: Array,
        scores: Array = None,
        *,
        residuals: Array = None,
        chosen: float | None = None,
    ) -> None:
        shifts = finite(hessian_perturbations, "hessian_perturbations").ravel()
        if (shifts < 0).any():
            raise ValueError(must_be("hessian_perturbations", "non-negative", f"{shifts.min():.3g}"))
        if scores is None and residuals is None:
            raise ValueError(must_be("scores and residuals", "given, one of them or both", "none"))
        order = np.argsort(shifts, kind="stable")
        self.hessian_perturbations, self.chosen = shifts[order], chosen
        self.scores, self.residuals = _columns(scores, "scores", order), _columns(residuals, "residuals", order)
        self.mean = None if self.scores is None else self.scores.mean(axis=1)
        self.deviation = None if self.scores is None else _deviation(self.scores)

    @classmethod
    def from_predictions(
        cls,
        hessian_perturbations: Array,
        scores: Array = None,
        *,
        residuals: Array = None,
        chosen: float | None = None,
        ax: Axes | None = None,
        **line: Any,
    ) -> PathDisplay:
        """Draw scores, residuals, or both.

        Parameters
        ----------
        hessian_perturbations, scores, residuals, chosen
            As for the class.
        ax : matplotlib Axes, default=None
            None: new ones.
        **line
            For ``ax.plot`` of the scores.

        Returns
        -------
        PathDisplay
            Drawn.
        """
        return cls(hessian_perturbations, scores, residuals=residuals, chosen=chosen).plot(ax, **line)

    @classmethod
    def from_estimator(
        cls,
        inverter: HessianInverter | HessianInverterCV,
        b: Array = None,
        *,
        hessian_perturbations: Iterable[float | str] | None = None,
        ax: Axes | None = None,
        **line: Any,
    ) -> PathDisplay:
        """Draw what a search found, and the residuals of right-hand sides.

        Parameters
        ----------
        inverter : HessianInverterCV or HessianInverter
            Fitted. Of a ``HessianInverterCV`` the scores are drawn.
        b : array or tensor of shape (k, p), default=None
            Right-hand sides, solved at each λ for their residuals. A ``HessianInverter`` needs them.
        hessian_perturbations : iterable of float or str, default=None
            None: those of the search. A ``HessianInverter`` needs them, a ``HessianInverterCV`` has its own.
        ax, **line
            As for ``from_predictions``.

        Returns
        -------
        PathDisplay
            Drawn.
        """
        scores, settings = None, hessian_perturbations
        if isinstance(inverter, HessianInverterCV):
            if settings is not None:
                raise ValueError(must_be("hessian_perturbations", "None for a search, which has its own", "others"))
            settings = [entry["hessian_perturbation"] for entry in inverter.cv_results_["params"]]
            folds = range(inverter.n_splits_)
            scores = np.stack([inverter.cv_results_[f"split{i}_test_score"] for i in folds], axis=1)
        elif settings is None or b is None:
            raise ValueError(must_be("b and hessian_perturbations", "given for a HessianInverter", "none"))
        fitted = inverter.inverter_ if isinstance(inverter, HessianInverterCV) else inverter
        shifts = _absolute(settings, fitted)
        residuals = None if b is None else _residuals(fitted, b, shifts)
        chosen = fitted.hessian_perturbation_
        return cls(shifts, scores, residuals=residuals, chosen=chosen).plot(ax, **line)

    def plot(self, ax: Axes | None = None, **line: Any) -> PathDisplay:
        """Draw it.

        Parameters
        ----------
        ax, **line
            As for ``from_predictions``.

        Returns
        -------
        PathDisplay
            Itself.
        """
        self.figure_, self.ax_ = canvas(ax)
        self.residual_ax_: Axes | None = None
        self.score_line_: ErrorbarContainer | None = None
        self.indefinite_: PathCollection | None = None
        self.residual_line_: Line2D | None = None
        self.chosen_line_: Line2D | None = None
        self._scale()
        if self.mean is not None and self.deviation is not None:
            self.score_line_, self.indefinite_ = self._draw_scores(self.mean, self.deviation, line)
        if self.residuals is not None:
            self.residual_ax_ = self.ax_ if self.scores is None else self.ax_.twinx()
            self.residual_line_ = self._draw_residuals(self.residual_ax_, self.residuals.max(axis=1))
        if self.chosen is not None:
            label = f"λ = {self.chosen:.3g}"
            self.chosen_line_ = self.ax_.axvline(self.chosen, color="0.4", linestyle="--", linewidth=1, label=label)
        # Above the axes: of two scales no corner is sure to be free.
        self.ax_.legend(
            handles=self._handles(), loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=9, frameon=False
        )
        return self

    def _scale(self) -> None:
        """Make the axis logarithmic, linear below the smallest positive λ where 0 is among them."""
        positive = self.hessian_perturbations[self.hessian_perturbations > 0]
        if len(positive) == len(self.hessian_perturbations):
            self.ax_.set_xscale("log")
        elif len(positive):
            self.ax_.set_xscale("symlog", linthresh=float(positive.min()))
        self.ax_.set_xlabel("λ")

    def _draw_scores(
        self, mean: np.ndarray, deviation: np.ndarray, line: dict[str, Any]
    ) -> tuple[ErrorbarContainer, PathCollection | None]:
        shifts, held = self.hessian_perturbations, np.isfinite(mean)
        settings = {"marker": "o", "markersize": 4, "color": "C0", "capsize": 2, "label": "held-out score", **line}
        drawn = self.ax_.errorbar(shifts[held], mean[held], yerr=deviation[held], **settings)
        self.ax_.set_ylabel("Held-out score")
        best = np.abs(mean[held]).min() if held.any() else 0.0
        if best and np.ptp(mean[held]) > WIDE * best:
            self.ax_.set_yscale("symlog", linthresh=float(best))
        if held.all():
            return drawn, None
        # At the bottom of the axes, whatever the scores.
        bottom, place = np.full((~held).sum(), 0.03), self.ax_.get_xaxis_transform()
        marked: dict[str, Any] = {"marker": "x", "color": "C3", "label": "A is indefinite"}
        return drawn, self.ax_.scatter(shifts[~held], bottom, transform=place, **marked)

    def _draw_residuals(self, ax: Axes, largest: np.ndarray) -> Line2D:
        marked: dict[str, Any] = {"marker": "s", "markersize": 4, "color": "C1", "label": "largest residual"}
        (line,) = ax.plot(self.hessian_perturbations, largest, **marked)
        ax.set(ylabel="Largest relative residual", yscale="log")
        return line

    def _handles(self) -> list[Any]:
        found = [self.score_line_, self.indefinite_, self.residual_line_, self.chosen_line_]
        return [artist for artist in found if artist is not None]


def _columns(values: Array, name: str, order: np.ndarray) -> np.ndarray | None:
    """Return values (m, anything), a row each λ in the given order; scores may be −inf."""
    if values is None:
        return None
    found = np.asarray(plain(values), dtype=np.float64)
    if found.ndim not in (1, 2) or len(found) != len(order):
        must = f"of shape ({len(order)},) or ({len(order)}, ...), one row each λ"
        raise ValueError(must_be(name, must, f"shape {found.shape}"))
    if np.isnan(found).any() or (found == np.inf).any():
        raise ValueError(must_be(name, "finite, or -inf", "NaN or inf"))
    return found.reshape(len(order), -1)[order]


def _deviation(scores: np.ndarray) -> np.ndarray:
    held = np.isfinite(scores).all(axis=1)
    found = np.full(len(scores), np.nan)
    found[held] = scores[held].std(axis=1)
    return found


def _absolute(settings: Iterable[float | str], inverter: HessianInverter) -> list[float]:
    """Return λ, of shares of the mean eigenvalue too."""
    checked = [check_perturbation(setting) for setting in settings]
    return resolve(checked, inverter.curvature_, inverter.random_state)


def _residuals(inverter: HessianInverter, b: Array, shifts: list[float]) -> np.ndarray:
    """Return ‖Ax − b‖ / ‖b‖ (m, k) against the exact curvature."""
    inverse = inverter.inverse_
    if inverse is None:
        raise TypeError(must_be("method", "a Method for a path", "a function"))
    B = torch.as_tensor(plain(b)).to(inverse.device, inverse.dtype)
    check_rows(B, inverse.size)
    results = inverse.judged_by(inverter.curvature_).solve_path(B, shifts)
    return np.stack([plain(info["residual"]) for _, info in results])
