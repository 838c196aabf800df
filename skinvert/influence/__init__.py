"""Influence: what removing training rows does to a trained model."""

from .functionals import AUROC, Accuracy, FairnessGap, WorstGroupLoss
from .influence import InfluenceFunction, Top

__all__ = ["AUROC", "Accuracy", "FairnessGap", "InfluenceFunction", "Top", "WorstGroupLoss"]
