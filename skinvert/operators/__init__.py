"""Symmetric linear operators on rows: ``A.apply(V)`` applies A to each row of V (k, p)."""

from .base import FACES, LinearOperator, add_to_diagonal, as_scipy, check_dense_memory, symmetrise
from .block_diagonal import BlockDiagonal
from .factors import Eigenbasis, KroneckerBlock, KroneckerFactors
from .kronecker import Kronecker, Rotated
from .simple import Dense, DiagonalMatrix, LowRank, Shifted
from .spectral import Spectral

__all__ = [
    "FACES",
    "BlockDiagonal",
    "Dense",
    "DiagonalMatrix",
    "Eigenbasis",
    "Kronecker",
    "KroneckerBlock",
    "KroneckerFactors",
    "LinearOperator",
    "LowRank",
    "Rotated",
    "Shifted",
    "Spectral",
    "add_to_diagonal",
    "as_scipy",
    "check_dense_memory",
    "symmetrise",
]
