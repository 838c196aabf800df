"""What ``verbose`` shows of long work, and a fit tells scikit-learn's callbacks: bars, and lines of what was chosen.

Each bar says how much is done and estimates when the rest will be. One that an error or Ctrl-C cuts off is closed by
``closing_bars``: the traceback keeps the loop under it alive.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

__all__ = ["Task", "closing_bars", "progress", "progress_by", "say", "telling"]


class Task:
    """A fit that scikit-learn's callbacks follow; a bar directly under it is one of its tasks.

    Parameters
    ----------
    estimator : object
        Whose fit it is.
    context : sklearn.callback.CallbackContext
        Of the fit.
    """

    def __init__(self, estimator: Any, context: Any) -> None:
        self.estimator, self.context, self.open = estimator, context, True

    def begin(self, name: str, total: int | None) -> Task:
        """Tell of a task within this one, of so many steps; None is not known, 0 none."""
        inner = Task(self.estimator, self.context.subcontext(task_name=name, max_subtasks=total))
        inner.context.call_on_fit_task_begin(estimator=self.estimator)
        return inner

    def end(self, inner: Task) -> None:
        """Tell of its end; nothing where this fit has ended before, by an error."""
        if self.open:
            inner.context.call_on_fit_task_end(estimator=self.estimator)


class _Now(threading.local):
    """What is open in this thread: bars, and the fit that callbacks follow."""

    def __init__(self) -> None:
        self.bars: list[tqdm] = []
        self.task: Task | None = None


NOW = _Now()


def progress(steps: Iterable[Any], description: str, verbose: int, total: int | None = None) -> Iterator[Any]:
    """Iterate over ``steps`` under a tqdm bar, and as a task of the fit that callbacks follow, if any.

    Without a bar where ``verbose`` is 0. ``total`` is None where the steps know their number, or nobody does.
    """
    if total is None and isinstance(steps, Sized):
        total = len(steps)
    if verbose:
        steps = _under(tqdm(steps, desc=description, total=total, leave=False))
    return iter(steps) if NOW.task is None else _told(steps, NOW.task, description, total)


def progress_by(
    steps: Iterable[Any],
    size: Callable[[Any], int],
    description: str,
    verbose: int,
    total: int,
    known: Callable[[], int] = int,
) -> Iterator[Any]:
    """Iterate over steps of a ``size`` each, under a bar of their sum; ``known`` is done before the first."""
    if not verbose:
        return iter(steps)
    bar = tqdm(desc=description, total=total, initial=known(), leave=False, unit_scale=True, unit="")
    return _under(bar, _moving(bar, steps, size))


@contextmanager
def telling(task: Task) -> Iterator[None]:
    """Let bars be tasks of a fit."""
    before, NOW.task = NOW.task, task
    try:
        yield
    finally:
        NOW.task, task.open = before, False


@contextmanager
def closing_bars() -> Iterator[None]:
    """Close the bars that an error leaves open."""
    count = len(NOW.bars)
    try:
        yield
    except BaseException:
        for bar in NOW.bars[count:]:
            bar.close()
        raise


def say(what: str, verbose: int) -> None:
    """Write a line to stderr, above the bars; none where ``verbose`` is 0."""
    if verbose:
        tqdm.write(f"skinvert: {what}", file=sys.stderr)


def _under(bar: tqdm, steps: Iterable[Any] | None = None) -> Iterator[Any]:
    NOW.bars.append(bar)
    try:
        yield from bar if steps is None else steps
    finally:
        bar.close()
        # Not by equality, which for bars is that of their place on the screen; another thread may be the one to end it.
        NOW.bars[:] = [one for one in NOW.bars if one is not bar]


def _moving(bar: tqdm, steps: Iterable[Any], size: Callable[[Any], int]) -> Iterator[Any]:
    for step in steps:
        yield step
        bar.update(size(step))


def _told(steps: Iterable[Any], fit: Task, description: str, total: int | None) -> Iterator[Any]:
    """Iterate, and tell of each step; bars within a step are none of the fit's tasks."""
    task = fit.begin(description, total)
    try:
        for step in steps:
            inner, NOW.task = task.begin("step", 0), None
            yield step
            NOW.task = fit
            task.end(inner)
    finally:
        if fit.open:
            NOW.task = fit
        fit.end(task)
