"""Symmetric linear operators on rows: ``A.apply(V)`` applies A to each row of V (k, p)."""

from .base import FACES, LinearOperator, add_to_diagonal, as_scipy, check_dense_memory, symmetrise
from .bases import Basis, BlockBasis, Eigenvectors, KroneckerBasis, StandardBasis, zero_cut
from .block_diagonal import BlockDiagonal
from .factors import KroneckerBlock, KroneckerFactors
from .gram import add_gram, mirrored
from .kronecker import Kronecker
from .simple import Dense, DiagonalMatrix, LowRank, Shifted
from .spectral import Spectral
from .trace_estimate import trace

__all__ = [
    "FACES",
    "Basis",
    "BlockBasis",
    "BlockDiagonal",
    "Dense",
    "DiagonalMatrix",
    "Eigenvectors",
    "Kronecker",
    "KroneckerBasis",
    "KroneckerBlock",
    "KroneckerFactors",
    "LinearOperator",
    "LowRank",
    "Shifted",
    "Spectral",
    "StandardBasis",
    "add_gram",
    "add_to_diagonal",
    "as_scipy",
    "check_dense_memory",
    "mirrored",
    "symmetrise",
    "trace",
    "zero_cut",
]
