"""Influence: what removing training rows does to a trained model."""

from .influence import InfluenceFunction, Top

__all__ = ["InfluenceFunction", "Top"]
