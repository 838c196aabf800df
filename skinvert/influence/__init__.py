"""Influence: what removing training rows does to a trained model."""

from .diagnostics import Diagnostics
from .influence import InfluenceFunction, Top

__all__ = ["Diagnostics", "InfluenceFunction", "Top"]
