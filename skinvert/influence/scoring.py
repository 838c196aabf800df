"""The matrix gᵢᵀA⁻¹bⱼ in blocks: the smaller side is solved, the other streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch

from .removal import Removal, Solve
from .sides import Gradients, Side

__all__ = ["Block", "Done", "blocks", "gathered", "shifted_blocks"]

# Which rows, which columns, and what is there.
Block: TypeAlias = tuple[slice, slice, torch.Tensor]
# Of rows and columns, whether they are known already.
Done: TypeAlias = Callable[[slice, slice], bool]


def blocks(left: Gradients, right: Gradients, solve: Solve, most: int, done: Done) -> Iterator[Block]:
    """Yield places and blocks of the matrix (left.count, right.count) of gᵢᵀA⁻¹bⱼ.

    At most so many rows are solved and held at once; the other side's gradients are read once for each such chunk, and
    not for one that is ``done``.
    """
    if left.count > right.count:
        for rows, cols, block in blocks(right, left, solve, most, lambda rows, cols: done(cols, rows)):
            yield cols, rows, block.mT
        return
    for rows, gradients in gathered(left, most):
        if done(rows, slice(0, right.count)):
            continue
        X = solve(gradients)
        for cols, block in right.along(X):
            yield rows, cols, block


def shifted_blocks(test: Side, removal: Removal, most: int, done: Done) -> Iterator[Block]:
    """Yield places and columns of the matrix (test.count, n) of v(θ + step) − v(θ), each by a forward pass."""
    now = test.values()
    for place, steps in removal.steps(most):
        for j, step in enumerate(steps, start=place.start):
            rows, column = slice(0, test.count), slice(j, j + 1)
            if not done(rows, column):
                yield rows, column, (test.at(step).values() - now)[:, None]


def gathered(side: Gradients, most: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield gradients in chunks of ``most`` rows, across batches: each chunk costs a pass over the other side."""
    held: list[torch.Tensor] = []
    start = count = 0
    for place, gradients in side.gradients(most):
        if held and count + len(gradients) > most:
            yield slice(start, start + count), torch.cat(held)
            held, start, count = [], place.start, 0
        held.append(gradients)
        count += len(gradients)
    if held:
        yield slice(start, start + count), torch.cat(held)
