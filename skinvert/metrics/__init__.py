"""What scores are worth: held against retraining, label errors, each other and what costs nothing."""

from . import baselines
from .datamodeling import DatamodelingScore, Retrainings, linear_datamodeling_score, retrain_subsets
from .leave_one_out import leave_one_out
from .measurement import RowLoss
from .mislabelled import mislabel_auc
from .removal import RemovalCurve, removal_curve
from .stability import Stability, stability

__all__ = [
    "DatamodelingScore",
    "RemovalCurve",
    "Retrainings",
    "RowLoss",
    "Stability",
    "baselines",
    "leave_one_out",
    "linear_datamodeling_score",
    "mislabel_auc",
    "removal_curve",
    "retrain_subsets",
    "stability",
]
