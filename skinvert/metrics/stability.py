"""Stability: whether scores rank the training rows alike when the model is fitted again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from sklearn.utils import check_array

from .._check import check_number, must_be
from .._types import Array
from .ranks import Ranked, spearman

__all__ = ["Stability", "stability"]


class Stability(NamedTuple):
    """How far pairs of fits agree on a row of scores: unpacks as ``rank_correlation, overlap``.

    Attributes
    ----------
    rank_correlation : ndarray of shape (n_pairs, n_test)
        Spearman's correlation over the training rows; 0 where either row of scores is constant.
    overlap : ndarray of shape (n_pairs, n_test)
        The share of the k highest scores that both have, in [0, 1]; by chance k / n_train.
    """

    rank_correlation: np.ndarray
    overlap: np.ndarray


def stability(score_matrices: Sequence[Array], *, k: int = 10) -> Stability:
    """Return how far scores of several fits agree: other seeds, or bootstrap samples of the training rows.

    Parameters
    ----------
    score_matrices : sequence of arrays of shape (n_test, n_train)
        One for each fit, all for the same test and training rows. A training row that a fit did not see has a column
        of NaN; each pair of fits is compared on the rows that both saw.
    k : int, default=10
        How many of the highest scores the overlap is of.

    Returns
    -------
    Stability
        ``rank_correlation`` and ``overlap``, each (n_pairs, n_test), in the order of ``itertools.combinations``.

    Examples
    --------
    >>> a, b = [[1.0, 2.0, 3.0, 4.0]], [[2.0, 1.0, 3.0, 4.0]]
    >>> stability([a, b], k=2)
    Stability(rank_correlation=array([[0.8]]), overlap=array([[1.]]))
    """
    matrices = [_check_matrix(matrix) for matrix in score_matrices]
    if len(matrices) < 2 or len({matrix.shape for matrix in matrices}) > 1:
        got = f"shapes {[matrix.shape for matrix in matrices]}"
        raise ValueError(must_be("score_matrices", "two or more of one shape", got))
    check_number(k, "k", low=1, integer=True)
    found = [_agreement(a, b, k) for a, b in combinations(matrices, 2)]
    return Stability(np.stack([pair[0] for pair in found]), np.stack([pair[1] for pair in found]))


def _check_matrix(scores: Array) -> np.ndarray:
    scores = scores.detach().cpu().numpy() if isinstance(scores, torch.Tensor) else scores
    matrix: np.ndarray = check_array(scores, dtype=np.float64, ensure_all_finite="allow-nan", input_name="scores")
    missing = np.isnan(matrix)
    if (missing.any(axis=0) != missing.all(axis=0)).any():
        must = "NaN in the whole column of a training row, or nowhere in it"
        raise ValueError(must_be("A score matrix", must, "NaN in parts of a column"))
    return matrix


def _agreement(a: np.ndarray, b: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rank correlation and overlap, (n_test,) each, on the columns that both have."""
    both = ~(np.isnan(a[0]) | np.isnan(b[0]))
    if both.sum() <= k:
        raise ValueError(must_be("k", f"less than the {both.sum()} training rows that two fits share", k))
    a, b = a[:, both], b[:, both]
    # A constant row agrees with nothing, whichever of the two it is.
    correlation = np.nan_to_num(spearman(Ranked(a), Ranked(b)), nan=0.0)
    top = [np.argsort(-scores, axis=1, kind="stable")[:, :k] for scores in (a, b)]
    shared = [len(np.intersect1d(first, second)) / k for first, second in zip(*top, strict=True)]
    return correlation, np.array(shared)
