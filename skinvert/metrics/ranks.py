"""Spearman's correlation of rows, all at once and under the counts of a bootstrap sample."""

from __future__ import annotations

import numpy as np

__all__ = ["Ranked", "spearman"]


class Ranked:
    """Rows of values (t, m) whose ranks in any resample of the m columns cost no sort.

    Parameters
    ----------
    values : ndarray of shape (t, m)
        Rows.
    """

    def __init__(self, values: np.ndarray) -> None:
        t, m = values.shape
        order = values.argsort(axis=1, kind="stable")
        ascending = np.take_along_axis(values, order, axis=1)
        # Ties are of one level.
        steps = np.concatenate([np.zeros((t, 1)), ascending[:, 1:] != ascending[:, :-1]], axis=1)
        self.levels = np.empty((t, m), dtype=np.intp)
        np.put_along_axis(self.levels, order, steps.cumsum(axis=1).astype(np.intp), axis=1)
        self._flat = (self.levels + m * np.arange(t)[:, None]).ravel()

    def centred(self, counts: np.ndarray) -> np.ndarray:
        """Return ranks (t, m) less their mean, where column s is there ``counts[s]`` times; ties share theirs."""
        t, m = self.levels.shape
        held = np.bincount(self._flat, weights=np.tile(counts, t), minlength=t * m).reshape(t, m)
        ranks = held.cumsum(axis=1) - (held - 1) / 2
        return np.take_along_axis(ranks, self.levels, axis=1) - (counts.sum() + 1) / 2


def spearman(a: Ranked, b: Ranked, counts: np.ndarray | None = None) -> np.ndarray:
    """Return Spearman's correlation (t,) of each row of a with that of b.

    Zero where a, the prediction, is constant, and so predicts nothing; NaN where b is, of which nothing can be said.
    """
    counts = np.ones(a.levels.shape[1]) if counts is None else counts
    ranks, others = a.centred(counts), b.centred(counts)
    variance, other = (ranks**2) @ counts, (others**2) @ counts
    with np.errstate(invalid="ignore", divide="ignore"):
        correlation = (ranks * others) @ counts / np.sqrt(variance * other)
    correlation = np.where(variance == 0, 0.0, correlation)
    return np.where(other == 0, np.nan, correlation)
