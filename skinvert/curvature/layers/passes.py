"""Passes over the data in chunks of samples: each layer's inputs, and its signals direction by direction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..._memory import rows_within
from ..._progress import progress
from ...models import map_tensors
from .found import Layers
from .kinds import Inputs, Layer
from .recording import Captured, PulledBack, captured

__all__ = ["Passes", "UnexplainedError"]


class UnexplainedError(Exception):
    """Some batch uses weights in another way than the probe's samples did."""

    def __init__(self, reasons: dict[str, str]) -> None:
        super().__init__(", ".join(reasons))
        self.reasons = reasons


@dataclass
class Passes:
    """Passes of a curvature's layers over all the data.

    Parameters
    ----------
    curvature : Layered
        It says what is pulled back.
    found : Layers
        As the probe left them.
    row_bytes : int
        What a sample takes.
    verbose : int
        1 shows a progress bar.
    """

    curvature: PulledBack
    found: Layers
    row_bytes: int
    verbose: int
    chunks: int = 0

    def signals(
        self, seen: Captured, inputs: list[Inputs | None], check: bool = False
    ) -> Iterator[list[torch.Tensor | None]]:
        """Yield the signals of each direction, one of them against the derivatives by the weights."""
        # Another one in each chunk: a direction may be zero at some weights.
        chosen = self.chunks % max(1, len(seen.directions)) if check else -1
        for r, direction in enumerate(seen.directions):
            if r != chosen:
                yield seen.signals(direction, inputs)
                continue
            signals, wrong = seen.checked(direction, inputs)
            if wrong:
                raise UnexplainedError(wrong)
            yield signals

    def over(self, layers: Sequence[Layer]) -> Iterator[tuple[Captured, torch.Tensor, list[Inputs | None]]]:
        """Yield what was captured of each chunk, wᵢmᵢ / Σ wm (m,), and each layer's inputs."""
        objective = self.curvature.objective
        chunk, self.chunks = rows_within(self.row_bytes), 0
        for batch, weights in progress(objective.batches if layers else (), "layers", self.verbose):
            for start in range(0, len(weights), chunk):
                rows = slice(start, start + chunk)
                part = map_tensors(lambda tensor, rows=rows: tensor[rows], batch)
                own = weights[rows] / objective.weight_sum
                seen = captured(self.curvature, layers, self.found.attentions, part, own)
                if reasons := seen.reasons():
                    raise UnexplainedError(reasons)
                yield seen, objective.scale * own * seen.mass, seen.inputs(objective.dtype)
                self.chunks += 1
