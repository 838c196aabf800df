"""Whether processes that fit together have one model and one loss: what each of them makes of rows of the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from .._check import must_be
from .._types import Batch
from ..data import Batches
from ..models import TorchTwiceDifferentiable, map_tensors

__all__ = ["check_same_model", "values_of"]

# Numbers of a batch, by what they are.
Values: TypeAlias = Callable[[Batch], Mapping[str, torch.Tensor]]

# Rows that all ranks look at, of at most as many ranks.
ROWS = 8
HINTS = {
    "outputs": "Its modules, or a setting of one, are other ones on some rank.",
    "loss": "Is it of the rank's own data? Class weights, say, must be of all ranks' labels.",
}


def values_of(model: TorchTwiceDifferentiable) -> Values:
    """Return what is asked of a module and its loss."""

    def values(batch: Batch) -> dict[str, torch.Tensor]:
        outputs = model.forward(batch)
        found = {"outputs": outputs.detach().norm()} if isinstance(outputs, torch.Tensor) else {}
        share = model.mass(outputs, batch).sum()
        return {**found, "loss": model.per_sample_loss(outputs, batch).sum(), "share of the denominator": share}

    return values


def check_same_model(batches: Batches, values: Values, penalty: torch.Tensor | None = None) -> None:
    """Raise on all ranks unless all of them make the same of the same rows, and of the penalty.

    A module's forward pass, and a function, show what they do by their values alone.
    """
    assert batches.shard is not None
    ranks, step = batches.shard.ranks, "a look at rows of all ranks"
    own = _lent(batches)
    ranks.meet(step)
    rows = [row for lent in ranks.gathered(own, step) for row in lent]
    found: list[dict[str, float]] = []

    def look() -> list[torch.Tensor]:
        if penalty is not None:
            found.append({"penalty": float(penalty.double().norm())})
        for row in rows:
            here = map_tensors(lambda tensor: tensor.to(batches.device), row)
            found.append({name: float(value.detach()) for name, value in values(here).items()})
        return []

    ranks.own(step, look)
    eps = torch.finfo(batches.dtype).eps
    for told in zip(*ranks.gathered(found, step), strict=True):
        _check(told, eps)


def _check(told: Sequence[Mapping[str, float]], eps: float) -> None:
    """Raise where the ranks tell other numbers, but for roundings: machines may be unlike."""
    for name in told[0]:
        numbers = [one.get(name, float("nan")) for one in told]
        if not np.allclose(numbers, numbers[0], rtol=eps**0.5, atol=100 * eps, equal_nan=True):
            got = "; ".join(f"{number:.6g} on rank {rank}" for rank, number in enumerate(numbers))
            what = f"The {name}" if name == "penalty" else f"The {name} of a row"
            raise ValueError(must_be(what, "the same on every rank", got, HINTS.get(name, "")))


def _lent(batches: Batches) -> list[Any]:
    """Return some rows of this process, from over all of them where they are at hand, each a batch of one."""
    shard = batches.shard
    assert shard is not None
    lenders = [rank for rank, count in enumerate(shard.counts) if count][:ROWS]
    if shard.ranks.rank not in lenders:
        return []
    count = ROWS // len(lenders)
    if batches.kept is None:
        # To reach the others would be a pass over the data.
        batch, weights = next(iter(batches))
        return [_row(batch, i) for i in _spread(len(weights), count).tolist()]
    taken = batches.take(_spread(batches.n_samples, count))
    return [_row(batch, i) for batch, weights in taken for i in range(len(weights))]


def _spread(n: int, count: int) -> torch.Tensor:
    return torch.linspace(0, n - 1, count, device="cpu").long().unique()


def _row(batch: Batch, i: int) -> Any:
    # Cloned: a pickled view takes its whole batch with it.
    return map_tensors(lambda tensor: (tensor[i : i + 1] if tensor.ndim else tensor).cpu().clone(), batch)
