"""What the losses of class labels share: indices (m, ...) against outputs (m, classes, ...), weighted and ignored."""

from __future__ import annotations

import torch
from torch import nn

from ..._check import must_be
from .module import ModuleLoss

__all__ = ["LabelLoss"]


class LabelLoss(ModuleLoss):
    """A torch loss of class indices with ``weight`` and ``ignore_index``; a mean is over what the labels weigh."""

    mass_weighs = True
    module: nn.CrossEntropyLoss | nn.NLLLoss

    def targets(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return indices as int64, all else in the dtype of the outputs."""
        return target.to(output.dtype) if target.is_floating_point() else target.long()

    def mass(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return what the labels of a sample weigh together, for ``reduction="mean"`` of indices."""
        if self.module.reduction != "mean" or target.is_floating_point():
            return super().mass(output, target)
        return self.label_weight(output, target.long()).reshape(len(target), -1).sum(1)

    def label_weight(self, f: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the class weights (m, ...) of indices, zero where they are ignored."""
        valid = y != self.module.ignore_index
        weight = valid.to(f.dtype)
        return weight if self.module.weight is None else weight * self.module.weight.to(f.dtype)[y.where(valid, 0)]

    def check_weights(self, output: torch.Tensor) -> None:
        """Raise for class weights of another number."""
        weight = self.module.weight
        if weight is not None and output.ndim > 1 and len(weight) != output.shape[1]:
            got = f"shape {tuple(weight.shape)} against outputs of shape {tuple(output.shape)}"
            raise ValueError(must_be("The loss's weight", f"one for each of {output.shape[1]} classes", got))

    def check_targets(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Raise for indices of another shape, and for those of no class."""
        if target.is_floating_point():
            raise ValueError(must_be("y", "integer class indices for this loss", f"dtype {target.dtype}"))
        y = target.long()
        if output.ndim < 2:
            must = "of shape (n, c) for class indices"
            raise ValueError(must_be("The model's outputs", must, f"shape {tuple(output.shape)}"))
        expected = (output.shape[0], *output.shape[2:])
        if tuple(y.shape) != expected:
            must = f"class indices of shape {expected} against outputs of shape {tuple(output.shape)}"
            raise ValueError(must_be("y", must, f"shape {tuple(y.shape)}", _hint(output, y)))
        used = y[y != self.module.ignore_index]
        if used.numel() and (used.min() < 0 or used.max() >= output.shape[1]):
            must = f"in the range [0, {output.shape[1]}) for {output.shape[1]} outputs"
            raise ValueError(must_be("y", must, f"values from {int(used.min())} to {int(used.max())}"))


def _hint(output: torch.Tensor, target: torch.Tensor) -> str:
    """Return what to try with class indices of a wrong shape."""
    if target.shape == output.shape and bool(((target == 0) | (target == 1)).all() & (target.sum(1) == 1).all()):
        return "They look one-hot: try `y.argmax(1)`, or `y.float()` for class probabilities."
    if output.ndim == 3 and target.shape == output.shape[:2]:
        return "The classes go along dimension 1: try `outputs.transpose(1, 2)`."
    return "Try `y.ravel()` for a column." if target.shape == (len(output), 1) else "Try one class index a row."
