"""Influence: what removing training rows does to a trained model."""

from .diagnostics import Diagnostics
from .functionals import AUROC, Accuracy, FairnessGap, WorstGroupLoss
from .influence import InfluenceFunction, Top

__all__ = ["AUROC", "Accuracy", "Diagnostics", "FairnessGap", "InfluenceFunction", "Top", "WorstGroupLoss"]
