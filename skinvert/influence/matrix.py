"""The matrix of one model's scores: in blocks, into memory or a file, from where an interrupted run left it."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Self

import torch

from .._check import must_be
from .._checkpoint import NOWHERE, Checkpoint
from .._memory import check_memory, readable
from .._progress import progress_by, say
from .._types import Array
from ..checkpoint import check_path, open_file
from ..identity import Job
from ..inverter import HessianInverter
from ..methods.quadratic import Certificate
from .certified import Bounded, certified_blocks
from .course import Course, Done, Kept, Lines
from .fitted import Fitted
from .jobs import job_of
from .largest import Largest
from .normalized import normalized
from .output import Out, destination
from .scoring import Block, blocks, shifted_blocks
from .sides import RowSide, SetSide, Side

__all__ = ["Matrix"]


class Matrix(ABC):
    """The scores of a fitted ``InfluenceFunction``, whose settings these are."""

    inverter_: HessianInverter
    n_samples_: int
    removal: str
    normalize: str | None
    score_rtol: float | None
    checkpoint: str | os.PathLike[str] | None
    verbose: int
    _bounds: Bounded

    def _matrix(self, data: object, out: Out = None, checkpoint: Checkpoint = NOWHERE) -> Array:
        fitted = self._fitted()
        test, n = fitted.test(data), self.n_samples_
        dtype = fitted.model.dtype if self.score_rtol is None else torch.float64
        if out is None:
            needed, way_out = 2 * test.count * n * dtype.itemsize, "Try `top`, which holds none, or `out`."
            check_memory(needed, f"{test.count:,} × {n:,} scores", way_out, fitted.model.device)
        self._say(fitted, test.count)
        job = partial(self._scores_of, [(fitted, test)])
        scores = destination(out, (test.count, n), dtype, fitted.model.device, job)
        kept: list[Kept] = []
        if checkpoint.keeps:
            # What no block has filled is no one's memory.
            scores.array.fill_(torch.nan)
            kept = [Lines({"scores": scores.array.mT if self._transposed(test) else scores.array})]
        course = self._course(fitted, test, kept, checkpoint, scores.has)
        found = self._blocks(fitted, test, course)
        for rows, cols, block in self._under_bar(found, test.count, lambda: scores.known() + course.entries):
            scores.write(rows, cols, block)
        return scores.close()

    def _largest_of_one(self, data: object, k: int, sign: int, checkpoint: Checkpoint) -> Largest:
        """Return the largest scores times ``sign``; the matrix is not held."""
        fitted = self._fitted()
        test = fitted.test(data)
        dtype = fitted.model.dtype if self.score_rtol is None else torch.float64
        found = Largest(k, sign, dtype, (test.count, self.n_samples_))
        course = self._course(fitted, test, [found], checkpoint)
        for block in self._under_bar(self._blocks(fitted, test, course), test.count, lambda: course.entries):
            found.take(block)
        return found

    def _transposed(self, test: Side) -> bool:
        """Return whether the training rows are those that are solved."""
        return self.removal == "newton" or test.count > self.n_samples_

    def _course(
        self,
        fitted: Fitted,
        test: Side,
        kept: Sequence[Kept],
        checkpoint: Checkpoint = NOWHERE,
        has: Done | None = None,
    ) -> Course:
        """Return where the blocks begin, and what a checkpoint keeps of them."""
        if self.score_rtol is not None:
            self._bounds = Bounded.unknown(test, fitted.training)
            kept = [*kept, self._bounds.kept]
        transposed = self._transposed(test)
        counts = (self.n_samples_, test.count) if transposed else (test.count, self.n_samples_)
        return Course(fitted.model, *counts, kept, transposed=transposed, checkpoint=checkpoint, has=has)

    def _blocks(self, fitted: Fitted, test: Side, course: Course) -> Iterator[Block]:
        if self.removal == "newton":
            return shifted_blocks(test, fitted.remove(), fitted.most, course)
        if self.score_rtol is not None:
            certificate = Certificate(self.inverter_._judged("scores"))
            return certified_blocks(certificate, fitted.most, self.score_rtol, course, self._bounds)
        found = blocks(test, fitted.training, fitted.solve, fitted.most, course)
        return found if self.normalize is None else normalized(found, self.normalize, fitted, test, course.checkpoint)

    def _under_bar(self, found: Iterator[Block], n_test: int, known: Callable[[], int] = int) -> Iterator[Block]:
        """Yield the blocks under one bar, over all the passes that a matrix in chunks takes."""
        size, total = lambda block: block[2].numel(), n_test * self.n_samples_
        return progress_by(found, size, "scores", self.verbose, total, known)

    def _say(self, fitted: Fitted, n_test: int) -> None:
        n, size = self.n_samples_, fitted.model.dtype.itemsize
        solved = "training" if self.removal == "newton" or n_test > n else "test"
        chunk = f"{min(fitted.most, n if solved == 'training' else n_test):,} {solved} rows are solved at once"
        say(f"scores: {n_test:,} × {n:,}, {readable(n_test * n * size)}; {chunk}", self.verbose)

    def _scores_of(self, pairs: Sequence[tuple[Fitted, RowSide | SetSide]]) -> Job:
        """Return what tells a file of scores from others, whatever its batches and the memory."""
        return job_of(pairs, self._decisive, to_the_bit=False)

    @property
    def _decisive(self) -> dict[str, object]:
        return {"removal": self.removal, "normalize": self.normalize, "score_rtol": self.score_rtol}

    def _pairs(self, data: object) -> list[tuple[Fitted, RowSide | SetSide]]:
        """Return each model, and what is measured there of test rows; None are the training rows."""
        all_fitted = [member._fitted() for member in self._members()]
        return [(each, each.measured_training if data is None else each.test(data)) for each in all_fitted]

    @contextmanager
    def _job(self, what: str, data: object = None, **settings: object) -> Iterator[Checkpoint]:
        """Give a context its checkpoint, which is removed at its end, and stays where it raises.

        ``data`` are the test rows; None are the training rows.
        """
        check_path(self.checkpoint)
        if self.checkpoint is None:
            yield NOWHERE
            return
        pairs = self._pairs(data)
        job = job_of(pairs, {"kind of result": what, **self._decisive, **settings})
        checkpoint = open_file(self.checkpoint, job, pairs[0][0].model.device, self.verbose)
        yield checkpoint
        checkpoint.remove()

    def _of_one_file(self, out: Out) -> bool:
        """Return whether the scores of one model go to a place of the user's, which then is their only checkpoint."""
        alone = out is not None and len(self._members()) == 1
        if alone and self.checkpoint is not None and not isinstance(out, str | os.PathLike):
            hint = "A file of scores is its own checkpoint."
            raise ValueError(must_be("out beside a checkpoint", "None or a path", type(out).__name__, hint))
        return alone

    @abstractmethod
    def _fitted(self) -> Fitted: ...

    @abstractmethod
    def _members(self) -> list[Self]: ...
