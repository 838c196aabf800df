"""Loss modules of torch's that have no curvature here, and what to try."""

from __future__ import annotations

from torch import nn

from ..._check import must_be
from .module import Call, ModuleLoss, TorchLoss

__all__ = ["MultiMargin", "OtherArguments", "PiecewiseLinear"]


class PiecewiseLinear(ModuleLoss):
    """Losses whose second derivative in the outputs is zero wherever it exists."""

    modules = (nn.L1Loss, nn.MultiLabelMarginLoss)

    def __init__(self, module: TorchLoss | None = None, call: Call | None = None) -> None:
        raise _not_smooth(module)


class MultiMargin(ModuleLoss):
    """``nn.MultiMarginLoss``, which is piecewise linear for p = 1."""

    modules = (nn.MultiMarginLoss,)
    module: nn.MultiMarginLoss

    def __init__(self, module: TorchLoss | None = None, call: Call | None = None) -> None:
        super().__init__(module, call)
        if self.module.p == 1:
            raise _not_smooth(module)


class OtherArguments(ModuleLoss):
    """Losses of more than outputs and a target."""

    modules = (
        nn.GaussianNLLLoss,
        nn.CosineEmbeddingLoss,
        nn.MarginRankingLoss,
        nn.TripletMarginLoss,
        nn.TripletMarginWithDistanceLoss,
        nn.CTCLoss,
    )

    def __init__(self, module: TorchLoss | None = None, call: Call | None = None) -> None:
        hint = "Try a callable (output, target) that takes them apart and calls it."
        raise ValueError(must_be("loss", "a function of (output, target)", type(module).__name__, hint))


def _not_smooth(module: TorchLoss | None) -> ValueError:
    hint = 'Try "huber", which is smooth.'
    return ValueError(must_be("loss", "twice differentiable", type(module).__name__, hint))
