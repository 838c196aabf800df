"""What each kind of layer sees of a sample as rows a_t, and its derivatives as rows g_t, with z_t = W a_t + b."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ...models import Affine

__all__ = ["Columns", "Convolution", "Rows", "Table", "TransposedConvolution", "form_of"]

Convolving = nn.Conv1d | nn.Conv2d | nn.Conv3d
Transposing = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


@dataclass(frozen=True)
class Rows:
    """``Linear``: weights (d, i) on the last axis of what it sees."""

    @property
    def dims(self) -> int | None:
        """Number of axes of an input, where the module demands one."""
        return None

    @property
    def groups(self) -> int:
        """Number of matrices W, each with its own inputs and results."""
        return 1

    def weights(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the entries of the weight in the order of W (d, i), or of the groups' matrices (q, d, i)."""
        return numbers.flatten(1)

    def biases(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the entries of the bias as a column of W."""
        return numbers.reshape(-1, 1) if self.groups == 1 else numbers.reshape(self.groups, -1, 1)

    def inputs(self, a: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return an input as rows (m, T, i) or (m, q, T, i), given the shape of the result."""
        return a.reshape(len(a), -1, a.shape[-1])

    def signals(self, g: torch.Tensor) -> torch.Tensor:
        """Return the derivatives at a result as rows (m, T, d) or (m, q, T, d)."""
        return g.reshape(len(g), -1, g.shape[-1])


class Columns(Rows):
    """``Conv1D`` of transformers: a linear layer that keeps its weights (i, d)."""

    def weights(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return the weight transposed."""
        return numbers.mT


@dataclass(frozen=True)
class Table(Columns):
    """``Embedding``: one-hot rows, and weights (i, d).

    Parameters
    ----------
    length : int
        i.
    padding : int or None
        The row without a gradient.
    """

    length: int
    padding: int | None

    def inputs(self, a: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return the one-hot rows; that of ``padding_idx`` is zero, since torch gives it no gradient."""
        rows = F.one_hot(a.reshape(len(a), -1).long(), self.length).to(dtype)
        if self.padding is not None:
            rows[:, :, self.padding] = 0
        return rows


@dataclass(frozen=True)
class Convolution(Rows):
    """Convolutions of any number of axes, padding, dilation and groups: rows are the patches of the T results.

    Parameters
    ----------
    kernel, stride, dilation : tuple of int
        One entry an axis.
    padding : str or tuple of int
        As the module has it.
    mode : str
        What is padded with, ``padding_mode``.
    parts : int
        q.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: str | tuple[int, ...]
    mode: str
    parts: int

    @property
    def dims(self) -> int:
        """Samples, channels and the axes of the kernel."""
        return 2 + len(self.kernel)

    @property
    def groups(self) -> int:
        """Q."""
        return self.parts

    def weights(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return each group's (out channels, in channels · kernel)."""
        q = self.groups
        rows = numbers.flatten(1)
        return rows if q == 1 else rows.reshape(q, len(rows) // q, -1)

    def inputs(self, a: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return the patches."""
        sides = self._sides()
        if any(sides):
            a = F.pad(a, sides, "constant" if self.mode == "zeros" else self.mode)
        return self._patches(a, self.stride)

    def signals(self, g: torch.Tensor) -> torch.Tensor:
        """Return the channels of each position."""
        q = self.groups
        return g.flatten(2).mT if q == 1 else g.reshape(len(g), q, g.shape[1] // q, -1).mT

    def _patches(self, a: torch.Tensor, stride: Sequence[int]) -> torch.Tensor:
        """Return the patches (m, [q,] T, channels · kernel) of a padded input (m, channels, ...)."""
        n, q = len(stride), self.groups
        for j, (size, dilation, step) in enumerate(zip(self.kernel, self.dilation, stride, strict=True)):
            a = a.unfold(2 + j, dilation * (size - 1) + 1, step)[..., ::dilation]
        positions, kernel = range(3, 3 + n), range(3 + n, 3 + 2 * n)
        a = a.reshape(len(a), q, -1, *a.shape[2:]).permute(0, 1, *positions, 2, *kernel)
        rows = a.reshape(*a.shape[:2], a.shape[2 : 2 + n].numel(), a.shape[2 + n :].numel())
        return rows[:, 0] if q == 1 else rows

    def _sides(self) -> list[int]:
        """Return the padding in the order of ``torch.nn.functional.pad``: both sides of the last dimension first."""
        sides: list[int] = []
        for i in reversed(range(len(self.kernel))):
            if isinstance(self.padding, str):
                total = self.dilation[i] * (self.kernel[i] - 1) if self.padding == "same" else 0
                sides += [total // 2, total - total // 2]
            else:
                sides += [self.padding[i], self.padding[i]]
        return sides


@dataclass(frozen=True)
class TransposedConvolution(Convolution):
    """Transposed convolutions: a convolution of the input spread out by the stride, with the kernel turned round."""

    padding: tuple[int, ...]

    def weights(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return each group's (out channels, in channels · turned kernel) of weights (in, out / groups, kernel)."""
        q = self.groups
        parts = numbers.reshape(q, len(numbers) // q, numbers.shape[1], -1).flip(-1)
        rows = parts.transpose(1, 2).flatten(2)
        return rows[0] if q == 1 else rows

    def inputs(self, a: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return the patches of the spread input, as many as the result has positions."""
        lengths = [(n - 1) * s + 1 for n, s in zip(a.shape[2:], self.stride, strict=True)]
        spread = a.new_zeros(*a.shape[:2], *lengths)
        places: list[slice] = [slice(None), slice(None), *(slice(None, None, s) for s in self.stride)]
        spread[tuple(places)] = a
        sides: list[int] = []
        for j in reversed(range(len(lengths))):
            reach = self.dilation[j] * (self.kernel[j] - 1)
            before = reach - self.padding[j]
            sides += [before, shape[2 + j] + reach - before - lengths[j]]
        return self._patches(F.pad(spread, sides), (1,) * len(lengths))


# Exactly these: a subclass may compute something else. The third is the class of `MultiheadAttention.out_proj`.
LINEAR = (nn.Linear, Affine, type(nn.MultiheadAttention(1, 1).out_proj))
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def form_of(module: nn.Module) -> Rows | None:
    """Return how a module's inputs and signals are rows, or None."""
    kind = type(module)
    if kind in LINEAR:
        return Rows()
    if isinstance(module, nn.Embedding) and kind is nn.Embedding:
        return Table(module.num_embeddings, module.padding_idx)
    if isinstance(module, CONVOLUTIONS) and kind in CONVOLUTIONS:
        return Convolution(*_axes(module), module.padding, module.padding_mode, module.groups)
    if isinstance(module, TRANSPOSED) and kind in TRANSPOSED:
        # Torch takes no other for these.
        assert isinstance(module.padding, tuple)
        return TransposedConvolution(*_axes(module), module.padding, module.padding_mode, module.groups)
    return Columns() if _is_transposed_linear(module) else None


def _axes(module: Convolving | Transposing) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    return module.kernel_size, module.stride, module.dilation


def _is_transposed_linear(module: nn.Module) -> bool:
    """Whether a module is the ``Conv1D`` of transformers, which need not be installed; its gradients are checked."""
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    return type(module).__name__ == "Conv1D" and weight is not None and weight.ndim == 2
