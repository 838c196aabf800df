"""Label errors: how many are found by how many rows that are looked at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .._types import Array
from ..metrics import mislabel_auc
from .canvas import canvas
from .given import Influence, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["DetectionDisplay"]


class DetectionDisplay:
    """The share of the label errors found by the share of the rows that are inspected, the highest scores first.

    Parameters
    ----------
    scores : array of shape (n,)
        Higher for suspects: self-influence, or a row's loss.
    is_mislabelled : array of bool of shape (n,)
        Which rows have a wrong label.
    name : str, default=None
        In the legend.

    Attributes
    ----------
    inspected, found : ndarray of shape (n + 1,)
        Shares, from 0 to 1; of equal scores the first rows are looked at first.
    auc : float
        ``skinvert.metrics.mislabel_auc``.
    ax_, figure_ : matplotlib Axes and Figure
        Where it is drawn.
    line_ : matplotlib Line2D
        The curve.

    Examples
    --------
    >>> from skinvert.plotting import DetectionDisplay
    >>> display = DetectionDisplay([0.9, 0.1, 0.3, 0.4], [True, False, True, False])
    >>> display.found
    array([0. , 0.5, 0.5, 1. , 1. ])
    >>> display.auc
    0.75
    """

    def __init__(self, scores: Array, is_mislabelled: Array, *, name: str | None = None) -> None:
        self.auc = mislabel_auc(scores, plain(is_mislabelled))
        self.scores, self.name = np.asarray(plain(scores), dtype=np.float64), name
        self.is_mislabelled = np.asarray(plain(is_mislabelled)).astype(bool)
        wrong = self.is_mislabelled[np.argsort(-self.scores, kind="stable")]
        self.inspected = np.linspace(0, 1, len(wrong) + 1)
        self.found = np.concatenate([[0.0], wrong.cumsum() / wrong.sum()])

    @classmethod
    def from_predictions(
        cls, scores: Array, is_mislabelled: Array, *, name: str | None = None, ax: Axes | None = None, **line: Any
    ) -> DetectionDisplay:
        """Draw the curve of scores.

        Parameters
        ----------
        scores, is_mislabelled, name
            As for the class.
        ax : matplotlib Axes, default=None
            None: new ones. Several curves share axes: what they are held against is drawn once.
        **line
            For ``ax.plot``.

        Returns
        -------
        DetectionDisplay
            Drawn.
        """
        return cls(scores, is_mislabelled, name=name).plot(ax, **line)

    @classmethod
    def from_estimator(
        cls,
        influence: Influence,
        is_mislabelled: Array,
        *,
        name: str | None = "self-influence",
        ax: Axes | None = None,
        **line: Any,
    ) -> DetectionDisplay:
        """Draw the curve of a fitted ``InfluenceFunction``'s self-influence.

        Parameters
        ----------
        influence : InfluenceFunction
            Fitted on the rows.
        is_mislabelled, name, ax, **line
            As for ``from_predictions``.

        Returns
        -------
        DetectionDisplay
            Drawn.
        """
        return cls(influence.self_influence(), is_mislabelled, name=name).plot(ax, **line)

    def plot(self, ax: Axes | None = None, *, name: str | None = None, **line: Any) -> DetectionDisplay:
        """Draw it, beside what chance and a perfect ranking would find.

        Parameters
        ----------
        ax, name, **line
            As for ``from_predictions``.

        Returns
        -------
        DetectionDisplay
            Itself.
        """
        self.figure_, self.ax_ = canvas(ax)
        if not any(old.get_label() == "chance" for old in self.ax_.lines):
            self._bounds()
        name = self.name if name is None else name
        facts = f"AUC {self.auc:.3f}"
        settings = {"label": facts if name is None else f"{name}, {facts}", **line}
        (self.line_,) = self.ax_.plot(self.inspected, self.found, **settings)
        self.ax_.set(xlabel="Share of rows inspected", ylabel="Share of label errors found")
        self.ax_.legend(loc="lower right")
        return self

    def _bounds(self) -> None:
        share = self.is_mislabelled.mean()
        self.ax_.plot([0, share, 1], [0, 1, 1], color="0.7", linewidth=1, label="perfect")
        self.ax_.plot([0, 1], [0, 1], color="0.5", linewidth=1, linestyle="--", label="chance")
