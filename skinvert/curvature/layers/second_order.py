"""The Hessian of a model whose layers see one row a sample: by the second derivatives at their results.

With z = W a + b the results of layers and ε added to each, the second derivative by the entries (o, i) of one layer's
[W, b] and (o', i') of another's is, of a sample, aᵢ a'ᵢ' ∂²ℓ/∂ε_o∂ε'_o' + aᵢ ∂a'ᵢ'/∂ε_o ∂ℓ/∂ε'_o' and the like with the
two exchanged: Σ d directions of ε through the batch's operations give all of it, where products take p.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import nn

from ..._memory import rows_within
from ..._progress import progress
from ..._types import Batch
from ..objective import Objective
from ..per_sample import split_batch
from ..products import flat_products, recorded_products
from ..tangents import recorded
from .assembly import PairSums, linear_layers
from .found import layers_of
from .kinds import KroneckerLayer

__all__ = ["hessian_from_layers"]


class _Seen(NamedTuple):
    """What the layers saw on m samples: inputs (m, i), noise ε (m, d), and ∂ℓ/∂ε (m, d), ℓ the weighted loss."""

    inputs: list[torch.Tensor]
    noise: list[torch.Tensor]
    slopes: list[torch.Tensor]
    joined: torch.Tensor


def hessian_from_layers(objective: Objective, verbose: int = 0) -> torch.Tensor | None:
    """Return the Hessian (p, p) without the penalty; None unless all parameters are in layers that see one row each.

    n p² operations, as for the GGN; its products with the identity take some 12 n p² and p passes.
    """
    layers = linear_layers(layers_of(objective.model).layers, objective.size)
    if layers is None:
        return None
    sums = PairSums(layers)
    width = sum(layer.index.shape[0] for layer in layers)
    # The directions, and every layer's second derivatives along them.
    chunk = rows_within(8 * width * sum(sum(layer.index.shape) for layer in layers) * objective.dtype.itemsize)
    for batch, weights in progress(objective.batches, "layers", verbose):
        for rows, part in split_batch(batch, objective.scale * weights / objective.weight_sum, min(chunk, CHUNK)):
            if not _add(sums, layers, objective, rows, part):
                return None
    return sums.matrix()


# Samples at a time: enough for the products to be large, few enough for the caches.
CHUNK = 512


def _add(
    sums: PairSums, layers: Sequence[KroneckerLayer], objective: Objective, batch: Batch, weights: torch.Tensor
) -> bool:
    """Add samples; return whether the layers saw one row of each, by operations that have rules."""
    record, seen = recorded(lambda: _seen(layers, objective, batch, weights))
    if seen is None:
        return False
    program = recorded_products(record, seen.noise, seen.joined, flat_products(seen.joined, seen.noise))
    if program is None:
        return False
    # Of all samples together: each depends on its own noise alone.
    m, widths = len(weights), [one.shape[1] for one in seen.noise]
    directions = torch.cat(
        [_directions(j, m, widths, seen.joined) for j in range(len(widths))],
    )
    along = program(directions)
    sizes = [a.shape[1] for a in seen.inputs] + widths
    parts = [part.reshape(len(along), m, -1) for part in along.split([m * size for size in sizes], dim=1)]
    slopes = [slope.detach() for slope in seen.slopes]
    ...
    return True
