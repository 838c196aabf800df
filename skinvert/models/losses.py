"""Losses as sums over samples: L = Σ wᵢ sᵢ / Σ wᵢ mᵢ, which is what torch defines on all the data at once.

Each loss says, per sample, its numerator sᵢ and its share mᵢ of the denominator: the number of elements for ``mse``,
the class weight of a valid target for ``cross_entropy``, 1 for ``reduction="sum"``. Summing both over all the data
keeps torch's average whatever the batches are, a ragged last one and one of ignored targets included.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .._validation import check_choice, must_be

__all__ = ["LOSSES", "Loss", "ModuleLoss", "as_loss"]

LOSSES = {
    "cross_entropy": nn.CrossEntropyLoss,
    "mse": nn.MSELoss,
    "bce_with_logits": nn.BCEWithLogitsLoss,
    "nll": nn.NLLLoss,
    "huber": nn.HuberLoss,
    "poisson_nll": nn.PoissonNLLLoss,
}

_CLASS_LOSSES = (nn.CrossEntropyLoss, nn.NLLLoss)
# Piecewise linear in the outputs: their second derivative is zero wherever it exists.
_FLAT_LOSSES = (nn.L1Loss, nn.MultiMarginLoss, nn.MultiLabelMarginLoss)


def as_loss(loss: Any) -> Loss:
    """Return the ``Loss`` of a name, a torch loss module or a callable (output, target)."""
    if loss is None:
        raise ValueError(must_be("loss", f"one of {sorted(LOSSES)}, a torch loss module or a callable", "None"))
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, str):
        check_choice(loss, "loss", LOSSES, "A torch loss module or a callable (output, target) is taken too.")
        return ModuleLoss(LOSSES[loss]())
    if isinstance(loss, type):
        raise TypeError(must_be("loss", "a loss, not a class", loss.__name__, f"Try {loss.__name__}()."))
    if isinstance(loss, nn.Module) and hasattr(loss, "reduction"):
        return ModuleLoss(loss)
    if callable(loss):
        return CallableLoss(loss)
    raise TypeError(must_be("loss", f"one of {sorted(LOSSES)}, a torch loss module or a callable", repr(loss)))


class Loss:
    """The numerators and denominators of one loss."""

    def per_sample(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return sᵢ (m,)."""
        raise NotImplementedError

    def mass(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return mᵢ (m,)."""
        return torch.ones(len(output), dtype=output.dtype, device=output.device)

    def check(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Raise unless the targets fit the outputs; called on every batch, before the loss."""
        _check_same_length(output, target)
        # Integers may be class indices, save against one column: there torch would broadcast.
        if target.is_floating_point() or output.shape == (*target.shape, 1):
            _check_same_shape(output, target)

    def verify(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Raise unless sᵢ and mᵢ give the user's own loss on this batch; called once."""

    def to(self, dtype: torch.dtype, device: torch.device) -> Loss:
        """Return the loss with its tensors in ``dtype`` on ``device``."""
        return self

    def output_factor(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor | None:
        """Return Sᵢ (m, c, c) with ∇²_f sᵢ = SᵢSᵢᵀ in closed form, or None where there is none."""
        return None


class ModuleLoss(Loss):
    """A torch loss module with a ``reduction``."""

    def __init__(self, module: nn.Module) -> None:
        if isinstance(module, _FLAT_LOSSES) and getattr(module, "p", 1) == 1:
            hint = 'Try "huber", which is smooth.'
            raise ValueError(must_be("loss", "twice differentiable", type(module).__name__, hint))
        check_choice(module.reduction, "The loss's reduction", ["mean", "sum", "none", "batchmean"])
        self.module: Any = module
        # Shallow: the class weights are shared, only `reduction` differs.
        unreduced: Any = copy.copy(module)
        unreduced.reduction = "none"
        self.unreduced = unreduced

    def to(self, dtype: torch.dtype, device: torch.device) -> ModuleLoss:
        """Return the loss with its class weights in ``dtype`` on ``device``; the user's keeps its own."""
        return ModuleLoss(copy.deepcopy(self.module).to(device, dtype))

    def per_sample(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the unreduced loss, summed over all but the first dimension."""
        return self._elements(output, target).reshape(len(output), -1).sum(1)

    def mass(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return each sample's share of the denominator of ``reduction``."""
        if self.module.reduction in ("sum", "batchmean"):
            return super().mass(output, target)
        if self.module.reduction == "mean" and self._has_class_targets(target):
            return self._class_mass(target, output.dtype)
        with torch.no_grad():
            elements = self._elements(output, target)
        return torch.full((len(output),), elements[0].numel(), dtype=output.dtype, device=output.device)

    def check(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Raise for targets that torch would broadcast, index out of range or take the logarithm of."""
        _check_same_length(output, target)
        if self._has_class_targets(target):
            self._check_class_targets(output, target)
        elif isinstance(self.module, nn.NLLLoss):
            raise ValueError(must_be("y", "integer class indices for this loss", f"dtype {target.dtype}"))
        else:
            self._check_float_targets(output, target)

    def verify(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Raise unless the parts add up to the module's own value: a user's subclass may mean something else."""
        with torch.no_grad():
            own = self._whole(output, target).mean()
            total, mass = self.per_sample(output, target).sum(), self.mass(output, target).sum()
        if self.module.reduction == "sum":
            mass = torch.ones_like(mass)
        # NaN on both sides is the parameters' fault, and is said where the gradient is found not finite.
        if mass > 0 and not torch.isclose(own, total / mass, rtol=1e-3, atol=1e-6, equal_nan=True):
            must = "an average or sum of per-sample losses"
            hint = "Try a callable (output, target) without a `reduction` attribute."
            raise ValueError(must_be(f"The loss {self.module}", must, f"{own:.6g} against {total / mass:.6g}", hint))

    def output_factor(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor | None:
        """Return the closed form for squared error, Bernoulli logits and cross-entropy.

        That of cross-entropy is √w (diag(√p) − p√pᵀ): exact for one-hot p too, where diag(p) − ppᵀ cancels.
        """
        if output.ndim > 2:
            return None
        flat = output.detach().reshape(len(output), -1)
        kind = type(self.module)
        if kind is nn.MSELoss:
            return torch.diag_embed(torch.full_like(flat, 2.0).sqrt())
        if kind is nn.BCEWithLogitsLoss and self.module.weight is None and self.module.pos_weight is None:
            return torch.diag_embed((flat.sigmoid() * (-flat).sigmoid()).sqrt())
        if kind is nn.CrossEntropyLoss and self._has_class_targets(target) and not self.module.label_smoothing:
            p = flat.softmax(1)
            weight = self._class_mass(target, flat.dtype).sqrt()[:, None, None]
            return weight * (torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None, :])
        return None

    def elements(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the unreduced loss."""
        return self._elements(output, target)

    def _elements(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.unreduced(output, self._as_float(output, target))

    def _whole(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.module(output, self._as_float(output, target))

    def _as_float(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return target if self._has_class_targets(target) else target.to(output.dtype)

    def _has_class_targets(self, target: torch.Tensor) -> bool:
        return isinstance(self.module, _CLASS_LOSSES) and not target.is_floating_point()

    def _class_mass(self, target: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        valid = target != getattr(self.module, "ignore_index", -100)
        mass = valid.to(dtype)
        if getattr(self.module, "weight", None) is not None:
            mass = mass * self.module.weight.to(dtype)[target.where(valid, 0)]
        return mass.reshape(len(target), -1).sum(1)

    def _check_class_targets(self, output: torch.Tensor, target: torch.Tensor) -> None:
        if not isinstance(self.module, _CLASS_LOSSES):
            return
        if output.ndim < 2:
            must = "of shape (n, c) for class indices"
            raise ValueError(must_be("The model's outputs", must, f"shape {tuple(output.shape)}"))
        expected = (output.shape[0], *output.shape[2:])
        if tuple(target.shape) != expected:
            must = f"class indices of shape {expected} against outputs of shape {tuple(output.shape)}"
            raise ValueError(must_be("y", must, f"shape {tuple(target.shape)}", "Try `y.ravel()` for a column."))
        used = target[target != self.module.ignore_index]
        if used.numel() and (used.min() < 0 or used.max() >= output.shape[1]):
            must = f"in the range [0, {output.shape[1]}) for {output.shape[1]} outputs"
            raise ValueError(must_be("y", must, f"values from {int(used.min())} to {int(used.max())}"))

    def _check_float_targets(self, output: torch.Tensor, target: torch.Tensor) -> None:
        if isinstance(self.module, nn.CrossEntropyLoss) and target.ndim < 2:
            hint = "Class indices must be integers: try `y.long()` or `y.astype(int)`."
            raise ValueError(must_be("y", "integer class indices or class probabilities (n, c)", target.dtype, hint))
        _check_same_shape(output, target)
        low = target.min() if target.numel() else 0
        if isinstance(self.module, nn.BCEWithLogitsLoss | nn.BCELoss | nn.CrossEntropyLoss):
            if low < 0 or (target.numel() and target.max() > 1):
                raise ValueError(must_be("y", "in the range [0, 1]", f"values from {low:.3g} to {target.max():.3g}"))
        elif isinstance(self.module, nn.PoissonNLLLoss) and low < 0:
            raise ValueError(must_be("y", "non-negative for poisson_nll", f"{low:.3g}"))


class CallableLoss(Loss):
    """A callable (output, target), classified once as a mean, a sum or one value per sample."""

    def __init__(self, function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        self.function = function
        self.kind: str | None = None
        self._takes_vmap = False

    def to(self, dtype: torch.dtype, device: torch.device) -> CallableLoss:
        """Return an unclassified copy; a module's tensors are moved in the copy alone."""
        function = self.function
        if isinstance(function, nn.Module):
            function = copy.deepcopy(function).to(device, dtype)
        return CallableLoss(function)

    def per_sample(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the callable's value on each sample alone."""
        if self.kind == "none":
            return self.function(output, target).reshape(len(output), -1).sum(1)
        if self._takes_vmap:
            return torch.vmap(self._alone)(output, target)
        return torch.stack([self._alone(o, t) for o, t in zip(output, target, strict=True)])

    def mass(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return 1 for each sample; the number of elements where the callable returns them all."""
        mass = super().mass(output, target)
        if self.kind == "none":
            with torch.no_grad():
                mass *= self.function(output[:1], target[:1]).numel()
        return mass

    def verify(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Classify the callable by a batch and the same batch doubled; raise where it is neither mean nor sum."""
        with torch.no_grad():
            once = self.function(output, target)
            if not isinstance(once, torch.Tensor):
                raise TypeError(must_be("The loss callable's result", "a tensor", type(once).__name__))
            twice = self.function(torch.cat([output, output]), torch.cat([target, target]))
            if once.ndim and twice.ndim and len(once) == len(output) and len(twice) == 2 * len(output):
                self.kind = "none"
                return
            once, twice = once.reshape(()), twice.reshape(())
            alone = self.per_sample(output, target)
            self._takes_vmap = self._try_vmap(output, target, alone)
        for kind, doubled, whole in (("mean", once, alone.mean()), ("sum", 2 * once, alone.sum())):
            if _close(twice, doubled) and _close(once, whole):
                self.kind = kind
                return
        hint = "Try a torch loss module, or a callable that returns one value per sample."
        got = f"{once:.6g} on a batch, {twice:.6g} on it doubled, {alone.mean():.6g} as the mean of single rows"
        raise ValueError(must_be("The loss callable", "a mean or a sum of per-sample losses", got, hint))

    def _alone(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.function(output[None], target[None]).reshape(())

    def _try_vmap(self, output: torch.Tensor, target: torch.Tensor, alone: torch.Tensor) -> bool:
        # A callable may branch on values or call `.item()`: then row by row, which always works.
        try:
            return bool(torch.allclose(torch.vmap(self._alone)(output, target), alone, rtol=1e-4, atol=1e-7))
        except Exception:
            return False


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(torch.isclose(a, b, rtol=1e-4, atol=1e-7, equal_nan=True))


def _check_same_length(output: torch.Tensor, target: torch.Tensor) -> None:
    if not isinstance(target, torch.Tensor):
        raise TypeError(must_be("y", "a tensor or an array", type(target).__name__))
    if target.ndim == 0 or len(output) != len(target):
        got = f"outputs of shape {tuple(output.shape)} and y of shape {tuple(target.shape)}"
        raise ValueError(must_be("The outputs and y", "of the same length", got))


def _check_same_shape(output: torch.Tensor, target: torch.Tensor) -> None:
    if output.shape != target.shape:
        hint = "Try `y.reshape(-1, 1)`." if target.ndim < output.ndim else "Try `y.ravel()`, or reshape the outputs."
        got = f"y of shape {tuple(target.shape)} against outputs of shape {tuple(output.shape)}"
        raise ValueError(must_be("y", "of the shape of the outputs, never broadcast", got, hint))
