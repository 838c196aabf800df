"""What a loss is here: numerators and denominators per sample."""

from __future__ import annotations

from typing import Any

import torch

from .._validation import must_be
from .output_hessians import OutputHessian

__all__ = ["Loss", "check_same_length", "check_same_shape"]


class Loss:
    """The numerators and denominators of one loss."""

    def per_sample(self, output: torch.Tensor, target: Any) -> torch.Tensor:
        """Return sᵢ (m,)."""
        raise NotImplementedError

    def mass(self, output: torch.Tensor, target: Any) -> torch.Tensor:
        """Return mᵢ (m,)."""
        return torch.ones(len(output), dtype=output.dtype, device=output.device)

    def check(self, output: torch.Tensor, target: Any) -> None:
        """Raise unless the targets fit the outputs; called on every batch, before the loss."""
        check_same_length(output, target)
        # Integers may be class indices, save against one column: there torch would broadcast.
        if target.is_floating_point() or output.shape == (*target.shape, 1):
            check_same_shape(output, target)

    def verify(self, output: torch.Tensor, target: Any) -> None:
        """Raise unless sᵢ and mᵢ give the user's own loss on this batch; called once."""

    def verify_values(self, output: torch.Tensor, target: Any, losses: torch.Tensor) -> None:
        """Raise unless these sᵢ give the user's own loss on this batch; called on every batch of the training data."""

    def to(self, dtype: torch.dtype, device: torch.device) -> Loss:
        """Return the loss with its tensors in ``dtype`` on ``device``."""
        return self

    def output_hessian(self, output: torch.Tensor, target: Any) -> OutputHessian | None:
        """Return ∇²_f sᵢ in closed form, or None where there is none."""
        return None


def check_same_length(output: torch.Tensor, target: Any) -> None:
    """Raise unless the target is a tensor with one entry a row."""
    if not isinstance(target, torch.Tensor):
        hint = "A callable loss (output, target) takes mappings and tuples of tensors too."
        raise TypeError(must_be("y", "a tensor or an array", type(target).__name__, hint))
    if target.ndim == 0 or len(output) != len(target):
        got = f"outputs of shape {tuple(output.shape)} and y of shape {tuple(target.shape)}"
        raise ValueError(must_be("The outputs and y", "of the same length", got))


def check_same_shape(output: torch.Tensor, target: torch.Tensor) -> None:
    """Raise unless the target has the shape of the outputs."""
    if output.shape != target.shape:
        hint = "Try `y.reshape(-1, 1)`." if target.ndim < output.ndim else "Try `y.ravel()`, or reshape the outputs."
        got = f"y of shape {tuple(target.shape)} against outputs of shape {tuple(output.shape)}"
        raise ValueError(must_be("y", "of the shape of the outputs, never broadcast", got, hint))
