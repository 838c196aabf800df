"""The removal curve: what retraining without the rows of the highest scores does to the test rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from .._check import must_be
from .._types import Array
from ..metrics import RemovalCurve, removal_curve
from .canvas import canvas
from .given import Influence, finite, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["RemovalDisplay"]


class RemovalDisplay:
    """The mean change of what is measured on the test rows by how many training rows were removed.

    Parameters
    ----------
    curve : RemovalCurve
        What ``skinvert.metrics.removal_curve`` returns: ``n_removed`` (m,) and ``changes`` (m, n_test).
    name : str, default=None
        In the legend.

    Attributes
    ----------
    mean, error : ndarray of shape (m,)
        Over the test rows, and its standard error, 0 of one test row.
    ax_, figure_ : matplotlib Axes and Figure
        Where it is drawn.
    line_, band_ : matplotlib artists
        The mean, and ± one standard error.

    Examples
    --------
    >>> from skinvert.metrics import RemovalCurve
    >>> from skinvert.plotting import RemovalDisplay
    >>> display = RemovalDisplay(RemovalCurve(np.array([0, 5]), np.array([[0.0, 0.0], [1.0, 3.0]])))
    >>> display.mean, display.error
    (array([0., 2.]), array([0., 1.]))
    """

    def __init__(self, curve: RemovalCurve, *, name: str | None = None) -> None:
        n_removed, changes = curve
        self.n_removed, self.changes, self.name = finite(n_removed, "n_removed"), finite(changes, "changes"), name
        if self.changes.ndim != 2 or self.n_removed.shape != self.changes.shape[:1]:
            must = "n_removed (m,) and changes (m, n_test)"
            got = f"shapes {self.n_removed.shape} and {self.changes.shape}"
            raise ValueError(must_be("curve", must, got, "Try `skinvert.metrics.removal_curve`."))
        m = self.changes.shape[1]
        self.mean = self.changes.mean(axis=1)
        self.error = self.changes.std(axis=1, ddof=1) / np.sqrt(m) if m > 1 else np.zeros(len(self.mean))

    @classmethod
    def from_predictions(
        cls, curve: RemovalCurve, *, name: str | None = None, ax: Axes | None = None, **line: Any
    ) -> RemovalDisplay:
        """Draw a removal curve.

        Parameters
        ----------
        curve, name
            As for the class.
        ax : matplotlib Axes, default=None
            None: new ones. Several curves may share axes.
        **line
            For ``ax.plot``.

        Returns
        -------
        RemovalDisplay
            Drawn.
        """
        return cls(curve, name=name).plot(ax, **line)

    @classmethod
    def from_estimator(
        cls,
        influence: Influence,
        trainer: Any,
        X: Array,
        y: Array,
        X_test: Array,
        y_test: Array,
        *,
        fractions: Iterable[float] = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5),
        loss: object = None,
        n_jobs: int | None = None,
        name: str | None = "most helpful removed",
        ax: Axes | None = None,
        **line: Any,
    ) -> RemovalDisplay:
        """Remove the rows that help the test rows most, by a fitted ``InfluenceFunction``, retrain and draw.

        Parameters
        ----------
        influence : InfluenceFunction
            Fitted; rows go by the sum of their scores over the test rows.
        trainer, X, y, X_test, y_test, fractions, loss, n_jobs
            As for ``skinvert.metrics.removal_curve``.
        name, ax, **line
            As for ``from_predictions``.

        Returns
        -------
        RemovalDisplay
            Drawn.
        """
        scores = np.asarray(plain(influence.transform((X_test, y_test)))).sum(axis=0)
        curve = removal_curve(scores, trainer, X, y, X_test, y_test, fractions=fractions, loss=loss, n_jobs=n_jobs)
        return cls(curve, name=name).plot(ax, **line)

    def plot(self, ax: Axes | None = None, *, name: str | None = None, **line: Any) -> RemovalDisplay:
        """Draw it.

        Parameters
        ----------
        ax, name, **line
            As for ``from_predictions``.

        Returns
        -------
        RemovalDisplay
            Itself.
        """
        self.figure_, self.ax_ = canvas(ax)
        name = self.name if name is None else name
        order = np.argsort(self.n_removed, kind="stable")
        x, mean, error = self.n_removed[order], self.mean[order], self.error[order]
        (self.line_,) = self.ax_.plot(x, mean, **{"marker": "o", "markersize": 3, "label": name, **line})
        color = self.line_.get_color()
        self.band_ = self.ax_.fill_between(x, mean - error, mean + error, color=color, alpha=0.2, linewidth=0)
        self.ax_.set(xlabel="Training rows removed", ylabel="Mean change on the test rows")
        if name is not None:
            self.ax_.legend()
        return self
