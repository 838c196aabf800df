"""What costs next to nothing, with the shapes and signs of scores: to stand beside them in every table."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.utils import check_random_state, column_or_1d

from .._check import check_number, must_be
from .._types import Array, Globs, RandomState
from ..gradients import PerSampleGradient
from .measurement import RowLoss

__all__ = ["feature_cosine", "gradient_cosine", "gradient_dot", "gradient_norm", "random_scores", "row_loss"]


def row_loss(model: object, X: Array, y: Array, *, loss: object = None) -> np.ndarray:
    """Return the loss (n,) of each training row: like self-influence, high for rows that do not fit.

    Parameters
    ----------
    model : nn.Module, skorch net or fitted scikit-learn model
        A trained model.
    X, y : arrays or tensors of shape (n, ...)
        The training rows.
    loss : default=None
        Of a bare module, as for ``HessianInverter``.

    Examples
    --------
    >>> from sklearn.linear_model import LinearRegression
    >>> X, y = np.ones((2, 1)), np.array([0.0, 2.0])
    >>> row_loss(LinearRegression(fit_intercept=False).fit(X, y), X, y)  # ½(y − 1)²
    array([0.5, 0.5])
    """
    return RowLoss(loss).fit(model, X, y)(model, X, y)


def gradient_norm(model: object, X: Array, y: Array, *, loss: object = None, params: Globs = None) -> np.ndarray:
    """Return ‖gᵢ‖ (n,) of each training row: the root of its self-influence if H were the identity, but for 1/n.

    Parameters
    ----------
    model, loss, params
        As for ``PerSampleGradient``.
    X, y : arrays or tensors of shape (n, ...)
        The training rows.

    Examples
    --------
    >>> from sklearn.linear_model import LinearRegression
    >>> X, y = np.ones((2, 1)), np.array([0.0, 2.0])
    >>> gradient_norm(LinearRegression(fit_intercept=False).fit(X, y), X, y)  # |xᵢ (xᵢθ − yᵢ)|
    array([1., 1.])
    """
    rows = PerSampleGradient(model, loss=loss, params=params).fit_transform(X, y)
    return np.linalg.norm(_float64(rows), axis=1)


def gradient_dot(
    model: object,
    train: tuple[Array, Array],
    test: tuple[Array, Array],
    *,
    loss: object = None,
    params: Globs = None,
) -> np.ndarray:
    """Return gᵢ·gⱼ / n (n_test, n): the influence if H were the identity, positive where row j's removal hurts row i.

    Parameters
    ----------
    model, loss, params
        As for ``PerSampleGradient``.
    train, test : tuple (X, y)
        The training rows and the test rows.

    Examples
    --------
    >>> from sklearn.linear_model import LinearRegression
    >>> X, y = np.ones((2, 1)), np.array([0.0, 2.0])
    >>> model = LinearRegression(fit_intercept=False).fit(X, y)
    >>> gradient_dot(model, (X, y), (X, y))
    array([[ 0.5, -0.5],
           [-0.5,  0.5]])
    """
    g_train, g_test = _gradients(model, train, test, loss, params)
    return g_test @ g_train.T / len(g_train)


def gradient_cosine(
    model: object,
    train: tuple[Array, Array],
    test: tuple[Array, Array],
    *,
    loss: object = None,
    params: Globs = None,
) -> np.ndarray:
    """Return the cosine of gᵢ and gⱼ (n_test, n), as ``gradient_dot`` without the rows' own sizes.

    Parameters
    ----------
    model, train, test, loss, params
        As for ``gradient_dot``.

    Examples
    --------
    >>> from sklearn.linear_model import LinearRegression
    >>> X, y = np.ones((2, 1)), np.array([0.0, 2.0])
    >>> model = LinearRegression(fit_intercept=False).fit(X, y)
    >>> gradient_cosine(model, (X, y), (X, y))
    array([[ 1., -1.],
           [-1.,  1.]])
    """
    g_train, g_test = _gradients(model, train, test, loss, params)
    return cosine_similarity(g_test, g_train)


def feature_cosine(X: Array, X_test: Array, *, y: Array = None, y_test: Array = None) -> np.ndarray:
    """Return the cosine of features (n_test, n); with labels, its negative for a training row of another label.

    Rows that look alike and have one label help each other: the sign is that of scores. Features may be the inputs or
    a network's; more than one axis is flattened.

    Parameters
    ----------
    X, X_test : array or tensor of shape (n, ...) and (n_test, ...)
        Features of training and test rows.
    y, y_test : array of shape (n,) and (n_test,), default=None
        Labels, both or none.

    Examples
    --------
    >>> feature_cosine(np.eye(2), np.array([[3.0, 4.0]]), y=[0, 1], y_test=[0])
    array([[ 0.6, -0.8]])
    """
    cosine: np.ndarray = cosine_similarity(_features(X_test), _features(X))
    if (y is None) != (y_test is None):
        raise ValueError(must_be("y and y_test", "given both, or none", "one of them"))
    if y is None:
        return cosine
    same = column_or_1d(y_test)[:, None] == column_or_1d(y)[None]
    if same.shape != cosine.shape:
        raise ValueError(must_be("y and y_test", f"of lengths {cosine.shape[::-1]}", same.shape[::-1]))
    return np.where(same, cosine, -cosine)


def random_scores(n_test: int, n: int, *, random_state: RandomState = None) -> np.ndarray:
    """Return Gaussian scores (n_test, n), which know nothing.

    Parameters
    ----------
    n_test, n : int
        Numbers of test and of training rows.
    random_state : int, RandomState or None, default=None
        Draws them.

    Examples
    --------
    >>> random_scores(2, 3, random_state=0).shape
    (2, 3)
    """
    size = [check_number(value, name, low=1, integer=True) for value, name in ((n_test, "n_test"), (n, "n"))]
    drawn: np.ndarray = check_random_state(random_state).standard_normal(size)
    return drawn


def _gradients(
    model: object, train: tuple[Array, Array], test: tuple[Array, Array], loss: object, params: Globs
) -> tuple[np.ndarray, np.ndarray]:
    gradient = PerSampleGradient(model, loss=loss, params=params).fit(*train)
    return _float64(gradient.transform(train)), _float64(gradient.transform(test))


def _float64(rows: Array) -> np.ndarray:
    return np.asarray(rows.detach().cpu() if isinstance(rows, torch.Tensor) else rows, dtype=np.float64)


def _features(X: Array) -> Array:
    array = X.detach().cpu().numpy() if isinstance(X, torch.Tensor) else X
    return array.reshape(len(array), -1) if isinstance(array, np.ndarray) and array.ndim > 2 else array
