"""Losses as sums over samples: L = Σ wᵢ sᵢ / Σ wᵢ mᵢ, which is what torch defines on all the data at once.

Each loss says, per sample, its numerator sᵢ and its share mᵢ of the denominator: the number of elements for ``mse``,
the class weight of a valid target for ``cross_entropy``, 1 for ``reduction="sum"``. Summing both over all the data
keeps torch's average whatever the batches are, a ragged last one and one of ignored targets included.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.modules.loss import _Loss

from .._validation import check_choice, must_be
from .callable_loss import CallableLoss
from .compiled import unwrapped
from .loss_base import Loss, check_same_length, check_same_shape
from .output_hessians import OutputHessian, closed_form

__all__ = ["LOSSES", "Loss", "ModuleLoss", "as_loss", "is_torch_loss"]

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
_OTHER_ARGUMENTS = (
    nn.GaussianNLLLoss,
    nn.CosineEmbeddingLoss,
    nn.MarginRankingLoss,
    nn.TripletMarginLoss,
    nn.TripletMarginWithDistanceLoss,
    nn.CTCLoss,
)


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
    if isinstance(loss, nn.Module):
        # To set a compiled module's `reduction` would set the user's.
        loss = unwrapped(loss)
    if is_torch_loss(loss):
        return ModuleLoss(loss)
    if callable(loss):
        return CallableLoss(loss)
    raise TypeError(must_be("loss", f"one of {sorted(LOSSES)}, a torch loss module or a callable", repr(loss)))


def is_torch_loss(loss: Any) -> bool:
    """Return whether a loss is a module of torch's, or of a subclass: of others `reduction` may mean anything."""
    return isinstance(loss, _Loss) and hasattr(loss, "reduction")


class ModuleLoss(Loss):
    """A torch loss module with a ``reduction``."""

    def __init__(self, module: nn.Module) -> None:
        if isinstance(module, _FLAT_LOSSES) and getattr(module, "p", 1) == 1:
            hint = 'Try "huber", which is smooth.'
            raise ValueError(must_be("loss", "twice differentiable", type(module).__name__, hint))
        if isinstance(module, _OTHER_ARGUMENTS):
            hint = "Try a callable (output, target) that takes them apart and calls it."
            raise ValueError(must_be("loss", "a function of (output, target)", type(module).__name__, hint))
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
        elements = self._elements(output, target)
        if not elements.ndim or len(elements) != len(output):
            got = f"shape {tuple(elements.shape)} of {len(output)} rows"
            hint = "Try a callable (output, target) without a `reduction` attribute."
            raise ValueError(must_be(f"The loss {self.module} with reduction='none'", "one value per row", got, hint))
        return elements.reshape(len(output), -1).sum(1)

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
        check_same_length(output, target)
        self._check_weights(output)
        if self._has_class_targets(target):
            self._check_class_targets(output, target.long())
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

    def verify_values(self, output: torch.Tensor, target: torch.Tensor, losses: torch.Tensor) -> None:
        """Raise as ``verify`` does; torch's own modules, once verified, need no more."""
        if self._is_torchs():
            return
        self.verify(output, target)
        # As many values as rows may be one a class.
        for i in {0, len(output) - 1}:
            alone = self.per_sample(output[i : i + 1].detach(), target[i : i + 1])
            if not torch.isclose(alone[0], losses[i], rtol=1e-3, atol=1e-6, equal_nan=True):
                must, got = "of each row alone, unreduced", f"{losses[i]:.6g} for row {i}, {alone[0]:.6g} for it alone"
                raise ValueError(must_be(f"The loss {self.module}", must, got))

    def output_hessian(self, output: torch.Tensor, target: torch.Tensor) -> OutputHessian | None:
        """Return the closed form of torch's own modules, where this is a closed form of ``per_sample``."""
        closed = closed_form(self.module, output, self._as_float(output, target))
        if closed is None or type(self) is ModuleLoss or self._explains(closed, output, target):
            return closed
        return None

    def elements(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the unreduced loss."""
        return self._elements(output, target)

    def _elements(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.unreduced(output, self._as_float(output, target))

    def _whole(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.module(output, self._as_float(output, target))

    def _as_float(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return target.long() if self._has_class_targets(target) else target.to(output.dtype)

    def _has_class_targets(self, target: torch.Tensor) -> bool:
        return isinstance(self.module, _CLASS_LOSSES) and not target.is_floating_point()

    def _is_torchs(self) -> bool:
        return type(self) is ModuleLoss and type(self.module).__module__.startswith("torch.")

    def _explains(self, closed: OutputHessian, output: torch.Tensor, target: torch.Tensor) -> bool:
        """Whether the closed form of the module is that of a subclass's ``per_sample``: it may do more."""
        generator = torch.Generator(output.device).manual_seed(0)
        v = torch.randn(output.shape, generator=generator, dtype=output.dtype, device=output.device)
        with torch.enable_grad():
            f = output.detach().requires_grad_(True)
            losses = self.per_sample(f, target).sum()
            (gradient,) = torch.autograd.grad(losses, f, create_graph=True)
        if not gradient.requires_grad:
            return False
        (expected,) = torch.autograd.grad(gradient, f, v, materialize_grads=True)
        received = closed.products(v.reshape(1, len(v), -1)).reshape(v.shape)
        rounding = 100 * torch.finfo(v.dtype).eps * v.norm()
        return bool((received - expected).norm() <= 1e-4 * expected.norm() + rounding)

    def _class_mass(self, target: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        target = target.long()
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
            raise ValueError(must_be("y", must, f"shape {tuple(target.shape)}", _class_hint(output, target)))
        used = target[target != self.module.ignore_index]
        if used.numel() and (used.min() < 0 or used.max() >= output.shape[1]):
            must = f"in the range [0, {output.shape[1]}) for {output.shape[1]} outputs"
            raise ValueError(must_be("y", must, f"values from {int(used.min())} to {int(used.max())}"))

    def _check_weights(self, output: torch.Tensor) -> None:
        """Raise for class weights of another number, and for weights that belong to the rows of one batch."""
        for name in ("weight", "pos_weight"):
            weight = getattr(self.module, name, None)
            if not isinstance(weight, torch.Tensor):
                continue
            got = f"shape {tuple(weight.shape)} against outputs of shape {tuple(output.shape)}"
            if isinstance(self.module, _CLASS_LOSSES):
                if output.ndim > 1 and len(weight) != output.shape[1]:
                    raise ValueError(must_be(f"The loss's {name}", f"one for each of {output.shape[1]} classes", got))
            elif weight.ndim >= output.ndim and weight.shape[weight.ndim - output.ndim] != 1:
                hint = "Weights of the rows belong in `sample_weight`."
                raise ValueError(must_be(f"The loss's {name}", "the same for every row", got, hint))

    def _check_float_targets(self, output: torch.Tensor, target: torch.Tensor) -> None:
        if isinstance(self.module, nn.CrossEntropyLoss) and target.ndim < 2:
            hint = "Class indices must be integers: try `y.long()` or `y.astype(int)`."
            raise ValueError(must_be("y", "integer class indices or class probabilities (n, c)", target.dtype, hint))
        check_same_shape(output, target)
        target = target.to(output.dtype)
        low = target.min() if target.numel() else 0
        if isinstance(self.module, nn.BCEWithLogitsLoss | nn.BCELoss | nn.CrossEntropyLoss):
            if low < 0 or (target.numel() and target.max() > 1):
                raise ValueError(must_be("y", "in the range [0, 1]", f"values from {low:.3g} to {target.max():.3g}"))
        elif isinstance(self.module, nn.PoissonNLLLoss) and low < 0:
            raise ValueError(must_be("y", "non-negative for poisson_nll", f"{low:.3g}"))


def _class_hint(output: torch.Tensor, target: torch.Tensor) -> str:
    """Return what to try with class indices of a wrong shape."""
    if target.shape == output.shape and bool(((target == 0) | (target == 1)).all() & (target.sum(1) == 1).all()):
        return "They look one-hot: try `y.argmax(1)`, or `y.float()` for class probabilities."
    if output.ndim == 3 and target.shape == output.shape[:2]:
        return "The classes go along dimension 1: try `outputs.transpose(1, 2)`."
    return "Try `y.ravel()` for a column." if target.shape == (len(output), 1) else "Try one class index a row."
