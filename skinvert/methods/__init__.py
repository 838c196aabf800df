"""Methods: each maps an operator A and λ to an operator of (A + λI)⁻¹."""

from .arnoldi import Arnoldi
from .auto import Auto
from .cg import CG
from .diagonal import Diagonal
from .direct import Direct
from .ekfac import EKFAC
from .harmonic_mean import HarmonicMean
from .kfac import KFAC
from .lissa import LiSSA
from .minres import MINRES
from .nystroem import Nystroem

__all__ = [
    "EKFAC",
    "KFAC",
    "CG",
    "MINRES",
    "Arnoldi",
    "Auto",
    "Diagonal",
    "Direct",
    "HarmonicMean",
    "LiSSA",
    "Nystroem",
]
