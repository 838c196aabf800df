"""Functions whose kernels cannot be differentiated twice, or not in batches, by others of the same value that can.

And hooks that a forward pass puts on its own tensors, by none: they change gradients, and are no part of a loss. What
clips the gradient of a mean once in a while would clip those of most single rows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from .._check import must_be
from .._memory import working_memory

__all__ = ["PlainFunctions"]


class PlainFunctions(TorchFunctionMode):
    """While it lasts, the functions of ``PLAIN`` are computed by operations that have all derivatives.

    Layers and a user's own calls of ``torch.nn.functional`` are reached alike.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function that stands for ``func``, or ``func`` itself."""
        return PLAIN.get(func, func)(*args, **(kwargs or {}))


def prelu(input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x where it is positive, else a x: torch's kernel has a wrong rule for batches of gradients."""
    if weight.numel() > 1 and input.ndim > 1:
        weight = weight.reshape(-1, *[1] * (input.ndim - 2))
    return torch.where(input > 0, input, weight * input)


def hardsigmoid(input: torch.Tensor, inplace: bool = False) -> torch.Tensor:  # noqa: ARG001 (torch's signature)
    """Return min(max(x + 3, 0), 6) / 6: torch's kernel has one derivative."""
    return functional.relu6(input + 3) / 6


def cdist(x1: torch.Tensor, x2: torch.Tensor, p: float = 2.0, compute_mode: Any = None) -> torch.Tensor:  # noqa: ARG001
    """Return the distances of all pairs, with derivative 0 where they are 0, as torch has; p = 1 or 2."""
    needed = x1.numel() * x2.shape[-2] * x1.element_size()
    if p not in (1, 2) or 4 * needed > working_memory():
        return torch.cdist(x1, x2, p)
    gap = x1.unsqueeze(-2) - x2.unsqueeze(-3)
    if p == 1:
        return gap.abs().sum(-1)
    square = gap.square().sum(-1)
    apart = square > 0
    return torch.where(apart, torch.where(apart, square, 1).sqrt(), 0)


def embedding(
    input: torch.Tensor,
    weight: torch.Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,  # noqa: ARG001 (sparse gradients have no second derivative)
) -> torch.Tensor:
    """Return the rows of ``weight``; refused where their gradient depends on the rest of the batch."""
    if scale_grad_by_freq:
        raise ValueError(refuse_frequencies("An embedding"))
    return functional.embedding(input, weight, padding_idx, max_norm, norm_type)


def embedding_bag(
    input: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,  # noqa: ARG001
    per_sample_weights: torch.Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> torch.Tensor:
    """Return sums, means or maxima of the rows of ``weight`` in each bag: torch's kernel has one derivative."""
    if input.ndim == 1:
        if offsets is None:
            raise ValueError(must_be("offsets of an EmbeddingBag", "given for indices in one dimension", "None"))
        input, per_sample_weights, inside = _padded(input, offsets, per_sample_weights, include_last_offset)
    else:
        inside = torch.ones_like(input, dtype=torch.bool)
    if padding_idx is not None:
        inside = inside & (input != padding_idx % len(weight))
    rows = embedding(input, weight, None, max_norm, norm_type, scale_grad_by_freq)
    if mode == "max":
        lowest = rows.masked_fill(~inside[..., None], -torch.inf)
        return torch.where(inside.any(1)[:, None], lowest.max(1).values, 0)
    share = inside.to(rows.dtype) if per_sample_weights is None else inside * per_sample_weights
    total = (rows * share[..., None]).sum(1)
    return total if mode == "sum" else total / inside.sum(1).clamp(min=1)[:, None]


def _padded(
    input: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor | None, include_last_offset: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Return bags of one length: indices, weights, and which places are in the bag."""
    starts = offsets[:-1] if include_last_offset else offsets
    stops = torch.cat([starts[1:], offsets[-1:] if include_last_offset else starts.new_tensor([len(input)])])
    longest = int((stops - starts).max()) if len(starts) else 0
    places = starts[:, None] + torch.arange(longest, device=input.device)
    inside = places < stops[:, None]
    places = places.clamp(max=max(len(input) - 1, 0))
    return input[places], None if weights is None else weights[places], inside


def register_hook(*_args: Any, **_kwargs: Any) -> RemovableHandle:
    """Return the handle of a hook that is never called."""
    return RemovableHandle(OrderedDict[int, Any]())


def refuse_frequencies(name: str) -> str:
    """Return the message for ``scale_grad_by_freq``."""
    hint = "With it a row's gradient depends on the other rows of its batch. Set it to False on the trained model."
    return must_be(name, "without scale_grad_by_freq", "scale_grad_by_freq=True", hint)


PLAIN: dict[Any, Callable[..., Any]] = {
    functional.prelu: prelu,
    torch.prelu: prelu,
    functional.hardsigmoid: hardsigmoid,
    torch.cdist: cdist,
    functional.embedding: embedding,
    functional.embedding_bag: embedding_bag,
    torch.Tensor.register_hook: register_hook,
}
