"""What each kind of layer sees of a sample as rows a_t, and its derivatives as rows g_t, with z_t = W a_t + b."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..models import Affine

__all__ = ["FORMS", "Columns", "Convolution", "Rows", "Table", "TransposedConvolution", "form_of"]


class Rows:
    """``Linear``: weights (d, i) on the last axis of what it sees."""

    # Numbers of axes of an input, where the module demands one.
    dims: int | None = None

    def groups(self, module: Any) -> int:
        """Return the number of matrices W, each with its own inputs and results."""
        return 1

    def weights(self, module: Any, numbers: torch.Tensor) -> torch.Tensor:
        """Return the entries of the weight in the order of W (d, i), or of the groups' matrices (q, d, i)."""
        return numbers.reshape(len(numbers), -1)

    def biases(self, module: Any, numbers: torch.Tensor) -> torch.Tensor:
        """Return the entries of the bias as a column of W."""
        q = self.groups(module)
        return numbers.reshape(-1, 1) if q == 1 else numbers.reshape(q, -1, 1)

    def inputs(self, module: Any, a: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return an input as rows (m, T, i) or (m, q, T, i), given the shape of the result."""
        return a.reshape(len(a), -1, a.shape[-1])

    def signals(self, module: Any, g: torch.Tensor) -> torch.Tensor:
        """Return the derivatives at a result as rows (m, T, d) or (m, q, T, d)."""
        return g.reshape(len(g), -1, g.shape[-1])


class Columns(Rows):
    """``Conv1D`` of transformers: a linear layer that keeps its weights (i, d)."""

    def weights(self, module: Any, numbers: torch.Tensor) -> torch.Tensor:
        """Return the weight transposed."""
        return numbers.mT


class Table(Columns):
    """``Embedding``: one-hot rows, and weights (i, d)."""

    def inputs(self, module: Any, a: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return the one-hot rows; that of ``padding_idx`` is zero, since torch gives it no gradient."""
        rows = F.one_hot(a.reshape(len(a), -1).long(), module.num_embeddings).to(dtype)
        if module.padding_idx is not None:
            rows[:, :, module.padding_idx] = 0
        return rows


class Convolution(Rows):
    """Convolutions of any number of axes, padding, dilation and groups: rows are the patches of the T results."""

    def __init__(self, dims: int) -> None:
        self.dims = dims

    def groups(self, module: Any) -> int:
        """Return ``groups``."""
        return module.groups

    def weights(self, module: Any, numbers: torch.Tensor) -> torch.Tensor:
        """Return each group's (out channels, in channels · kernel)."""
        q = module.groups
        rows = numbers.reshape(len(numbers), -1)
        return rows if q == 1 else rows.reshape(q, len(rows) // q, -1)

    def inputs(self, module: Any, a: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return the patches."""
        sides = _padding(module)
        if any(sides):
            a = F.pad(a, sides, "constant" if module.padding_mode == "zeros" else module.padding_mode)
        return _patches(module, a, module.stride)

    def signals(self, module: Any, g: torch.Tensor) -> torch.Tensor:
        """Return the channels of each position."""
        q = module.groups
        return g.flatten(2).mT if q == 1 else g.reshape(len(g), q, g.shape[1] // q, -1).mT


class TransposedConvolution(Convolution):
    """Transposed convolutions: a convolution of the input spread out by the stride, with the kernel turned round."""

    def weights(self, module: Any, numbers: torch.Tensor) -> torch.Tensor:
        """Return each group's (out channels, in channels · turned kernel) of weights (in, out / groups, kernel)."""
        q = module.groups
        parts = numbers.reshape(q, len(numbers) // q, numbers.shape[1], -1).flip(-1)
        rows = parts.transpose(1, 2).flatten(2)
        return rows[0] if q == 1 else rows

    def inputs(self, module: Any, a: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return the patches of the spread input, as many as the result has positions."""
        lengths = [(n - 1) * s + 1 for n, s in zip(a.shape[2:], module.stride, strict=True)]
        spread = a.new_zeros(*a.shape[:2], *lengths)
        places: list[Any] = [..., *(slice(None, None, s) for s in module.stride)]
        spread[tuple(places)] = a
        sides: list[int] = []
        for j in reversed(range(len(lengths))):
            reach = module.dilation[j] * (module.kernel_size[j] - 1)
            before = reach - module.padding[j]
            sides += [before, shape[2 + j] + reach - before - lengths[j]]
        return _patches(module, F.pad(spread, sides), (1,) * len(lengths))


FORMS: dict[type, Rows] = {
    nn.Linear: Rows(),
    # The class of `MultiheadAttention.out_proj`.
    type(nn.MultiheadAttention(1, 1).out_proj): Rows(),
    Affine: Rows(),
    nn.Embedding: Table(),
    nn.Conv1d: Convolution(3),
    nn.Conv2d: Convolution(4),
    nn.Conv3d: Convolution(5),
    nn.ConvTranspose1d: TransposedConvolution(3),
    nn.ConvTranspose2d: TransposedConvolution(4),
    nn.ConvTranspose3d: TransposedConvolution(5),
}


def form_of(module: nn.Module) -> Rows | None:
    """Return how a module's inputs and signals are rows, or None."""
    if _is_transposed_linear(module):
        return Columns()
    return FORMS.get(type(module))


def _is_transposed_linear(module: nn.Module) -> bool:
    """Whether a module is the ``Conv1D`` of transformers, which need not be installed; its gradients are checked."""
    weight = getattr(module, "weight", None)
    return type(module).__name__ == "Conv1D" and isinstance(weight, torch.Tensor) and weight.ndim == 2


def _patches(module: Any, a: torch.Tensor, stride: Sequence[int]) -> torch.Tensor:
    """Return the patches (m, [q,] T, channels · kernel) of a padded input (m, channels, ...)."""
    n, q = len(stride), module.groups
    for j, (size, dilation, step) in enumerate(zip(module.kernel_size, module.dilation, stride, strict=True)):
        a = a.unfold(2 + j, dilation * (size - 1) + 1, step)[..., ::dilation]
    positions, kernel = range(3, 3 + n), range(3 + n, 3 + 2 * n)
    a = a.unflatten(1, (q, -1)).permute(0, 1, *positions, 2, *kernel)
    rows = a.reshape(*a.shape[:2], a.shape[2 : 2 + n].numel(), a.shape[2 + n :].numel())
    return rows[:, 0] if q == 1 else rows


def _padding(module: Any) -> list[int]:
    """Return the padding in the order of ``torch.nn.functional.pad``: both sides of the last dimension first."""
    if module.padding == "valid":
        return [0] * (2 * len(module.kernel_size))
    sides: list[int] = []
    for i in reversed(range(len(module.kernel_size))):
        if module.padding == "same":
            total = module.dilation[i] * (module.kernel_size[i] - 1)
            sides += [total // 2, total - total // 2]
        else:
            sides += [module.padding[i], module.padding[i]]
    return sides
