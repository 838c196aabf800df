"""What follows from one fitted inverter beside the matrix of scores: a row's effect on itself, groups, outputs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TypeGuard

import numpy as np
import torch

from .._check import must_be
from .._checkpoint import NOWHERE, Checkpoint
from .._memory import check_memory
from .._types import Batch
from ..curvature import split_batch
from ..data import batches_of, with_any_targets
from ..models import TorchTwiceDifferentiable, map_tensors
from .course import Course, Lines
from .fitted import Fitted
from .removal import Removal
from .scoring import blocks
from .sides import FixedGradients, RowSide, Side, moved

__all__ = ["check_groups", "check_indices", "group_effect", "group_labels", "outputs_without", "self_influence"]


def self_influence(fitted: Fitted, checkpoint: Checkpoint = NOWHERE) -> torch.Tensor:
    """Return what removing each training row does to its own measurement (n,)."""
    measured, training = fitted.measured_training, fitted.training
    scores = torch.full((training.count,), torch.nan, dtype=fitted.model.dtype, device=fitted.model.device)
    course = Course(fitted.model, training.count, 1, [Lines({"scores": scores})], checkpoint=checkpoint)
    if fitted.removal == "newton":
        _newton_diagonal(measured, fitted.remove(), fitted.most, scores, course)
        return scores
    for place, batch, shares in training.parts(fitted.most):
        if course.knows(place):
            continue
        gradients = training.row_gradients(batch)
        own = gradients if measured.measurement.name == "loss" else measured.row_gradients(batch)
        scores[place] = shares * (own * fitted.solve(gradients)).sum(1)
        course.end(place)
    return scores


def _newton_diagonal(measured: RowSide, removal: Removal, most: int, scores: torch.Tensor, course: Course) -> None:
    for place, batch, shares in removal.side.parts(removal.size(most)):
        if course.knows(place):
            continue
        left, rows = course.rest(place), list(split_batch(batch, shares, 1))
        steps = course.begin(left, partial(removal.steps_of, batch, shares, place.start))
        for j, step in enumerate(steps, left.start):
            (row, _), near = rows[j - place.start], moved(measured.model, step)
            scores[j] = (_value(measured, near, row) - _value(measured, measured.model, row))[0]
            course.end(slice(j, j + 1))


def _value(side: RowSide, model: TorchTwiceDifferentiable, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return side.measurement.of(model)(model.forward(map_tensors(torch.clone, batch)), batch).detach()


def group_effect(
    fitted: Fitted, groups: Sequence[torch.Tensor], test: Side, checkpoint: Checkpoint = NOWHERE
) -> torch.Tensor:
    """Return the changes (test.count, n_groups) when all rows of a group are removed together."""
    removal, newton = fitted.remove(), fitted.removal == "newton"
    effects = torch.zeros(test.count, len(groups), dtype=fitted.model.dtype, device=fitted.model.device)
    counts, transposed = (test.count, len(groups)), newton or test.count > len(groups)
    solved, streamed = reversed(counts) if transposed else counts
    kept = [Lines({"effects": effects.mT if transposed else effects})]
    course = Course(fitted.model, solved, streamed, kept, transposed=transposed, checkpoint=checkpoint)
    if newton:
        now = test.values()
        for j, rows in enumerate(groups[course.done :], course.done):
            effects[:, j] = test.at(removal.step(rows)).values() - now
            course.end(slice(j, j + 1))
        return effects
    sums = _summed(fitted, groups, checkpoint)
    for place, cols, block in blocks(test, sums, fitted.solve, fitted.most, course):
        effects[place, cols] = block
    return effects


def _summed(fitted: Fitted, groups: Sequence[torch.Tensor], checkpoint: Checkpoint) -> FixedGradients:
    """Return Σ wᵢgᵢ/Σw of each group, by one pass over the training rows."""
    training, model = fitted.training, fitted.model
    way_out = "Try fewer groups at a time."
    check_memory(
        2 * len(groups) * model.num_params * model.dtype.itemsize, f"{len(groups)} groups", way_out, model.device
    )
    sums = torch.zeros(len(groups), model.num_params, dtype=model.dtype, device=model.device)
    member = torch.zeros(len(groups), training.count, dtype=torch.bool, device="cpu")
    for j, chosen in enumerate(groups):
        member[j, chosen] = True
    course = Course(
        model, training.count, 1, [Lines({}, {"sums": sums})], checkpoint=checkpoint, stage="sums of groups"
    )
    for place, gradients in training.gradients(training.count, course.done):
        sums += member[:, place].to(gradients) @ gradients
        course.end(place)
    return FixedGradients(model, sums)


def outputs_without(fitted: Fitted, rows: torch.Tensor, data: object) -> torch.Tensor:
    """Return the outputs (n_test, ...) at the parameters without ``rows``."""
    near = moved(fitted.model, fitted.remove().step(rows)).of_outputs()
    batches = batches_of(near, with_any_targets(data, near), batch_size=fitted.batch_size, needs_row_order=True)
    with torch.no_grad():
        return torch.cat([near.forward(map_tensors(torch.clone, batch)).detach() for batch, _ in batches])


def check_indices(rows: object, n: int) -> torch.Tensor:
    """Return training rows, an int or ints, as indices (m,), each once; ValueError where they are none."""
    given = np.atleast_1d(rows.detach().cpu().numpy() if isinstance(rows, torch.Tensor) else np.asarray(rows))
    if given.ndim != 1 or (given.dtype.kind not in "iu" and given.size):
        got = f"{given.dtype} of shape {given.shape}"
        raise TypeError(must_be("rows", "an int or ints, places of training rows", got, "Of a mask: `np.flatnonzero`."))
    found = np.unique(np.where(given < 0, given + n, given))
    if len(found) < given.size or (found.size and not 0 <= found[0] <= found[-1] < n):
        raise ValueError(must_be("rows", f"different places of the {n} training rows", f"{given.tolist()[:10]}"))
    return torch.from_numpy(found.astype(np.int64))


def check_groups(groups: object, n: int) -> list[torch.Tensor]:
    """Return the rows of each group: of labels (n,) in their sorted order, the missing ones last, or as listed."""
    if _are_rows(groups):
        return [check_indices(rows, n) for rows in groups]
    labels = _as_labels(groups)
    if labels.shape != (n,):
        hint = "Or a list of the rows of each group."
        raise ValueError(must_be("groups", f"a label for each of the {n} training rows", f"shape {labels.shape}", hint))
    return [torch.from_numpy(rows) for _, rows in _of_labels(labels)]


def group_labels(groups: object, members: Sequence[torch.Tensor]) -> list[object]:
    """Return a label for each group of ``check_groups``: its own, or its place in the list."""
    return list(range(len(members))) if _are_rows(groups) else [label for label, _ in _of_labels(_as_labels(groups))]


def _of_labels(labels: np.ndarray) -> list[tuple[object, np.ndarray]]:
    """Return each label with its rows; missing ones are one group, by the first of them."""
    missing = _are_missing(labels)
    try:
        found, which = np.unique(labels[~missing], return_inverse=True)
    except TypeError as error:
        hint = "Try `[str(label) for label in groups]`."
        raise TypeError(must_be("groups", "labels of one kind, which can be sorted", str(error), hint)) from error
    # Of dates `tolist` makes integers.
    names = list(found) if found.dtype.kind in "mM" else found.tolist()
    rows = np.flatnonzero(~missing)
    groups = [(name, rows[which == place]) for place, name in enumerate(names)]
    gaps = np.flatnonzero(missing)
    return [*groups, (labels[gaps[0]], gaps)] if len(gaps) else groups


def _are_missing(labels: np.ndarray) -> np.ndarray:
    """Return which labels (n,) are NaN, NaT, None or pandas' NA: those that do not equal themselves, and None."""
    if labels.dtype.kind != "O":
        return np.asarray(labels != labels)
    return np.array([label is None or not _equals_itself(label) for label in labels], dtype=bool)


def _equals_itself(label: object) -> bool:
    same: object = label == label
    # Of pandas' NA it is NA, which is neither true nor false.
    return isinstance(same, bool | np.bool_) and bool(same)


def _are_rows(groups: object) -> TypeGuard[Sequence[object]]:
    return isinstance(groups, list | tuple) and any(np.ndim(rows) for rows in groups)


def _as_labels(groups: object) -> np.ndarray:
    return groups.detach().cpu().numpy() if isinstance(groups, torch.Tensor) else np.asarray(groups)
