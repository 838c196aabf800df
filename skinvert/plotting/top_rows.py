"""The training rows that matter most to some test rows, as pictures or as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse

from .._check import check_number, must_be
from .._frames import Frame, has_columns
from .._types import Array
from .canvas import pyplot
from .given import Influence, finite, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["TopRowsDisplay"]

# What a table has room for.
COLUMNS = 6


class TopRowsDisplay:
    """Some test rows, each with the training rows that help or harm it most: pictures in a line, or a table.

    Parameters
    ----------
    rows : array of int of shape (n_test, k)
        Training rows, the first first.
    scores : array of shape (n_test, k)
        What removing each of them does.
    test, train : tuple (X, y)
        The test rows and all training rows: arrays, tensors or frames.
    image_shape : tuple of int, default=None
        Of a row of X as a picture, (28, 28) or (32, 32, 3); None: a table.
    row_names : sequence of length n_train, default=None
        Names of the training rows; None: their numbers.
    feature_names : sequence of str, default=None
        Names of the columns of X in a table, which shows the first six; None: a frame's own, or x0, x1, ….

    Attributes
    ----------
    axes_ : ndarray of matplotlib Axes, shape (n_test, k + 1) or (n_test, 1)
        Of pictures, the test row's first; of tables.
    ax_, figure_ : matplotlib Axes and Figure
        What these divide, and where.

    Examples
    --------
    >>> from skinvert.plotting import TopRowsDisplay
    >>> X, y = np.eye(3), np.arange(3)
    >>> display = TopRowsDisplay([[2, 0]], [[0.5, 0.1]], test=(X[:1], y[:1]), train=(X, y))
    >>> display.table(0)
    [['test', '', '0', '1', '0', '0'], ['2', '+0.5', '2', '0', '0', '1'], ['0', '+0.1', '0', '1', '0', '0']]
    """

    def __init__(
        self,
        rows: Array,
        scores: Array,
        *,
        test: tuple[Array, Array],
        train: tuple[Array, Array],
        image_shape: tuple[int, ...] | None = None,
        row_names: Sequence[object] | None = None,
        feature_names: Sequence[str] | None = None,
    ) -> None:
        self.rows, self.scores = np.asarray(plain(rows)), finite(scores, "scores")
        self.test, self.train, self.image_shape = _pair(test, "test"), _pair(train, "train"), image_shape
        n_train, n_test = _length(self.train[1]), len(self.rows)
        if self.rows.ndim != 2 or self.rows.shape != self.scores.shape or n_test != _length(self.test[1]):
            must = f"of one shape (n_test, k), n_test = {_length(self.test[1])}"
            raise ValueError(must_be("rows and scores", must, f"shapes {self.rows.shape} and {self.scores.shape}"))
        if self.rows.size and not 0 <= self.rows.min() <= self.rows.max() < n_train:
            raise ValueError(must_be("rows", f"in [0, {n_train - 1}], rows of train", f"{self.rows.max()}"))
        self.row_names = np.arange(n_train) if row_names is None else np.asarray(row_names, dtype=object)
        self.feature_names = _feature_names(self.train[0]) if feature_names is None else list(feature_names)

    @classmethod
    def from_predictions(
        cls,
        scores: Array,
        *,
        test: tuple[Array, Array],
        train: tuple[Array, Array],
        k: int = 5,
        harmful: bool = False,
        image_shape: tuple[int, ...] | None = None,
        row_names: Sequence[object] | None = None,
        feature_names: Sequence[str] | None = None,
        ax: Axes | None = None,
    ) -> TopRowsDisplay:
        """Draw the k highest entries of each row of a score matrix.

        Parameters
        ----------
        scores : array of shape (n_test, n_train)
            What removing each training row does to each test row.
        test, train, image_shape, row_names, feature_names
            As for the class.
        k : int, default=5
            How many.
        harmful : bool, default=False
            The lowest in place of these.
        ax : matplotlib Axes, default=None
            What to divide; None: a new figure.

        Returns
        -------
        TopRowsDisplay
            Drawn.
        """
        matrix = finite(scores, "scores")
        if matrix.ndim != 2 or matrix.shape[1] != _length(_pair(train, "train")[1]):
            must = f"of shape (n_test, {_length(train[1])}), a column each training row"
            raise ValueError(must_be("scores", must, f"shape {matrix.shape}"))
        k = min(check_number(k, "k", low=1, integer=True), matrix.shape[1])
        rows = np.argsort(matrix if harmful else -matrix, axis=1, kind="stable")[:, :k]
        found = np.take_along_axis(matrix, rows, axis=1)
        return cls(
            rows,
            found,
            test=test,
            train=train,
            image_shape=image_shape,
            row_names=row_names,
            feature_names=feature_names,
        ).plot(ax)

    @classmethod
    def from_estimator(
        cls,
        influence: Influence,
        X: Array,
        y: Array,
        *,
        train: tuple[Array, Array],
        k: int = 5,
        harmful: bool = False,
        image_shape: tuple[int, ...] | None = None,
        feature_names: Sequence[str] | None = None,
        ax: Axes | None = None,
    ) -> TopRowsDisplay:
        """Draw the top rows of a fitted ``InfluenceFunction``.

        Parameters
        ----------
        influence : InfluenceFunction
            Fitted on ``train``.
        X, y : array, tensor or frame of shape (n_test, ...), and targets
            The test rows.
        train, k, harmful, image_shape, feature_names, ax
            As for ``from_predictions``.

        Returns
        -------
        TopRowsDisplay
            Drawn.
        """
        if _length(_pair(train, "train")[1]) != influence.n_samples_:
            must = f"the {influence.n_samples_} rows that the influence was fitted on"
            raise ValueError(must_be("train", must, f"{_length(train[1])} rows"))
        top = influence.top((X, y), k=k, harmful=harmful)
        return cls(
            top.rows,
            top.scores,
            test=(X, y),
            train=train,
            image_shape=image_shape,
            row_names=influence.index_.tolist(),
            feature_names=feature_names,
        ).plot(ax)

    def table(self, i: int) -> list[list[str]]:
        """Return the lines of test row i's table: name, score, target and features, the test row first."""
        lines = [["test", "", *self._cells(self.test, i)]]
        for row, score in zip(self.rows[i], self.scores[i], strict=True):
            lines.append([str(self.row_names[row]), f"{score:+.3g}", *self._cells(self.train, int(row))])
        return lines

    def plot(self, ax: Axes | None = None) -> TopRowsDisplay:
        """Draw it.

        Parameters
        ----------
        ax
            As for ``from_predictions``.

        Returns
        -------
        TopRowsDisplay
            Itself.
        """
        n_test, k = self.rows.shape
        n_columns = 1 if self.image_shape is None else k + 1
        if ax is None:
            size = (7.0, 0.5 + 0.28 * (k + 2) * n_test) if self.image_shape is None else (1.2 * (k + 1), 1.5 * n_test)
            _, ax = pyplot().subplots(figsize=size, layout="constrained")
        place = ax.get_subplotspec()
        if place is None:
            raise ValueError(must_be("ax", "made by `plt.subplots` or `figure.add_subplot`", "free axes"))
        self.ax_, self.figure_ = ax, ax.figure
        ax.set_axis_off()
        grid = place.subgridspec(n_test, n_columns)
        cells = [[self.figure_.add_subplot(grid[i, j]) for j in range(n_columns)] for i in range(n_test)]
        self.axes_ = np.array(cells, dtype=object)
        for i, line in enumerate(self.axes_):
            self._draw_table(i, line[0]) if self.image_shape is None else self._draw_pictures(i, line)
        return self

    def _draw_table(self, i: int, ax: Axes) -> None:
        from matplotlib import transforms

        ax.set_axis_off()
        heads = ["row", "score", "target", *self.feature_names[:COLUMNS]]
        whole = transforms.Bbox([[0.0, 0.0], [1.0, 1.0]])
        drawn = ax.table(cellText=self.table(i), colLabels=heads, bbox=whole, edges="horizontal")
        drawn.auto_set_font_size(False)
        drawn.set_fontsize(8)

    def _draw_pictures(self, i: int, line: np.ndarray) -> None:
        _show(line[0], self._picture(self.test[0], i), f"test: {_text(_row(self.test[1], i))}")
        for ax, row, score in zip(line[1:], self.rows[i], self.scores[i], strict=True):
            title = f"{_text(_row(self.train[1], int(row)))}: {score:+.2g}"
            _show(ax, self._picture(self.train[0], int(row)), title)

    def _picture(self, X: Array, row: int) -> np.ndarray:
        values = np.asarray(_row(X, row), dtype=np.float64)
        if values.size != np.prod(self.image_shape or ()):
            got = f"{self.image_shape}"
            raise ValueError(must_be("image_shape", f"of {values.size} numbers, as a row of X has", got))
        return values.reshape(self.image_shape or ())

    def _cells(self, data: tuple[Array, Array], row: int) -> list[str]:
        features = np.asarray(_row(data[0], row), dtype=object).ravel()[:COLUMNS]
        return [_text(_row(data[1], row)), *map(_text, features)]


def _pair(data: Any, name: str) -> tuple[Array, Array]:
    if not isinstance(data, tuple) or len(data) != 2:
        raise TypeError(must_be(name, "a tuple (X, y)", f"a {type(data).__name__}"))
    X, y = plain(data[0]), plain(data[1])
    return (X.tocsr() if scipy.sparse.issparse(X) else X), y


def _length(values: Array) -> int:
    return int(np.shape(values)[0])


def _row(values: Array, row: int) -> Any:
    """Return one row, by place, dense."""
    found = values.iloc[row] if isinstance(values, Frame) else values[row]
    return found.toarray()[0] if scipy.sparse.issparse(found) else found


def _feature_names(X: Array) -> list[str]:
    if has_columns(X):
        return [str(name) for name in X.columns]
    return [f"x{j}" for j in range(int(np.prod(np.shape(X)[1:])))]


def _text(value: Any) -> str:
    number = np.asarray(value)
    return f"{value:.3g}" if number.ndim == 0 and number.dtype.kind == "f" else str(value)


def _show(ax: Axes, picture: np.ndarray, title: str) -> None:
    ax.imshow(picture, cmap="gray_r" if picture.ndim == 2 else None)
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, fontsize=8)
