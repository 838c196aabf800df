"""The held-out quadratic as a scorer, of inverters and of pipelines that end in one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import sklearn
from sklearn.base import BaseEstimator
from sklearn.frozen import FrozenEstimator
from sklearn.pipeline import Pipeline
from sklearn.utils.metadata_routing import MetadataRequest

from .._autograd import ordinary
from .._check import must_be
from .._types import Array
from ..gradients import PerSampleGradient
from ..inverter import HessianInverter
from ..models import FittedSearch
from ..scores import quadratic_path, quadratic_score
from .chosen import ChosenInverter

__all__ = ["QuadraticScorer", "make_quadratic_scorer"]


@runtime_checkable
class _Shaped(Protocol):
    """An array of any library, or a frame."""

    shape: tuple[int, ...]


class QuadraticScorer:
    """The held-out quadratic of right-hand sides B; a class, so that it can be pickled."""

    def __init__(self, rhs: Array) -> None:
        self.rhs = rhs
        self._request = MetadataRequest(owner=repr(self))
        self._request.score.add_request(param="sample_weight", alias=None)

    def set_score_request(self, *, sample_weight: bool | str | None = None) -> QuadraticScorer:
        """Say whether a search passes ``sample_weight`` on, as for scikit-learn's own scorers."""
        if not sklearn.get_config()["enable_metadata_routing"]:
            hint = "Try `sklearn.set_config(enable_metadata_routing=True)`."
            raise RuntimeError(must_be("Metadata routing", "enabled for set_score_request", "disabled", hint))
        self._request.score.add_request(param="sample_weight", alias=sample_weight)
        return self

    def get_metadata_routing(self) -> MetadataRequest:
        """Return what the scorer requests."""
        return self._request

    def _accept_sample_weight(self) -> bool:
        # What a search over several scorers asks each of them, where metadata are not routed.
        return True

    @ordinary
    def __call__(self, estimator: BaseEstimator, X: object, y: object = None, sample_weight: object = None) -> float:
        """Return the score of an inverter, or of what ends in one, on held-out data."""
        if isinstance(estimator, FittedSearch):
            # A search inside another.
            estimator = estimator.best_estimator_
        if isinstance(estimator, Pipeline):
            (X, y), estimator = _through(estimator[:-1], X, y), estimator[-1]
        if isinstance(estimator, ChosenInverter):
            estimator = estimator.inverter_
        if not isinstance(estimator, HessianInverter):
            must = "a HessianInverter, or a pipeline that ends in one"
            raise TypeError(must_be("The estimator to score", must, f"a {type(estimator).__name__}"))
        if self.rhs is None:
            return estimator.score(X, y, sample_weight)
        inverse = estimator._factorised("score")
        return quadratic_score(inverse, estimator._held_out(X, y, sample_weight), estimator._rows(self.rhs).tensor)

    @ordinary
    def path(
        self, inverter: HessianInverter, shifts: Sequence[float], test: tuple[object, object, object]
    ) -> list[float]:
        """Return the score at each λ, on the held-out ``(X, y, sample_weight)``, from one factorisation."""
        rhs = None if self.rhs is None else inverter._rows(self.rhs).tensor
        return quadratic_path(inverter._factorised("score"), shifts, inverter._held_out(*test), rhs)

    def __repr__(self) -> str:
        got = "" if self.rhs is None else f"rhs=<{type(self.rhs).__name__} of shape {tuple(self.rhs.shape)}>"
        return f"make_quadratic_scorer({got})"


def make_quadratic_scorer(rhs: Array = None) -> QuadraticScorer:
    r"""Return a scorer of inverters by the held-out quadratic of one's own right-hand sides, test gradients say.

    mean_b[ bᵀz − ½ zᵀ(H̄ + R)z ], with z the fitted inverse applied to b, H̄ the held-out rows' mean GGN (or the
    inverter's own curvature where that is positive semi-definite by construction) and R the penalty's Hessian: up to a
    constant −½ the squared error of z in the norm of H̄ + R. The rows of B are none of the held-out ones, so no row's
    own curvature is left out. −inf, with a warning, where A is not positive definite.

    Parameters
    ----------
    rhs : array or tensor of shape (k, p), default=None
        B, one right-hand side per row. None is ``HessianInverter.score``: the held-out rows' own gradients.

    Returns
    -------
    callable
        ``scorer(estimator, X, y=None, sample_weight=None)``, for ``scoring=`` of ``HessianInverterCV`` and of
        scikit-learn's searches. It scores pipelines too, ``PerSampleGradient`` with its targets among their steps. With
        scikit-learn's metadata routing, ``set_score_request(sample_weight=True)`` asks a search for the weights.

    Examples
    --------
    At the exact inverse it is ½ bᵀA⁻¹b.

    >>> import numpy as np
    >>> inverter = HessianInverter("direct").fit(np.eye(2))
    >>> make_quadratic_scorer(np.array([[1.0, 2.0]]))(inverter, np.eye(2))
    5.0
    """
    shape = tuple(rhs.shape) if isinstance(rhs, _Shaped) else None
    if rhs is not None and (shape is None or len(shape) != 2 or not shape[0]):
        got = type(rhs).__name__ if shape is None else f"shape {shape}"
        raise ValueError(must_be("rhs", "an array or tensor of shape (k, p), k ≥ 1", got, "One row per b."))
    return QuadraticScorer(rhs)


def _through(steps: Pipeline, X: object, y: object) -> tuple[object, object]:
    """Return ``(X, y)`` after the steps of a pipeline, of which one may make gradients, which have no targets."""
    for _, step in steps.steps:
        inner = step
        while isinstance(inner, FrozenEstimator):
            inner = inner.estimator
        if isinstance(inner, Pipeline):
            X, y = _through(inner, X, y)
        elif isinstance(inner, PerSampleGradient):
            X, y = inner.transform(X, y), None
        elif inner is not None and inner != "passthrough":
            X = step.transform(X)
    return X, y
