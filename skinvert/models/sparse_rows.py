"""Sparse rows that become dense a batch at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse
import torch

__all__ = ["SparseRows"]


class SparseRows:
    """A scipy sparse matrix (n, d), sliced by rows into dense tensors.

    Parameters
    ----------
    matrix : sparse matrix or array of shape (n, d)
        Kept as CSR.
    """

    def __init__(self, matrix: Any) -> None:
        self.matrix = scipy.sparse.csr_array(matrix)

    def __len__(self) -> int:
        return self.matrix.shape[0]

    def __getitem__(self, rows: slice) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.matrix[rows].toarray()))
