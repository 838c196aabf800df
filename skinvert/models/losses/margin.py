"""The margin log(p / (1 − p)) of the true class: the model output that TRAK linearises."""

from __future__ import annotations

import torch

from ..._check import must_be
from .base import Loss, Outputs

__all__ = ["Margin"]


class Margin(Loss):
    """s = log(p_y / (1 − p_y)) of the probability of the true class y.

    Its gradient is −1 / (1 − p_y) times that of the cross-entropy −log p_y.

    Parameters
    ----------
    of : {"logits", "log_probabilities", "probabilities"}
        What the outputs are.

    References
    ----------
    Park, Georgiev, Ilyas, Leclerc & Madry (2023), "TRAK: Attributing model behavior at scale", eq. 4.
    """

    def __init__(self, of: Outputs = "logits") -> None:
        self.of = of

    def per_sample(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return s (m,)."""
        if _is_one_logit(output):
            # In the dtype of the outputs: 2·0 − 1 of an unsigned label is 255.
            f = output.logit() if self.of == "probabilities" else output
            return ((2 * target.to(f.dtype) - 1) * f).reshape(len(f))
        # log p up to a constant of the row, which cancels; another class's alone is exact where p is close to 1.
        f = output.log() if self.of == "probabilities" else output
        label = target.long()[:, None]
        own = f.gather(1, label)[:, 0]
        others = f.scatter(1, label, -torch.inf)
        return own - others.logsumexp(1)

    def check(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Raise unless there is one true class a row."""
        if _is_one_logit(output):
            super().check(output, target.to(output.dtype))
            signed = target.to(output.dtype)
            if bool(((signed != 0) & (signed != 1)).any()):
                raise ValueError(must_be("y", "0 or 1 for the margin of one logit", "other values"))
        elif output.ndim != 2 or target.shape != output.shape[:1] or target.is_floating_point():
            must = "integer class indices (n,) against outputs (n, c) for the margin"
            got = f"{target.dtype} of shape {tuple(target.shape)} against {tuple(output.shape)}"
            raise ValueError(must_be("y", must, got))
        elif target.numel() and not 0 <= int(target.long().min()) <= int(target.long().max()) < output.shape[1]:
            raise ValueError(must_be("y", f"in the range [0, {output.shape[1]})", "other class indices"))


def _is_one_logit(output: torch.Tensor) -> bool:
    return output.ndim == 1 or (output.ndim == 2 and output.shape[1] == 1)
