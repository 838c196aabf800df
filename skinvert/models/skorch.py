"""A skorch net as a ``TwiceDifferentiable``: its module, its ``infer``, its ``get_loss`` and its weight decay."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import nn

from .._check import must_be
from .._telling import warn
from .._types import Batch, Decay, Device
from .compiled import unwrapped
from .conversion import parameter_like
from .losses import (
    NLL,
    CallableLoss,
    Loss,
    OutputHessian,
    Outputs,
    Predictive,
    Probabilities,
    TorchLoss,
    explains,
    is_torch_loss,
    torch_loss,
)
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
        loss = SkorchLoss(net, criterion) if is_torch_loss(criterion) else SkorchCallable(net, criterion)
        super().__init__(net.module_, loss, weight_decay if weight_decay != 0 else _decay_of(net))

    def outputs(self, module: nn.Module, batch: Batch) -> Any:
        """Return ``net.infer(x)`` with ``module`` as the net's."""
        outputs = _shadow(self.net, module_=module, device=None).infer(batch[0])
        if isinstance(outputs, tuple | list):
            hint = (
                "`get_loss` may use all of it. Subclass TorchTwiceDifferentiable over `net.module_` and override "
                "`outputs` and `per_sample_loss`."
            )
            raise ValueError(must_be("What a skorch net's module returns", "a tensor", "a tuple", hint))
        return outputs

    def read(self, data: Batch) -> Any:
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


class SkorchLoss(Loss):
    """``net.get_loss`` with an unreduced criterion, over a module of its own: no gradient runs through a penalty."""

    def __init__(self, net: Any, criterion: TorchLoss, dtype: Any = None, device: Device = None) -> None:
        self.net, self.get_loss = net, GetLoss(net, _with_leaves(net.module_, dtype, device))
        # The criterion alone, and the one that `get_loss` asks.
        self.criterion = torch_loss(copy.deepcopy(criterion))
        self.asked = torch_loss(self.criterion.module, self.get_loss)
        # μ of the ½ μ‖θ‖² that `get_loss` adds, by the names of the parameters.
        self.ridge: dict[str, float] = {}
        self.mass_weighs = self.asked.mass_weighs

    @property
    def takes(self) -> Outputs:
        """What the outputs are: probabilities, where ``get_loss`` takes their logarithm for the criterion."""
        logarithm = isinstance(self.criterion, NLL) and self._takes_logarithms(self.criterion.module)
        return "probabilities" if logarithm else self.criterion.takes

    def to(self, dtype: torch.dtype, device: torch.device) -> SkorchLoss:
        """Return the loss with its criterion's tensors in ``dtype`` on ``device``."""
        return SkorchLoss(self.net, copy.deepcopy(self.criterion.module).to(device, dtype), dtype, device)

    def per_sample(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return ``get_loss`` with the unreduced criterion, a value per row."""
        return self.asked.per_sample(output, target)

    def mass(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the criterion's."""
        return self.asked.mass(output, target)

    def check(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Raise for targets that the criterion does not take."""
        self.criterion.check(output, target)

    def verify(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Find the penalty in ``get_loss``, then hold the parts against its whole value."""
        self._check_elements(output, target)
        self.ridge = self._find_penalty(output, target)
        self.asked.verify(output, target)
        y = self.criterion.targets(output, target)
        with torch.no_grad():
            values = [self.get_loss(self.criterion.module, output, y, training=flag).mean() for flag in (False, True)]
        _check_same_in_training(*values)

    def verify_values(self, output: torch.Tensor, target: torch.Tensor, losses: torch.Tensor) -> None:
        """Raise unless ``get_loss`` of the batch is what these losses make."""
        self.asked.verify_values(output, target, losses)

    def output_hessian(self, output: torch.Tensor, target: torch.Tensor) -> OutputHessian | None:
        """Return the criterion's closed form where it is that of ``get_loss``: it may do more."""
        closed = self.criterion.output_hessian(output, target)
        if closed is None or explains(closed, self.per_sample, output, target):
            return closed
        return None

    def predictive(self, output: torch.Tensor, target: torch.Tensor) -> Predictive | None:
        """Return the labels that the criterion predicts of the outputs, or of the logarithms that skorch takes."""
        if not self.criterion.has_predictive():
            return None
        # First: of a batch whose labels are all ignored both are zero, and log-probabilities are below zero.
        if isinstance(self.criterion, NLL) and bool((output >= 0).all()):
            logarithm = (output + torch.finfo(output.dtype).eps).log()
            if self._is_criterion_of(logarithm, output, target):
                return Probabilities(output, self.criterion.label_weight(output, target.long()))
        if self._is_criterion_of(output, output, target):
            return self.criterion.predictive(output, target)
        must, got = "that of its criterion alone", f"{self.criterion} with more to it"
        raise ValueError(must_be("get_loss for the Fisher", must, got, 'Try curvature="ggn".'))

    def __str__(self) -> str:
        return f"get_loss of {self.criterion}"

    def _is_criterion_of(self, seen: torch.Tensor, output: torch.Tensor, target: torch.Tensor) -> bool:
        with torch.no_grad():
            received, expected = self.asked.elements(output, target), self.criterion.elements(seen, target)
        return received.shape == expected.shape and torch.allclose(received, expected, rtol=1e-3, atol=1e-4)

    def _takes_logarithms(self, criterion: nn.NLLLoss) -> bool:
        """Return whether −log p of probabilities comes out, above zero, where the criterion alone gives −p."""
        c = 2 if criterion.weight is None else len(criterion.weight)
        y = torch.arange(c, device=None if criterion.weight is None else criterion.weight.device)
        p = torch.full((c, c), 0.5, dtype=None if criterion.weight is None else criterion.weight.dtype, device=y.device)
        with torch.no_grad():
            return bool(self.asked.elements(p, y).sum() > 0)

    def _check_elements(self, output: torch.Tensor, target: torch.Tensor) -> None:
        with torch.no_grad():
            elements = self.asked.elements(output, target)
        if len(output) > 1 and (elements.ndim == 0 or len(elements) != len(output)):
            got = f"shape {tuple(elements.shape)} for {len(output)} rows"
            hint = "It reduces by itself. Try `net.module_`, with `loss=` a callable (output, target)."
            raise ValueError(must_be("get_loss with an unreduced criterion", "one value per row", got, hint))

    def _find_penalty(self, output: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
        """Return μ of the ½ μ‖θ‖² in ``get_loss``, by name; raise for what else depends on the parameters in it."""
        probe = _with_leaves(self.get_loss.module, output.dtype, output.device, probe=True)
        first, second = (self._penalty_gradient(probe, output, target, seed) for seed in (0, 1))
        ridge = {name: float((g * t).sum() / t.square().sum()) for name, (t, g) in first.items()}
        for name, (t, g) in second.items():
            if (g - ridge[name] * t).norm() > 1e-4 * g.norm():
                self._refuse_penalty(f"another function of {name}")
        ridge = {name: mu for name, mu in ridge.items() if mu}
        if ridge and (self.criterion.module.reduction == "sum" or min(ridge.values()) < 0):
            self._refuse_penalty('one beside reduction="sum"' if min(ridge.values()) > 0 else "a negative one")
        return ridge

    def _penalty_gradient(self, probe: nn.Module, output: torch.Tensor, target: torch.Tensor, seed: int) -> Any:
        """Return random parameters, and the gradients of ``get_loss`` in them at outputs that do not depend on them."""
        generator = torch.Generator("cpu").manual_seed(seed)
        named = dict(probe.named_parameters())
        with torch.enable_grad():
            for tensor in named.values():
                tensor.data.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64, device="cpu"))
            y = self.criterion.targets(output, target)
            value = self.get_loss(self.criterion.module, output.detach(), y, probe).mean()
            if not value.requires_grad:
                return {}
            grads = torch.autograd.grad(value, list(named.values()), allow_unused=True)
        return {
            name: (t.detach().clone(), g) for (name, t), g in zip(named.items(), grads, strict=True) if g is not None
        }

    def _refuse_penalty(self, got: str) -> None:
        hint = "Try it without the penalty, and give that as `weight_decay=`."
        raise ValueError(must_be("A penalty in get_loss", "½ μ‖θ‖² beside a mean", got, hint))


class GetLoss:
    """``net.get_loss`` of a criterion, as a function of outputs and targets.

    Parameters
    ----------
    net : skorch.NeuralNet
        Initialised; a stand-in is asked.
    module : nn.Module
        The stand-in's.
    """

    def __init__(self, net: Any, module: nn.Module) -> None:
        self.net, self.module = net, module

    def __call__(
        self,
        criterion: object,
        output: torch.Tensor,
        target: object,
        module: nn.Module | None = None,
        training: bool = False,
    ) -> torch.Tensor:
        """Return the loss, with another ``module`` where one is given."""
        net = _shadow(self.net, criterion_=criterion, module_=module or self.module, device=None)
        value: torch.Tensor = net.get_loss(output, target, X=_NoInputs(), training=training)
        return value


class SkorchCallable(CallableLoss):
    """``net.get_loss`` with a criterion of the user's own kind, as a callable of outputs and targets."""

    def __init__(self, net: Any, criterion: nn.Module, dtype: Any = None, device: Device = None) -> None:
        self.get_loss = GetLoss(net, _with_leaves(net.module_, dtype, device))
        super().__init__(partial(self.get_loss, criterion))
        self.net, self.criterion = net, criterion

    def to(self, dtype: torch.dtype, device: torch.device) -> SkorchCallable:
        """Return an unclassified copy with the criterion's tensors in ``dtype`` on ``device``."""
        return SkorchCallable(self.net, copy.deepcopy(self.criterion).to(device, dtype), dtype, device)

    def verify(self, output: torch.Tensor, target: object) -> None:
        """Classify it; raise where it depends on the parameters, or is another one in training."""
        probe = _with_leaves(self.get_loss.module, output.dtype, output.device, probe=True)
        with torch.enable_grad():
            value = self.function(output.detach(), target, probe).mean()
        if value.requires_grad and any(
            part is not None for part in torch.autograd.grad(value, list(probe.parameters()), allow_unused=True)
        ):
            hint = "Give a penalty as `weight_decay=`, and leave it out of `get_loss`."
            raise ValueError(must_be("get_loss", "a function of outputs and targets", "one of the parameters", hint))
        with torch.no_grad():
            still, trained = (self.function(output, target, training=flag).mean() for flag in (False, True))
        _check_same_in_training(still, trained)
        super().verify(output, target)


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
    optimizer = vars(net).get("optimizer_")
    groups = optimizer.param_groups if isinstance(optimizer, torch.optim.Optimizer) else []
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


def _with_leaves(module: nn.Module, dtype: Any, device: Device, probe: bool = False) -> nn.Module:
    """Return a structural copy over detached parameters; over new ones that require a gradient as a ``probe``."""
    duplicate = structural_copy(module)
    for child in list(duplicate.modules()):
        for name, tensor in list(child.named_parameters(recurse=False, remove_duplicate=False)):
            data = tensor.detach().to(device, dtype if tensor.is_floating_point() else None, copy=probe)
            fresh = parameter_like(tensor, data, probe, name)
            # A penalty may ask for a mark (`no_decay`).
            fresh.__dict__.update(tensor.__dict__)
            setattr(child, name, fresh)
    return duplicate


def _shadow(net: Any, **attributes: Any) -> Any:
    """Return a net over the same attributes but the given ones; ``copy.copy`` would serialise its tensors."""
    duplicate = object.__new__(type(net))
    duplicate.__dict__.update(net.__dict__)
    duplicate.__dict__.update(attributes)
    return duplicate
