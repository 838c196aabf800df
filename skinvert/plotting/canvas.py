"""Where displays draw: matplotlib, imported when it is first needed, and the axes."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

from .._check import must_be

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = ["canvas", "pyplot"]


def pyplot() -> ModuleType:
    """Return ``matplotlib.pyplot``; raise where it is not installed, naming the extra that has it."""
    try:
        import matplotlib.pyplot
    except ImportError as error:
        message = must_be(
            "matplotlib", "installed for displays", "no such package", 'Try `pip install "skinvert[plot]"`.'
        )
        raise ImportError(message) from error
    return matplotlib.pyplot


def canvas(ax: Axes | None) -> tuple[Figure | SubFigure, Axes]:
    """Return figure and axes: those that the user gave, or new ones."""
    if ax is None:
        _, ax = pyplot().subplots(layout="constrained")
    return ax.figure, ax
