"""The matrix gᵢᵀA⁻¹bⱼ in blocks: the smaller side is solved, the other streamed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TypeAlias

import torch

from .course import Course
from .removal import Removal, Solve
from .sides import Gradients, Side

__all__ = ["Block", "blocks", "gathered", "shifted_blocks"]

# Which rows, which columns, and what is there.
Block: TypeAlias = tuple[slice, slice, torch.Tensor]


def blocks(left: Gradients, right: Gradients, solve: Solve, most: int, course: Course) -> Iterator[Block]:
    """Yield places and blocks of the matrix (left.count, right.count) of gᵢᵀA⁻¹bⱼ, from where its course has come to.

    At most so many rows, those of the right side if the course is ``transposed``, are solved and held at once; the
    other side's gradients are read once for each such chunk, and not for one that is known.
    """
    if course.transposed:
        for rows, cols, block in _solved_blocks(right, left, solve, most, course):
            yield cols, rows, block.mT
    else:
        yield from _solved_blocks(left, right, solve, most, course)


def _solved_blocks(left: Gradients, right: Gradients, solve: Solve, most: int, course: Course) -> Iterator[Block]:
    for rows, gradients in gathered(left, most, course.done):
        if course.knows(rows):
            continue
        X = course.begin(rows, partial(solve, gradients))
        for cols, block in right.along(X, course.met):
            yield rows, cols, block
            course.meet(cols.stop)
        course.end(rows)


def shifted_blocks(test: Side, removal: Removal, most: int, course: Course) -> Iterator[Block]:
    """Yield places and columns of the matrix (test.count, n) of v(θ + step) − v(θ), each by a forward pass."""
    now, rows = test.values(), slice(0, test.count)
    for place, batch, shares in removal.side.parts(removal.size(most)):
        if course.knows(place):
            continue
        left = course.rest(place)
        steps = course.begin(left, partial(removal.steps_of, batch, shares, place.start))
        for j, step in enumerate(steps, left.start):
            column = slice(j, j + 1)
            if not course.knows(column):
                yield rows, column, (test.at(step).values() - now)[:, None]
            course.end(column)


def gathered(side: Gradients, most: int, done: int = 0) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield gradients in chunks of ``most`` rows, across batches: each chunk costs a pass over the other side.

    Those of ``done`` rows, of whole chunks, are left out.
    """
    held: list[torch.Tensor] = []
    start = count = 0
    for place, gradients in side.gradients(most, done):
        if held and count + len(gradients) > most:
            yield slice(start, start + count), torch.cat(held)
            held, count = [], 0
        start = start if held else place.start
        held.append(gradients)
        count += len(gradients)
    if held:
        yield slice(start, start + count), torch.cat(held)
