"""Passes over the data in chunks of samples: each layer's inputs, and its signals direction by direction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from ..._check import all_finite, must_be
from ..._memory import rows_within, working_memory
from ..._progress import progress
from ...models import map_tensors
from .found import Layers
from .kinds import Inputs, Layer
from .recording import Captured, PulledBack, captured

__all__ = ["Chunk", "Kept", "Passes", "UnexplainedError"]

# Each layer's inputs on some samples, and its signals direction by direction; None where it was not called.
Chunk: TypeAlias = tuple[list[Inputs | None], Iterable[list[torch.Tensor | None]]]
# What of the working memory the signals of a pass may take until the next one.
SHARE = 8


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

    Attributes
    ----------
    batch : int
        The batch of the chunk at hand.
    rows : slice
        The chunk's rows of the data.
    """

    curvature: PulledBack
    found: Layers
    row_bytes: int
    verbose: int
    chunks: int = 0
    batch: int = 0
    rows: slice = field(default_factory=lambda: slice(0, 0))

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

    def over(
        self, layers: Sequence[Layer], done: int = 0
    ) -> Iterator[tuple[Captured, torch.Tensor, list[Inputs | None]]]:
        """Yield what was captured of each chunk, wᵢmᵢ / Σ wm (m,), and each layer's inputs; not of the first rows."""
        objective = self.curvature.objective
        chunk, self.chunks, offset = rows_within(self.row_bytes), 0, 0
        left = layers and done < objective.batches.n_samples
        batches = progress(objective.batches if left else (), "layers", self.verbose)
        for self.batch, (batch, weights) in enumerate(batches):
            first = min(max(0, done - offset), len(weights))
            self.chunks += -(-first // chunk)
            for start in range(first, len(weights), chunk):
                rows = slice(start, start + chunk)
                self.rows = slice(offset + start, offset + min(start + chunk, len(weights)))
                part = map_tensors(lambda tensor, rows=rows: tensor[rows], batch)
                own = weights[rows] / objective.weight_sum
                seen = captured(self.curvature, layers, self.found.attentions, part, own)
                if reasons := seen.reasons():
                    raise UnexplainedError(reasons)
                yield seen, objective.scale * own * seen.mass, seen.inputs(objective.dtype)
                self.chunks += 1
            offset += len(weights)

    def check_finite(self, what: str, layers: Sequence[Layer], sums: Sequence[torch.Tensor]) -> None:
        """Raise ValueError, with the name of the layer and the batch, where a layer's sums are not finite any more."""
        # One look at the device for all of them.
        if not sums or all_finite(torch.stack([tensor.sum() for tensor in sums])):
            return
        for layer, tensor in zip(layers, sums, strict=True):
            if not all_finite(tensor):
                place = f"batch {self.batch} (rows {self.rows.start} to {self.rows.stop - 1})"
                hint = "Try dtype=torch.float64, or look at these rows."
                raise ValueError(must_be(f"The {what} of {layer.name}", "finite", f"NaN or infinity in {place}", hint))


@dataclass
class Kept:
    """The inputs and signals of a pass for the next one, as long as all of them are few.

    Parameters
    ----------
    places : list of int
        Which of the layers the next pass is over.

    Attributes
    ----------
    chunks : list of (int, slice, Chunk)
        Batch, rows of the data, and what those layers saw; empty where they are too many, and then ``whole`` is False.
    """

    places: list[int]
    chunks: list[tuple[int, slice, Chunk]] = field(default_factory=list)
    whole: bool = True
    left: int = field(default_factory=lambda: working_memory() // SHARE)

    def taken(
        self, passes: Passes, inputs: list[Inputs | None], signals: Iterable[list[torch.Tensor | None]]
    ) -> Iterator[list[torch.Tensor | None]]:
        """Yield the signals as they come, and keep those of the next pass."""
        seen = [inputs[j] for j in self.places]
        self._pay(tensor for own in seen if own is not None for tensor in own)
        held: list[list[torch.Tensor | None]] = []
        if self.whole:
            self.chunks.append((passes.batch, passes.rows, (seen, held)))
        for parts in signals:
            own = [parts[j] for j in self.places]
            self._pay(g for g in own if g is not None)
            if self.whole:
                held.append(own)
            else:
                held.clear()
            yield parts

    def _pay(self, tensors: Iterable[torch.Tensor]) -> None:
        self.left -= sum(tensor.nbytes for tensor in tensors)
        if self.left < 0:
            self.whole = False
            self.chunks.clear()
