"""One figure of an influence function: its rows, its spectrum, and what helps and harms some test rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .._check import check_number, must_be
from .._types import Array
from ..data import count, take
from ..inverter import HessianInverter
from .canvas import pyplot
from .given import Influence, TopRows, plain
from .spectrum import SpectrumDisplay
from .top_rows import TopRowsDisplay

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = ["report"]

NAMED = 3
# Up to so many parameters all eigenvalues take less than a second.
SPECTRUM = 1000


def report(
    influence: Influence,
    X: Array,
    y: Array = None,
    *,
    n_rows: int = 3,
    k: int = 5,
    train: tuple[Array, Array] | None = None,
    image_shape: tuple[int, ...] | None = None,
) -> Figure:
    """Return a figure of a fitted ``InfluenceFunction``, as its ``report`` does.

    Above: the self-influence of the training rows, its largest by name, and the eigenvalues of H, up to 1,000
    parameters. Below: for the first test rows, the training rows that help and harm them most, as bars, or with
    ``train`` and ``image_shape`` as pictures.

    Parameters
    ----------
    influence : InfluenceFunction
        Fitted, of one model.
    X, y : data
        Test rows.
    n_rows : int, default=3
        How many test rows are shown.
    k : int, default=5
        How many training rows for each, helpful and harmful.
    train : tuple (X, y), default=None
        The training rows, for pictures of them.
    image_shape : tuple of int, default=None
        Of a row of X as a picture.

    Returns
    -------
    matplotlib Figure
        Made by ``pyplot``; close it with ``plt.close``.
    """
    if (train is None) != (image_shape is None):
        raise ValueError(must_be("train and image_shape", "given both, or none", "one of them"))
    n_rows, k = (check_number(value, name, low=1, integer=True) for value, name in ((n_rows, "n_rows"), (k, "k")))
    data = X if y is None else (X, y)
    shown: Any = take(data, np.arange(min(n_rows, count(data)[0])))
    figure: Figure = pyplot().figure(figsize=(10, 7), layout="constrained")
    above, below = np.asarray(figure.subfigures(2, 1, height_ratios=[1, 1.2]))
    figure.suptitle(_facts(influence.inverter_, influence.n_samples_), fontsize=10)
    _draw_rows(above, influence)
    helpful, harmful = (influence._largest(shown, k, sign) for sign in (False, True))
    if train is None or image_shape is None:
        _draw_bars(below, helpful, harmful, influence.index_)
        return figure
    for part, top, name in zip(below.subfigures(1, 2), (helpful, harmful), ("help", "harm"), strict=True):
        part.suptitle(f"Rows that {name} most", fontsize=10)
        display = TopRowsDisplay(top.rows, top.scores, test=shown, train=train, image_shape=image_shape)
        display.plot(part.subplots())
    return figure


def _facts(inverter: HessianInverter, n: int) -> str:
    method = inverter.method if isinstance(inverter.method, str) else type(inverter.method).__name__
    facts = [
        f"{n:,} rows, {inverter.n_features_in_:,} parameters",
        f"{inverter.curvature_name_} by {method}, λ = {inverter.hessian_perturbation_:.3g}",
        f"gradient norm {inverter.gradient_norm_:.2g}",
    ]
    return "; ".join(facts)


def _draw_rows(above: SubFigure, influence: Influence) -> None:
    small = influence.inverter_.n_features_in_ <= SPECTRUM
    axes = above.subplots(1, 2 if small else 1, squeeze=False)[0]
    _draw_self_influence(axes[0], np.asarray(plain(influence.self_influence())), influence.index_)
    if small:
        SpectrumDisplay.from_estimator(influence.inverter_, ax=axes[1])
        axes[1].set_title("Spectrum of H", fontsize=10)


def _draw_self_influence(ax: Axes, values: np.ndarray, names: np.ndarray) -> None:
    ax.hist(values, bins=40, color="C0")
    # Few rows stand far out: on a linear scale they would not be seen.
    ax.set(xlabel="Predicted rise of a row's own loss without it", ylabel="Rows", yscale="log")
    first = np.argsort(-values, kind="stable")[:NAMED]
    named = ", ".join(f"{names[i]} ({values[i]:.2g})" for i in first)
    ax.set_title(f"Self-influence. Largest: {named}", fontsize=10)


def _draw_bars(below: SubFigure, helpful: TopRows, harmful: TopRows, names: np.ndarray) -> None:
    parts = [np.asarray(plain(part)) for part in (*_pair(helpful), *_pair(harmful))]
    axes = below.subplots(1, len(parts[0]), squeeze=False)[0]
    for i, ax in enumerate(axes):
        rows = np.concatenate([parts[0][i], parts[2][i][::-1]])
        scores = np.concatenate([parts[1][i], parts[3][i][::-1]])
        colors = np.where(scores > 0, "C0", "C3")
        ax.barh(np.arange(len(rows)), scores, color=colors)
        ax.set_yticks(np.arange(len(rows)), [str(names[row]) for row in rows], fontsize=8)
        ax.invert_yaxis()
        ax.locator_params(axis="x", nbins=4)
        # Powers of ten at each tick: beside the axis they would lie in its label.
        ax.xaxis.set_major_formatter("{x:.2g}")
        ax.axvline(0, color="0.4", linewidth=0.8)
        ax.set_title(f"Test row {i}", fontsize=10)
        ax.set_xlabel("Change when removed: helps (blue), harms (red)", fontsize=8)


def _pair(top: TopRows) -> tuple[Array, Array]:
    return top.rows, top.scores
