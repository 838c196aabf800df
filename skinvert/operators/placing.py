"""Where the blocks of a row lie, and rows in chunks that fit the working memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .._check import must_be
from .._memory import rows_within
from .._storage import HERE, Storage

__all__ = ["in_chunks", "join_blocks", "order_of", "split_blocks"]


def order_of(indices: Sequence[torch.Tensor], size: int, device: torch.device, storage: Storage = HERE) -> torch.Tensor:
    """Return where each entry of the blocks, one after the other, lies in a row: all of 0, …, p − 1, each once."""
    sizes = [index.numel() for index in indices]
    order = storage.empty((sum(sizes),), torch.int64, device, "inverse")
    # By marks, of a byte each: a sorted copy would take sixteen.
    seen = order.new_zeros(size, dtype=torch.bool)
    sound = sum(sizes) == size
    for part, index in zip(order.split(sizes), indices, strict=True):
        part.copy_(index.reshape(-1))
        sound = sound and (not len(part) or bool((part.min() >= 0) & (part.max() < size)))
        if sound:
            seen[part] = True
    if not (sound and bool(seen.all())):
        raise ValueError(must_be("indices", f"each of 0, ..., {size - 1} once", f"{sum(sizes)} of them"))
    return order


def split_blocks(V: torch.Tensor, sizes: Sequence[int], order: torch.Tensor | None) -> Sequence[torch.Tensor]:
    """Return each block's own entries of the rows V (k, p)."""
    # By `index_select`: indexing takes six times as long.
    return (V if order is None else V.index_select(1, order.to(V.device))).split(list(sizes), dim=1)


def join_blocks(parts: Sequence[torch.Tensor], order: torch.Tensor | None) -> torch.Tensor:
    """Return rows (k, p) of each block's own entries."""
    rows = torch.cat(list(parts), dim=1)
    if order is None:
        return rows
    order = order.to(rows.device)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return rows.index_select(1, places)


def in_chunks(function: Callable[[torch.Tensor], torch.Tensor], V: torch.Tensor, width: int) -> torch.Tensor:
    """Return ``function`` of the rows V, each of ``width`` numbers, by chunks that fit the working memory."""
    # The parts of V, a rotation of them, the products, and these in place.
    chunk = rows_within(4 * max(V.shape[1], width) * V.element_size())
    if len(V) <= chunk:
        return function(V)
    product = V.new_empty(len(V), width)
    for start in range(0, len(V), chunk):
        rows = slice(start, start + chunk)
        product[rows] = function(V[rows])
    return product
