"""Leave-one-out: what scores predict against what retraining gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .._check import must_be
from .._types import Array
from ..metrics import leave_one_out
from .canvas import canvas
from .given import Influence, check_same_shape, finite, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["LeaveOneOutDisplay"]


class LeaveOneOutDisplay:
    """Predicted against actual changes of the test rows' losses when training rows are removed.

    Points on the dashed line are predicted as they came; below it in size, underestimated.

    Parameters
    ----------
    predicted : array of shape (n_test, n_rows), or any other
        Scores.
    actual : array of the same shape
        What retraining gave.
    name : str, default=None
        In the legend.

    Attributes
    ----------
    correlation : float
        Pearson's; NaN where either is constant.
    slope : float
        Of the least-squares line through the origin, predicted by actual: 1 where the scale is right.
    ax_, figure_ : matplotlib Axes and Figure
        Where it is drawn.
    points_, line_ : matplotlib artists
        The pairs, and the line of equal values.

    Examples
    --------
    >>> from skinvert.plotting import LeaveOneOutDisplay
    >>> display = LeaveOneOutDisplay([0.5, -1.0, 1.5], [1.0, -2.0, 3.0])
    >>> round(display.correlation, 6), display.slope
    (1.0, 0.5)
    """

    def __init__(self, predicted: Array, actual: Array, *, name: str | None = None) -> None:
        self.predicted, self.actual = finite(predicted, "predicted"), finite(actual, "actual")
        check_same_shape(self.predicted, self.actual, ("predicted", "actual"))
        self.name = name
        squares = float(np.sum(self.actual**2))
        self.slope = float(np.sum(self.predicted * self.actual)) / squares if squares else np.nan
        self.correlation = _correlation(self.predicted.ravel(), self.actual.ravel())

    @classmethod
    def from_predictions(
        cls, predicted: Array, actual: Array, *, name: str | None = None, ax: Axes | None = None, **scatter: Any
    ) -> LeaveOneOutDisplay:
        """Draw scores against what ``skinvert.metrics.leave_one_out`` gave.

        Parameters
        ----------
        predicted, actual, name
            As for the class.
        ax : matplotlib Axes, default=None
            None: new ones.
        **scatter
            For ``ax.scatter``.

        Returns
        -------
        LeaveOneOutDisplay
            Drawn.
        """
        return cls(predicted, actual, name=name).plot(ax, **scatter)

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
        rows: Array = None,
        loss: object = None,
        full: object = None,
        n_jobs: int | None = None,
        name: str | None = None,
        ax: Axes | None = None,
        **scatter: Any,
    ) -> LeaveOneOutDisplay:
        """Retrain without each row, and draw the scores of a fitted ``InfluenceFunction`` against the changes.

        Parameters
        ----------
        influence : InfluenceFunction
            Fitted, of ``measurement="loss"``.
        trainer, X, y, X_test, y_test, rows, loss, full, n_jobs
            As for ``skinvert.metrics.leave_one_out``.
        name, ax, **scatter
            As for ``from_predictions``.

        Returns
        -------
        LeaveOneOutDisplay
            Drawn.
        """
        if influence.measurement != "loss":
            hint = "Retrain with your own measurement, and use `from_predictions`."
            raise ValueError(must_be("measurement", '"loss" here', repr(influence.measurement), hint))
        actual = leave_one_out(trainer, X, y, X_test, y_test, rows=rows, loss=loss, full=full, n_jobs=n_jobs)
        scores = np.asarray(plain(influence.transform((X_test, y_test))))
        return cls(scores if rows is None else scores[:, np.asarray(plain(rows))], actual, name=name).plot(
            ax, **scatter
        )

    def plot(self, ax: Axes | None = None, *, name: str | None = None, **scatter: Any) -> LeaveOneOutDisplay:
        """Draw it.

        Parameters
        ----------
        ax, name, **scatter
            As for ``from_predictions``.

        Returns
        -------
        LeaveOneOutDisplay
            Itself.
        """
        self.figure_, self.ax_ = canvas(ax)
        name = self.name if name is None else name
        facts = f"r = {self.correlation:.3f}, slope {self.slope:.2f}"
        settings = {"s": 10, "alpha": 0.6, "label": facts if name is None else f"{name}: {facts}", **scatter}
        self.points_ = self.ax_.scatter(self.actual.ravel(), self.predicted.ravel(), **settings)
        self.line_ = self.ax_.axline((0, 0), slope=1, color="0.4", linestyle="--", linewidth=1, zorder=0)
        self.ax_.set(xlabel="Change of loss by retraining", ylabel="Change of loss as predicted")
        self.ax_.legend(loc="upper left")
        return self


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / scale if scale else np.nan
