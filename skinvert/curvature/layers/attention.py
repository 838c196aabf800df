"""``MultiheadAttention`` taken apart: its projections as calls of linear layers, which torch computes inside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeAlias, TypeGuard

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["PARTS", "Key", "is_attention", "taken_apart"]

PARTS = ("q", "k", "v")

# What a call is recorded under: the module, or an attention and which of its projections.
Key: TypeAlias = nn.Module | tuple[nn.MultiheadAttention, str]
# Of a key, the input and the result; it returns the result.
Record: TypeAlias = Callable[[Key, torch.Tensor, torch.Tensor], torch.Tensor]


def is_attention(module: nn.Module) -> TypeGuard[nn.MultiheadAttention]:
    """Whether a module is torch's own ``MultiheadAttention`` with torch's own forward pass."""
    return type(module) is nn.MultiheadAttention and "forward" not in module.__dict__


@contextmanager
def taken_apart(modules: Sequence[nn.MultiheadAttention], record: Record) -> Iterator[None]:
    """Give attentions a forward pass of equal results whose projections are ``record((module, part), a, z)``.

    The modules are our copy's; ``out_proj`` is called as a module.
    """
    for module in modules:
        module.forward = _Apart(module, record)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for module in modules:
            del module.forward


class _Apart:
    """The forward pass of an attention: projections, torch's attention between identity projections, ``out_proj``."""

    def __init__(self, module: nn.MultiheadAttention, record: Record) -> None:
        self.module, self.record = module, record

    @property
    def _own_weights(self) -> tuple[torch.Tensor, ...]:
        """The weights of the three projections, where they are not packed into one tensor."""
        return (self.module.q_proj_weight, self.module.k_proj_weight, self.module.v_proj_weight)

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        module = self.module
        batch_first = module.batch_first and query.ndim == 3
        q, k, v = (self._projected(j, a) for j, a in enumerate((query, key, value)))
        if batch_first:
            q, k, v = (one.transpose(0, 1) for one in (q, k, v))
        seen, weights = self._attention(q)(
            q,
            k,
            v,
            module.embed_dim,
            module.num_heads,
            None,
            None,
            module.bias_k,
            module.bias_v,
            module.add_zero_attn,
            0.0,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        return module.out_proj(seen.transpose(0, 1) if batch_first else seen), weights

    def _attention(self, q: torch.Tensor) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
        """Return torch's attention with identities for all projections: products with these are exact."""
        # Torch's own masks, zero and bias rows apply.
        one = torch.eye(self.module.embed_dim, dtype=q.dtype, device=q.device)
        return partial(
            F.multi_head_attention_forward,
            out_proj_weight=one,
            out_proj_bias=None,
            training=False,
            use_separate_proj_weight=True,
            q_proj_weight=one,
            k_proj_weight=one,
            v_proj_weight=one,
        )

    def _projected(self, j: int, a: torch.Tensor) -> torch.Tensor:
        module, size = self.module, self.module.embed_dim
        rows = slice(j * size, (j + 1) * size)
        packed = module.in_proj_weight
        weight = self._own_weights[j] if packed is None else packed[rows]
        bias = None if module.in_proj_bias is None else module.in_proj_bias[rows]
        return self.record((module, PARTS[j]), a, F.linear(a, weight, bias))
