"""FᵀF of rows F, which is symmetric: its blocks on and above the diagonal, and these mirrored."""

from __future__ import annotations

import torch

__all__ = ["add_gram", "mirrored"]

# Rows of the matrix that are made at once: few are lost below the diagonal, and a GEMM keeps its rate.
STRIPE = 256


def add_gram(total: torch.Tensor, rows: torch.Tensor) -> None:
    """Add FᵀF of rows F (m, p) to a matrix (p, p), in stripes from the diagonal on: m p² operations, not 2 m p².

    What is below the diagonal of ``total`` is left as it is; ``mirrored`` makes it.
    """
    for start in range(0, len(total), STRIPE):
        total[start : start + STRIPE, start:].addmm_(rows[:, start : start + STRIPE].mT, rows[:, start:])


def mirrored(total: torch.Tensor) -> torch.Tensor:
    """Return a matrix (p, p) with what is above its diagonal below it too, in place; symmetric to the last bit.

    Examples
    --------
    >>> total = torch.zeros(2, 2)
    >>> add_gram(total, torch.tensor([[1.0, 2.0]]))
    >>> mirrored(total)
    tensor([[1., 2.],
            [2., 4.]])
    """
    for start in range(0, len(total), STRIPE):
        rows, rest = slice(start, start + STRIPE), slice(start + STRIPE, None)
        block = total[rows, rows]
        # A GEMM may add up the two halves in another order.
        total[rows, rows] = (block + block.mT) / 2
        total[rest, rows] = total[rows, rest].mT
    return total
