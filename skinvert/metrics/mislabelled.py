"""Label errors: whether a score ranks the mislabelled rows above the others."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import roc_auc_score
from sklearn.utils import column_or_1d

from .._check import must_be
from .._types import Array
from .checks import check_row_scores

__all__ = ["mislabel_auc"]


def mislabel_auc(scores: Array, is_mislabelled: Array) -> float:
    """Return the probability that a mislabelled row has a higher score than another, ties counted as half.

    Parameters
    ----------
    scores : array of shape (n,)
        One number per row, higher for suspects: self-influence, say, or a row's loss.
    is_mislabelled : array of bool of shape (n,)
        Which rows have a wrong label.

    Returns
    -------
    float
        The area under the ROC curve, in [0, 1]; 0.5 is chance.

    Examples
    --------
    Of four pairs of a wrong and a right label three are in order.

    >>> mislabel_auc([0.1, 0.4, 0.3, 0.9], [False, False, True, True])
    0.75
    """
    wrong: np.ndarray = column_or_1d(is_mislabelled)
    if wrong.dtype != bool and not np.isin(wrong, (0, 1)).all():
        raise ValueError(must_be("is_mislabelled", "of booleans", f"dtype {wrong.dtype}"))
    if len(np.unique(wrong)) < 2:
        raise ValueError(must_be("is_mislabelled", "true for some rows and false for others", "one value alone"))
    return float(roc_auc_score(wrong, check_row_scores(scores, len(wrong))))
