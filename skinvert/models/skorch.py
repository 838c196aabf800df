"""A skorch net as a ``TwiceDifferentiable``: its module, its ``infer`` and its ``get_loss``."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from .losses import ModuleLoss
from .torch import TorchTwiceDifferentiable

__all__ = ["SkorchTwiceDifferentiable"]


class SkorchTwiceDifferentiable(TorchTwiceDifferentiable):
    """The objective of an initialised skorch net; its criterion and ``get_loss`` count, its optimiser does not.

    ``net.get_loss`` is asked, not the criterion: ``NeuralNetClassifier`` takes the logarithm of its outputs first.

    Parameters
    ----------
    net : skorch.NeuralNet
        Initialised.
    weight_decay : float, default=0.0
        μ of ½ μ‖θ‖².
    """

    def __init__(self, net: Any, weight_decay: float = 0.0) -> None:
        self.net = net
        super().__init__(net.module_, SkorchLoss(net, net.criterion_), weight_decay)

    def outputs(self, module: nn.Module, batch: Any) -> Any:
        """Return ``net.infer(x)`` with ``module`` as the net's."""
        outputs = _shadow(self.net, module_=module, device=None).infer(batch[0])
        return outputs[0] if isinstance(outputs, tuple) else outputs

    def read(self, data: Any) -> Any:
        """Return ``(X, y)`` through the net's own data set and loader, unshuffled."""
        data = super().read(data)
        if isinstance(data, tuple) and len(data) == 2 and data[1] is not None:
            return self.net.get_iterator(self.net.get_dataset(*data), training=False)
        return data


class SkorchLoss(ModuleLoss):
    """``net.get_loss`` with an unreduced criterion."""

    def __init__(self, net: Any, criterion: nn.Module) -> None:
        super().__init__(copy.deepcopy(criterion))
        self.net = net

    def to(self, dtype: torch.dtype, device: torch.device) -> SkorchLoss:
        """Return the loss with its criterion's tensors in ``dtype`` on ``device``."""
        return SkorchLoss(self.net, copy.deepcopy(self.module).to(device, dtype))

    def _elements(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self._get_loss(self.unreduced, output, target)

    def _whole(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self._get_loss(self.module, output, target)

    def _get_loss(self, criterion: nn.Module, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        net = _shadow(self.net, criterion_=criterion, device=None)
        return net.get_loss(output, self._as_float(output, target), X=None, training=False)


def _shadow(net: Any, **attributes: Any) -> Any:
    """Return a net over the same attributes but the given ones; ``copy.copy`` would serialise its tensors."""
    duplicate = object.__new__(type(net))
    duplicate.__dict__.update(net.__dict__)
    duplicate.__dict__.update(attributes)
    return duplicate
