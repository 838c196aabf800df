"""Losses by name, by torch class, or as they are."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TypeGuard

from torch import nn

from ..._check import check_choice, must_be
from ..._naming import may_take
from ..compiled import unwrapped
from .base import Loss
from .bce import BCE, BCEWithLogits
from .callable_loss import CallableLoss
from .cross_entropy import CrossEntropy
from .huber import Huber, SmoothL1
from .kl_div import KLDiv
from .module import Call, ModuleLoss, TorchLoss
from .mse import MSE
from .nll import NLL
from .poisson import PoissonNLL
from .refused import MultiMargin, OtherArguments, PiecewiseLinear

__all__ = ["LOSSES", "as_loss", "is_torch_loss", "names_with_predictive", "register_loss", "torch_loss"]

_BUILT_IN: tuple[type[ModuleLoss], ...] = (
    CrossEntropy,
    MSE,
    BCEWithLogits,
    NLL,
    Huber,
    PoissonNLL,
    BCE,
    SmoothL1,
    KLDiv,
    ModuleLoss,
    PiecewiseLinear,
    MultiMargin,
    OtherArguments,
)
# What makes the loss of a name.
LOSSES: dict[str, Callable[[], object]] = {kind.name: kind for kind in _BUILT_IN if kind.name is not None}
_OF_TORCH: dict[type, type[ModuleLoss]] = {module: kind for kind in _BUILT_IN for module in kind.modules}
# What `PerSampleGradient` takes by name.
_RESERVED = ("margin", "output")
_HINT = "A torch loss module or a callable (output, target) is taken too."


def register_loss(name: str, loss: Callable[[], object], *, overwrite: bool = False) -> None:
    """Give a loss a name, which ``loss=`` takes everywhere.

    Processes of a search (``n_jobs``) know what the modules that they import register.

    Parameters
    ----------
    name : str
        The name.
    loss : type or callable
        A ``Loss`` class, or a function, without arguments: each use makes a loss of its own. Of a function the loss
        may be a torch loss module or a callable (output, target) as well.
    overwrite : bool, default=False
        Replace what has the name already; without it the first is kept, with a warning.

    Examples
    --------
    The squared error where the model is too low, and a tenth of it where it is too high: H is 2 XᵀX / n of these.

    >>> import torch
    >>> class Expectile(Loss):
    ...     def per_sample(self, output, target):
    ...         error = output - target
    ...         return (torch.where(error < 0, 1.0, 0.1) * error**2).sum(1)
    >>> register_loss("expectile", Expectile)
    >>> from skinvert import HessianInverter
    >>> net, X = nn.Linear(2, 1, bias=False), torch.eye(2)
    >>> y = net(X).detach() + torch.tensor([[1.0], [-1.0]])
    >>> inverter = HessianInverter("direct", 1.0, loss="expectile").fit(net, (X, y))
    >>> inverter.curvature_.to_dense()
    tensor([[1.0000, 0.0000],
            [0.0000, 0.1000]])
    """
    if not isinstance(name, str) or not name:
        raise TypeError(must_be("name", "a str of at least one character", repr(name)))
    if name in _RESERVED:
        raise ValueError(must_be("name", f"another than {', '.join(map(repr, _RESERVED))}", repr(name)))
    _check_maker(loss)
    if may_take(name, LOSSES, overwrite, f"A loss {name!r}"):
        LOSSES[name] = loss


def as_loss(loss: object) -> Loss:
    """Return the ``Loss`` of a name, a torch loss module or a callable (output, target)."""
    if loss is None:
        raise ValueError(must_be("loss", _accepted(), "None"))
    if isinstance(loss, str):
        check_choice(loss, "loss", LOSSES, _HINT)
        return _made_by(loss)
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, type):
        raise TypeError(must_be("loss", "a loss, not a class", loss.__name__, f"Try {loss.__name__}()."))
    if isinstance(loss, nn.Module):
        # To set a compiled module's `reduction` would set the user's.
        loss = unwrapped(loss)
    if is_torch_loss(loss):
        return torch_loss(loss)
    if callable(loss):
        return CallableLoss(loss)
    raise TypeError(must_be("loss", _accepted(), repr(loss)))


def is_torch_loss(loss: object) -> TypeGuard[TorchLoss]:
    """Return whether a loss is a module of torch's, or of a subclass: of others `reduction` may mean anything."""
    return isinstance(loss, tuple(_OF_TORCH))


def torch_loss(module: TorchLoss, call: Call | None = None) -> ModuleLoss:
    """Return the loss of a torch module, of what is known of its class or the nearest of its bases."""
    kind = next(_OF_TORCH[base] for base in type(module).__mro__ if base in _OF_TORCH)
    return kind(module, call)


def names_with_predictive() -> list[str]:
    """Return the names whose losses are the negative log-likelihoods of a known distribution."""
    kinds = {name: kind for name, kind in LOSSES.items() if isinstance(kind, type)}
    return [name for name, kind in kinds.items() if issubclass(kind, Loss) and kind.has_predictive()]


def _made_by(name: str) -> Loss:
    made = LOSSES[name]()
    if made is None or isinstance(made, str | type):
        what = f"What is registered as the loss {name!r}"
        raise TypeError(must_be(what, "a class or function that returns a loss", f"one that returns {made!r}"))
    return as_loss(made)


def _check_maker(loss: object) -> None:
    must = "a Loss class, or a function without arguments that returns a loss"
    if not callable(loss) or isinstance(loss, Loss | nn.Module):
        raise TypeError(must_be("loss", must, repr(loss), "Try `lambda: loss`."))
    try:
        inspect.signature(loss).bind()
    except TypeError as error:
        hint = "Try a function that returns it: `lambda: loss`."
        raise TypeError(must_be("loss", must, f"one that takes more: {error}", hint)) from error
    except ValueError:
        # A signature that cannot be read.
        return
    if inspect.isabstract(loss):
        raise TypeError(must_be("loss", must, "a class that lacks `per_sample`"))


def _accepted() -> str:
    return f"one of {sorted(LOSSES)}, a torch loss module or a callable"
