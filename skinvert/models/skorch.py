"""A skorch net as a ``TwiceDifferentiable``: its module, its ``infer``, its ``get_loss`` and its weight decay."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from .._telling import warn
from .._types import Decay
from .._validation import must_be
from .callable_loss import CallableLoss
from .compiled import unwrapped
from .losses import ModuleLoss, is_torch_loss
from .structural_copy import structural_copy
from .torch import TorchTwiceDifferentiable

__all__ = ["SkorchTwiceDifferentiable"]

# Optimisers whose `weight_decay` μ adds μθ to the gradient, and so ½ μ‖θ‖² to the loss.
_L2 = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.Adamax,
    torch.optim.ASGD,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
)


class SkorchTwiceDifferentiable(TorchTwiceDifferentiable):
    """The objective of an initialised skorch net: its criterion, its ``get_loss`` and its weight decay.

    ``net.get_loss`` is asked, not the criterion: ``NeuralNetClassifier`` takes the logarithm of its outputs first. A
    penalty Σ ½ μ‖θ‖² that it adds, on some parameters or all, is found and counts as weight decay; another is refused.
    What it reads from X, such as weights, belongs in ``sample_weight``.

    Parameters
    ----------
    net : skorch.NeuralNet
        Initialised.
    weight_decay : float, default=0.0
        μ of ½ μ‖θ‖². Where it is 0, the optimiser's own ``weight_decay`` is taken if it is that of SGD, Adam and the
        like; the decoupled one of AdamW, and those that differ between parameter groups, are warned of and left out.
    """

    def __init__(self, net: Any, weight_decay: Decay = 0.0) -> None:
        self.net = net
        criterion = unwrapped(net.criterion_)
        loss = (SkorchLoss if is_torch_loss(criterion) else SkorchCallable)(net, criterion)
        super().__init__(net.module_, loss, weight_decay if weight_decay != 0 else _decay_of(net))

    def outputs(self, module: nn.Module, batch: Any) -> Any:
        """Return ``net.infer(x)`` with ``module`` as the net's."""
        outputs = _shadow(self.net, module_=module, device=None).infer(batch[0])
        if isinstance(outputs, tuple | list):
            hint = (
                "`get_loss` may use all of it. Subclass TorchTwiceDifferentiable over `net.module_` and override "
                "`outputs` and `per_sample_loss`."
            )
            raise ValueError(must_be("What a skorch net's module returns", "a tensor", "a tuple", hint))
        return outputs

    def read(self, data: Any) -> Any:
        """Return ``(X, y)`` through the net's own data set and loader, unshuffled."""
        data = super().read(data)
        if isinstance(data, tuple) and len(data) == 2 and data[1] is not None:
            return self.net.get_iterator(self.net.get_dataset(*data), training=False)
        return data

    def penalty_diagonal(self) -> torch.Tensor | None:
        """Return the penalty's Hessian as a diagonal (p,), that of ``get_loss`` included; None where there is none."""
        decay, own = super().penalty_diagonal(), self._own_penalty()
        return own if decay is None else decay if own is None else decay + own

    def penalty_gradient(self) -> torch.Tensor:
        """Return the penalty's gradient (p,) at θ."""
        own = self._own_penalty()
        if own is None:
            return super().penalty_gradient()
        gradient = own * torch.cat([t.detach().reshape(-1) for t in self.theta])
        return gradient if super().penalty_diagonal() is None else gradient + super().penalty_gradient()

    def _own_penalty(self) -> torch.Tensor | None:
        """Return the second derivative (p,) of what ``get_loss`` adds, known after the first batch."""
        ridge = self.loss.ridge if isinstance(self.loss, SkorchLoss) else {}
        if not ridge:
            return None
        parts = [
            torch.full((t.numel(),), ridge.get(name, 0.0), dtype=torch.float64, device="cpu")
            for name, t in zip(self.layout.names, self.theta, strict=True)
        ]
        return torch.cat(parts).to(self.device, self.dtype)


class SkorchLoss(ModuleLoss):
    """``net.get_loss`` with an unreduced criterion, over a module of its own: no gradient runs through a penalty."""

    def __init__(self, net: Any, criterion: nn.Module, dtype: Any = None, device: Any = None) -> None:
        super().__init__(copy.deepcopy(criterion))
        self.net, self.module_ = net, _with_leaves(net.module_, dtype, device)
        # μ of the ½ μ‖θ‖² that `get_loss` adds, by the names of the parameters.
        self.ridge: dict[str, float] = {}

    def to(self, dtype: torch.dtype, device: torch.device) -> SkorchLoss:
        """Return the loss with its criterion's tensors in ``dtype`` on ``device``."""
        return SkorchLoss(self.net, copy.deepcopy(self.module).to(device, dtype), dtype, device)

    def verify(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Find the penalty in ``get_loss``, then hold the parts against its whole value."""
        self._check_elements(output, target)
        self.ridge = self._find_penalty(output, target)
        super().verify(output, target)
        with torch.no_grad():
            still, trained = (self._get_loss(self.module, output, target, training=t).mean() for t in (False, True))
        _check_same_in_training(still, trained)

    def _check_elements(self, output: torch.Tensor, target: torch.Tensor) -> None:
        with torch.no_grad():
            elements = self._elements(output, target)
        if len(output) > 1 and (elements.ndim == 0 or len(elements) != len(output)):
            got = f"shape {tuple(elements.shape)} for {len(output)} rows"
            hint = "It reduces by itself. Try `net.module_`, with `loss=` a callable (output, target)."
            raise ValueError(must_be("get_loss with an unreduced criterion", "one value per row", got, hint))

    def _find_penalty(self, output: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
        """Return μ of the ½ μ‖θ‖² in ``get_loss``, by name; raise for what else depends on the parameters in it."""
        probe = _with_leaves(self.module_, output.dtype, output.device, probe=True)
        first, second = (self._penalty_gradient(probe, output, target, seed) for seed in (0, 1))
        ridge = {name: float((g * t).sum() / t.square().sum()) for name, (t, g) in first.items()}
        for name, (t, g) in second.items():
            if (g - ridge[name] * t).norm() > 1e-4 * g.norm():
                self._refuse_penalty(f"another function of {name}")
        ridge = {name: mu for name, mu in ridge.items() if mu}
        if ridge and (self.module.reduction == "sum" or min(ridge.values()) < 0):
            self._refuse_penalty('one beside reduction="sum"' if min(ridge.values()) > 0 else "a negative one")
        return ridge

    def _penalty_gradient(self, probe: nn.Module, output: torch.Tensor, target: torch.Tensor, seed: int) -> Any:
        """Return random parameters, and the gradients of ``get_loss`` in them at outputs that do not depend on them."""
        generator = torch.Generator("cpu").manual_seed(seed)
        named = dict(probe.named_parameters())
        with torch.enable_grad():
            for tensor in named.values():
                tensor.data.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64, device="cpu"))
            value = self._get_loss(self.module, output.detach(), target, probe).mean()
            if not value.requires_grad:
                return {}
            grads = torch.autograd.grad(value, list(named.values()), allow_unused=True)
        return {
            name: (t.detach().clone(), g) for (name, t), g in zip(named.items(), grads, strict=True) if g is not None
        }

    def _refuse_penalty(self, got: str) -> None:
        hint = "Try it without the penalty, and give that as `weight_decay=`."
        raise ValueError(must_be("A penalty in get_loss", "½ μ‖θ‖² beside a mean", got, hint))

    def _elements(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self._get_loss(self.unreduced, output, target)

    def _whole(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self._get_loss(self.module, output, target)

    def _get_loss(
        self,
        criterion: nn.Module,
        output: torch.Tensor,
        target: torch.Tensor,
        module: nn.Module | None = None,
        training: bool = False,
    ) -> torch.Tensor:
        net = _shadow(self.net, criterion_=criterion, module_=module or self.module_, device=None)
        return net.get_loss(output, self._as_float(output, target), X=_NoInputs(), training=training)


class SkorchCallable(CallableLoss):
    """``net.get_loss`` with a criterion of the user's own kind, as a callable of outputs and targets."""

    def __init__(self, net: Any, criterion: nn.Module, dtype: Any = None, device: Any = None) -> None:
        super().__init__(self._get_loss)
        self.net, self.criterion = net, criterion
        self.module_ = _with_leaves(net.module_, dtype, device)

    def to(self, dtype: torch.dtype, device: torch.device) -> SkorchCallable:
        """Return an unclassified copy with the criterion's tensors in ``dtype`` on ``device``."""
        return SkorchCallable(self.net, copy.deepcopy(self.criterion).to(device, dtype), dtype, device)

    def verify(self, output: torch.Tensor, target: Any) -> None:
        """Classify it; raise where it depends on the parameters, or is another one in training."""
        probe = _with_leaves(self.module_, output.dtype, output.device, probe=True)
        with torch.enable_grad():
            value = self._get_loss(output.detach(), target, probe).mean()
        if value.requires_grad and any(
            part is not None for part in torch.autograd.grad(value, list(probe.parameters()), allow_unused=True)
        ):
            hint = "Give a penalty as `weight_decay=`, and leave it out of `get_loss`."
            raise ValueError(must_be("get_loss", "a function of outputs and targets", "one of the parameters", hint))
        with torch.no_grad():
            still, trained = (self._get_loss(output, target, training=flag).mean() for flag in (False, True))
        _check_same_in_training(still, trained)
        super().verify(output, target)

    def _get_loss(
        self, output: torch.Tensor, target: Any, module: nn.Module | None = None, training: bool = False
    ) -> torch.Tensor:
        net = _shadow(self.net, criterion_=self.criterion, module_=module or self.module_, device=None)
        return net.get_loss(output, target, X=_NoInputs(), training=training)


class _NoInputs:
    """Stands for X in ``get_loss``: whatever is read from it is refused."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[name]

    def __getitem__(self, key: Any) -> Any:
        hint = "Weights in X belong in `sample_weight`: try `fit(net, (X, y), sample_weight=...)`."
        raise ValueError(must_be("get_loss", "a function of y_pred and y_true", f"one that reads X[{key!r}]", hint))

    def __len__(self) -> int:
        return self["len"]

    def __iter__(self) -> Any:
        return self["iter"]


def _check_same_in_training(still: torch.Tensor, trained: torch.Tensor) -> None:
    if not torch.isclose(still, trained, rtol=1e-4, atol=1e-7, equal_nan=True):
        got = f"{trained:.6g} and {still:.6g}"
        hint = "What it adds in training is part of the loss. A penalty belongs in `weight_decay=`."
        raise ValueError(must_be("get_loss with training=True and False", "the same", got, hint))


def _decay_of(net: Any) -> float:
    """Return the optimiser's weight decay where it is L2; warn, and return 0, where it is not."""
    optimizer = getattr(net, "optimizer_", None)
    groups = getattr(optimizer, "param_groups", [])
    decays = {float(group.get("weight_decay", 0.0) or 0.0) for group in groups}
    if not any(decays):
        return 0.0
    name = type(optimizer).__name__
    decoupled = any(group.get("decoupled_weight_decay", False) for group in groups)
    if len(decays) == 1 and type(optimizer) in _L2 and not decoupled:
        return decays.pop()
    what = "differs between parameter groups" if len(decays) > 1 else "is not ½ μ‖θ‖² in the loss"
    message = f"The weight decay of the net's {name} {what} and is left out of H. Try `weight_decay=`."
    warn(message, UserWarning)
    return 0.0


def _with_leaves(module: nn.Module, dtype: Any, device: Any, probe: bool = False) -> nn.Module:
    """Return a structural copy over detached parameters; over new ones that require a gradient as a ``probe``."""
    duplicate = structural_copy(module)
    for child in list(duplicate.modules()):
        for name, tensor in list(child.named_parameters(recurse=False, remove_duplicate=False)):
            data = tensor.detach().to(device, dtype if tensor.is_floating_point() else None, copy=probe)
            setattr(child, name, nn.Parameter(data, requires_grad=probe))
    return duplicate


def _shadow(net: Any, **attributes: Any) -> Any:
    """Return a net over the same attributes but the given ones; ``copy.copy`` would serialise its tensors."""
    duplicate = object.__new__(type(net))
    duplicate.__dict__.update(net.__dict__)
    duplicate.__dict__.update(attributes)
    return duplicate
