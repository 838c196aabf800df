"""Fits with a checkpoint that end at a random moment: the same fit goes on from there to the same bits."""

import os
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import sklearn
from fuzz import runner
from fuzz.cases import choice
from torch.utils.data import Dataset

from skinvert import checkpoint
from skinvert.checkpoint import CheckpointFile

RESUMING = ("kfac", "ekfac", "arnoldi", "nystroem")
# The how manieth write, step or pass: a fit that has fewer is done.
MOMENTS = (1, 2, 3, 5)
# Before anything is written the rows are read so often.
PASSES = 3
# So little memory that the rows are read anew in each pass.
LITTLE = 1e-6


class StoppedError(BaseException):
    """As SIGKILL would."""


class Rows(Dataset):
    """Rows of which the last that may be read is known; the next one ends the fit, as Ctrl-C would."""

    def __init__(self, X, y):
        self.X, self.y, self.left = X, y, None

    def __len__(self):
        return len(self.X)

    def __getitem__(self, index):
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        return self.X[index], self.y[index]


def run(case, shared):
    """Return what became of a case; raise Silent where an interrupted fit goes on to another result."""
    if case.method not in RESUMING:
        case = replace(case, method=RESUMING[choice(case, "method", 4)], perturbation=case.perturbation or 0.1)
    outcome = runner.run(case, shared)
    found = runner.solved(case, shared)
    streamed = choice(case, "streamed", 5) == 0
    with tempfile.TemporaryDirectory() as folder, sklearn.config_context(**_memory(streamed)):
        _hold(case, found, Path(folder) / "fit", streamed)
    return outcome


def _hold(case, found, path, streamed):
    data = Rows(found.X, found.y) if streamed else runner.data_of(case, found.X, found.y)
    expected = _fitted(case, found, data) if streamed else (found.x, found.refusal)
    inverter = runner.inverter_of(case, found.loss, checkpoint=path)
    kept, state = {**vars(inverter)}, runner.state_of(found.module, found.X)
    try:
        with _always_due(), _stopping(case, data if streamed else None):
            fitted = runner.tried(case, lambda: inverter.fit(found.module, data, found.weights))
    except (StoppedError, KeyboardInterrupt) as stop:
        if vars(inverter) != kept:
            left = sorted({*vars(inverter)} - {*kept})
            raise runner.Changed(f"an interrupted fit leaves {left}\n{case!r}") from stop
        fitted = None
    received = _fitted(case, found, data, inverter, fitted)
    if not runner.same(state, runner.state_of(found.module, found.X)):
        raise runner.Changed(repr(case))
    _compare(case, received, expected)
    if not expected[1] and os.listdir(path.parent):
        raise runner.Silent(f"a fit that is done leaves {os.listdir(path.parent)}\n{case!r}")


def _fitted(case, found, data, inverter=None, done=None):
    """Return the solutions, and what they were refused as: of a fit that is ``done``, or of a new one."""
    inverter = runner.inverter_of(case, found.loss) if inverter is None else inverter
    _, _, refusal = done or runner.tried(case, lambda: inverter.fit(found.module, data, found.weights))
    if refusal:
        return None, refusal
    b = runner.right_hand_sides_of(case, found)
    x, _, refusal = runner.tried(case, lambda: inverter.transform(b))
    return x, refusal


def _compare(case, received, expected):
    (x, refusal), (wanted, refused) = received, expected
    if bool(refusal) != bool(refused):
        raise runner.Silent(f"refused {refusal!r}, uninterrupted {refused!r}\n{case!r}")
    if not refused and not np.array_equal(runner.as_float64(x), runner.as_float64(wanted), equal_nan=True):
        gap = (runner.as_float64(x) - runner.as_float64(wanted)).norm() / runner.as_float64(wanted).norm()
        raise runner.Silent(f"an interrupted fit goes on to another result, by {gap:.3g}\n{case!r}")


def _memory(streamed):
    return {"working_memory": LITTLE} if streamed else {}


@contextmanager
def _always_due():
    with patch.object(checkpoint, "EVERY", 0.0), patch.object(checkpoint, "SHARE", 1.0):
        yield


def _stopping(case, rows):
    """Return what lets a fit end at a moment that the case's seed says: while it reads, or before or after a write."""
    moment = MOMENTS[choice(case, "moment", len(MOMENTS))]
    if rows is not None:
        return _after_rows(rows, (moment + PASSES) * len(rows) - 1 - case.seed % len(rows))
    count, write, keep, finish = _counting(moment), CheckpointFile.write, CheckpointFile.keep, CheckpointFile.finish

    def stop_after(file):
        write(file)
        if file.stages:
            count()

    def stop_before(file):
        if file.stages:
            count()
        write(file)

    def stop_in_step(file, stage, state):
        keep(file, stage, state)
        count()

    def stop_at_end(file, stage, result, replaces=""):
        finish(file, stage, result, replaces)
        count()

    ways = {"write": stop_after}, {"write": stop_before}, {"keep": stop_in_step, "finish": stop_at_end}
    return patch.multiple(CheckpointFile, **ways[choice(case, "way", 3)])


def _counting(left):
    """Return a function that raises when it is called for the last time of so many."""

    def count():
        nonlocal left
        left -= 1
        if left == 0:
            raise StoppedError

    return count


@contextmanager
def _after_rows(rows, left):
    rows.left = left
    try:
        yield
    finally:
        rows.left = None
