"""Fitted scikit-learn models: their objectives, losses and parameters as a module."""

from .adapter import SklearnTwiceDifferentiable
from .affine import Affine

__all__ = ["Affine", "SklearnTwiceDifferentiable"]
