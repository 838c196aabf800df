"""A loss module of torch's: unreduced, its numerators; by its ``reduction``, its share of the denominator.

Summing both over all the data keeps torch's average whatever the batches are, a ragged last one and one of ignored
targets included.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import nn

from ..._check import check_choice, must_be
from .base import Loss, check_same_length, check_same_shape
from .output_hessians import OutputHessian
from .predictive import Predictive

__all__ = ["ModuleLoss", "TorchLoss"]


class TorchLoss(Protocol):
    """What torch's loss modules have in common."""

    reduction: str

    # As torch declares it.
    __call__: Callable[..., Any]

    def named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Return the tensors that are moved with it."""

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Move it."""


Call = Callable[[TorchLoss, torch.Tensor, torch.Tensor], torch.Tensor]


def _called(module: TorchLoss, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    value: torch.Tensor = module(output, target)
    return value


class ModuleLoss(Loss):
    """A torch loss module with a ``reduction``; by itself for those of which nothing more is known.

    A subclass says which modules it is for, and what it knows of them.

    Parameters
    ----------
    module : torch loss module, default=None
        None is the first of ``modules`` with its defaults.
    call : callable, default=None
        Returns the value of a module (with ``reduction`` as it is, or "none") of outputs and targets; None calls it.

    Attributes
    ----------
    name : str or None
        The name that it goes by as ``loss=``.
    modules : tuple of type
        The torch classes that it is for, subclasses of the user's included: these may mean something else, and so
        have no closed form.
    """

    name: ClassVar[str | None] = None
    modules: ClassVar[tuple[type, ...]] = (
        nn.SoftMarginLoss,
        nn.MultiLabelSoftMarginLoss,
        nn.HingeEmbeddingLoss,
    )
    mass_weighs = False
    module: TorchLoss

    def __init__(self, module: TorchLoss | None = None, call: Call | None = None) -> None:
        made: Any = self.modules[0]() if module is None else module
        self.module = made
        check_choice(self.module.reduction, "The loss's reduction", ["mean", "sum", "none", "batchmean"])
        self._plain, self._call = call is None, call or _called
        # Shallow: the class weights are shared, only `reduction` differs.
        self.unreduced = copy.copy(self.module)
        self.unreduced.reduction = "none"

    # -- what a subclass knows -------------------------------------------------------------------------------------

    def targets(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the targets as the module takes them."""
        return target.to(output.dtype)

    def check_weights(self, output: torch.Tensor) -> None:
        """Raise for weights that belong to the rows of one batch."""
        held = {**vars(self.module), **dict(self.module.named_buffers())}
        for name in ("weight", "pos_weight"):
            weight = held.get(name)
            if not isinstance(weight, torch.Tensor):
                continue
            if weight.ndim >= output.ndim and weight.shape[weight.ndim - output.ndim] != 1:
                got = f"shape {tuple(weight.shape)} against outputs of shape {tuple(output.shape)}"
                hint = "Weights of the rows belong in `sample_weight`."
                raise ValueError(must_be(f"The loss's {name}", "the same for every row", got, hint))

    def check_targets(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Raise for targets that torch would broadcast, index out of range or take the logarithm of."""
        check_same_shape(output, target)

    def closed_form(self, f: torch.Tensor, y: torch.Tensor) -> OutputHessian | None:
        """Return ∇²_f of the module itself, of outputs without gradients and of targets as it takes them; or None."""
        return None

    def distribution(self, f: torch.Tensor, y: torch.Tensor) -> Predictive | None:
        """Return the labels that the outputs predict, for the same; or None."""
        return None

    # -- Loss ------------------------------------------------------------------------------------------------------

    def to(self, dtype: torch.dtype, device: torch.device) -> Self:
        """Return the loss with its class weights in ``dtype`` on ``device``; the user's keeps its own."""
        return type(self)(copy.deepcopy(self.module).to(device, dtype), None if self._plain else self._call)

    def per_sample(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the unreduced loss, summed over all but the first dimension."""
        elements = self.elements(output, target)
        if not elements.ndim or len(elements) != len(output):
            got = f"shape {tuple(elements.shape)} of {len(output)} rows"
            hint = "Try a callable (output, target) without a `reduction` attribute."
            raise ValueError(must_be(f"The loss {self.module} with reduction='none'", "one value per row", got, hint))
        return elements.reshape(len(output), -1).sum(1)

    def elements(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the unreduced loss."""
        return self._call(self.unreduced, output, self.targets(output, target))

    def mass(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return each sample's share of the denominator of ``reduction``."""
        if self.module.reduction in ("sum", "batchmean"):
            return super().mass(output, target)
        with torch.no_grad():
            elements = self.elements(output, target)
        return torch.full((len(output),), elements[0].numel(), dtype=output.dtype, device=output.device)

    def check(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Raise for weights and targets that do not fit the outputs."""
        check_same_length(output, target)
        self.check_weights(output)
        self.check_targets(output, target)

    def verify(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Raise unless the parts add up to the module's own value: a user's subclass may mean something else."""
        with torch.no_grad():
            own = self._call(self.module, output, self.targets(output, target)).mean()
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
        if self._plain and type(self.module).__module__.startswith("torch."):
            return
        self.verify(output, target)
        # As many values as rows may be one a class.
        for i in {0, len(output) - 1}:
            alone = self.per_sample(output[i : i + 1].detach(), target[i : i + 1])
            if not torch.isclose(alone[0], losses[i], rtol=1e-3, atol=1e-6, equal_nan=True):
                must, got = "of each row alone, unreduced", f"{losses[i]:.6g} for row {i}, {alone[0]:.6g} for it alone"
                raise ValueError(must_be(f"The loss {self.module}", must, got))

    def output_hessian(self, output: torch.Tensor, target: torch.Tensor) -> OutputHessian | None:
        """Return the closed form of torch's own modules."""
        return self.closed_form(output.detach(), self.targets(output, target)) if self._is_torchs else None

    def predictive(self, output: torch.Tensor, target: torch.Tensor) -> Predictive | None:
        """Return the distribution of torch's own modules."""
        return self.distribution(output.detach(), self.targets(output, target)) if self._is_torchs else None

    @classmethod
    def has_predictive(cls) -> bool:
        """Return whether losses of this class are negative log-likelihoods."""
        return cls.distribution is not ModuleLoss.distribution

    def __str__(self) -> str:
        return str(self.module)

    @property
    def _is_torchs(self) -> bool:
        # Exactly these: a user's subclass, or another call of it, may mean something else.
        return self._plain and type(self.module) in self.modules
