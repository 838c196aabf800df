"""Scores divided by how far rows move the parameters, or themselves: cosine and RelatIF."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from .._checkpoint import Checkpoint
from .course import Course, Lines
from .fitted import Fitted
from .scoring import Block
from .sides import Side

__all__ = ["NORMS", "normalized"]

NORMS = (None, "cosine", "relatif", "l_relatif")


def normalized(
    blocks: Iterable[Block], norm: str, fitted: Fitted, test: Side, checkpoint: Checkpoint
) -> Iterator[Block]:
    """Yield blocks of scores divided by ‖A⁻¹bⱼ‖, √(bⱼᵀA⁻¹bⱼ), or that times √(gᵢᵀA⁻¹gᵢ); 0 / 0 is 0."""
    columns = _sizes(fitted, fitted.training, norm == "relatif", checkpoint.within("training rows"))
    ones = columns.new_ones(test.count)
    rows = _sizes(fitted, test, False, checkpoint.within("test rows")) if norm == "cosine" else ones
    for place, cols, block in blocks:
        size = rows[place, None] * columns[cols]
        yield place, cols, torch.where(size > 0, block / size, torch.zeros_like(block))


def _sizes(fitted: Fitted, side: Side, of_solutions: bool, checkpoint: Checkpoint) -> torch.Tensor:
    """Return ‖A⁻¹b‖ or √(bᵀA⁻¹b) of each gradient b of a side."""
    sizes = torch.empty(side.count, dtype=fitted.model.dtype, device=fitted.model.device)
    course = Course(fitted.model, side.count, 1, [Lines({"sizes": sizes})], checkpoint=checkpoint, stage="sizes")
    for place, gradients in side.gradients(fitted.most, course.done):
        X = fitted.solve(gradients)
        sizes[place] = X.norm(dim=1) if of_solutions else (gradients * X).sum(1).clamp(min=0).sqrt()
        course.end(place)
    return sizes
