"""Displays in scikit-learn's manner; they need matplotlib, ``pip install "skinvert[plot]"``."""

from .detection import DetectionDisplay
from .leave_one_out import LeaveOneOutDisplay
from .path import PathDisplay
from .removal import RemovalDisplay
from .spectrum import SpectrumDisplay
from .summary import report
from .top_rows import TopRowsDisplay

__all__ = [
    "DetectionDisplay",
    "LeaveOneOutDisplay",
    "PathDisplay",
    "RemovalDisplay",
    "SpectrumDisplay",
    "TopRowsDisplay",
    "report",
]
