"""The distribution that a loss is the negative log-likelihood of: its Fisher in the outputs, and its samples."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import scipy.stats
import torch
from torch import nn

from .._memory import rows_within
from .._validation import must_be
from ..models import ModuleLoss, OutputHessian, TorchTwiceDifferentiable

__all__ = ["Predictive", "SampledHessian", "predictive_of"]


class Predictive(ABC):
    r"""ℓ = Σₑ ωₑ (−s·log p(yₑ | fₑ)) + const over the elements e of a sample.

    ωₑ ≥ 0 is what the loss makes of the true target: its class weight, zero where it is ignored. It does not belong to
    the distribution, and stays as it is when labels are drawn.

    Parameters
    ----------
    loss : ModuleLoss
        The loss.
    """

    def __init__(self, loss: ModuleLoss) -> None:
        self.loss = loss

    def draws_per_sample(self, f: torch.Tensor) -> int:
        """Return how many labels one sample of outputs has."""
        return f[0].numel()

    def hessian_diagonal(self, f: torch.Tensor, y: torch.Tensor) -> torch.Tensor | None:
        """Return the Fisher in the outputs (m, c), diagonal; None where it is the output Hessian of the loss."""
        return None

    def columns(self, f: torch.Tensor, y: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Return √(s ω) ∇_f log p of labels drawn by uniforms u (m, r, labels), as (m, r, c)."""
        weight = self.weight(f, y).reshape(len(f), 1, -1)
        return (self.score(f.reshape(len(f), 1, -1), u) * weight.sqrt()).flatten(2)

    def weight(self, f: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return ωₑ."""
        return torch.ones_like(f)

    @abstractmethod
    def score(self, f: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Return √s ∇_f log p (m, r, c), signs aside, of labels drawn for outputs f (m, 1, c)."""


class Gaussian(Predictive):
    """Squared error: unit variance, s = 2."""

    def score(self, f: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Return √2 (y − f)."""
        return math.sqrt(2) * torch.special.ndtri(u)


class Bernoulli(Predictive):
    """Logits of one label each."""

    def weight(self, f: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return what the loss is at f = 0, over log 2."""
        return self.loss.elements(torch.zeros_like(f), y) / math.log(2)

    def score(self, f: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Return p − y."""
        p = f.sigmoid()
        return p - (u < p).to(f.dtype)


class PoissonLog(Predictive):
    """Logarithms of rates."""

    def rate(self, f: torch.Tensor) -> torch.Tensor:
        """Return the rates."""
        return f.exp()

    def score(self, f: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Return rate − y."""
        return self.rate(f) - self.sample(f, u)

    def sample(self, f: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Return counts, by the inverse of the distribution function."""
        rate = self.rate(f).expand(u.shape)
        counts = scipy.stats.poisson.ppf(u.double().cpu().numpy(), rate.double().cpu().numpy())
        return torch.from_numpy(counts).to(f)


class PoissonRate(PoissonLog):
    """Rates themselves, to which the loss adds its ``eps``."""

    def rate(self, f: torch.Tensor) -> torch.Tensor:
        """Return the rates, checked."""
        if bool((f < 0).any()):
            hint = 'Try log_input=True, or curvature="ggn".'
            raise ValueError(must_be("The rates of poisson_nll", "non-negative", f"{float(f.min()):.3g}", hint))
        return f

    def hessian_diagonal(self, f: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return E[y] / (f + eps)²."""
        return (self.rate(f) / (f + self.loss.module.eps).square()).reshape(len(f), -1)

    def score(self, f: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Return (rate − y) / (f + eps)."""
        return (self.rate(f) - self.sample(f, u)) / (f + self.loss.module.eps)


class Categorical(Predictive):
    """Logits (m, K, ...) of one label per position."""

    def draws_per_sample(self, f: torch.Tensor) -> int:
        """Return the number of positions."""
        return math.prod(f.shape[2:])

    def probabilities(self, f: torch.Tensor) -> torch.Tensor:
        """Return p, over dimension 1."""
        return f.softmax(1)

    def columns(self, f: torch.Tensor, y: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Return √ω (p − e_y), flat (m, r, c)."""
        p = self.probabilities(f.flatten(2) if f.ndim > 2 else f[:, :, None])
        label = (u[:, :, None] > p.cumsum(1)[:, None]).sum(2).clamp(max=p.shape[1] - 1)
        drawn = torch.zeros(*u.shape[:2], *p.shape[1:], dtype=p.dtype, device=p.device).scatter_(
            2, label[:, :, None], 1
        )
        weight = self.weight(f, y).reshape(len(f), 1, 1, -1)
        return (self.score_of(drawn, p[:, None]) * weight.sqrt()).flatten(2)

    def weight(self, f: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return what the loss is at equal logits, over log K."""
        if f.shape[1] == 1:
            return torch.ones_like(f)
        return self.loss.elements(torch.zeros_like(f), y) / math.log(f.shape[1])

    def score(self, f: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Not used: labels are of positions, not of outputs."""
        raise NotImplementedError

    def score_of(self, drawn: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        """Return the score of one-hot labels (m, r, K, positions)."""
        return p - drawn


class LogProbabilities(Categorical):
    """Log-probabilities (m, K, ...), as log_softmax returns them."""

    # The outputs at which the loss of a sample is its weight.
    reference = -1.0

    def probabilities(self, f: torch.Tensor) -> torch.Tensor:
        """Return p."""
        return f.exp()

    def hessian_diagonal(self, f: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return ω p: the score of label y is e_y."""
        p = self.probabilities(f)
        _check_normalised(p)
        return (self.weight(f, y).reshape(len(f), 1, *f.shape[2:]) * self.outer(p)).reshape(len(f), -1)

    def columns(self, f: torch.Tensor, y: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Return √ω e_y, flat (m, r, c)."""
        _check_normalised(self.probabilities(f))
        return super().columns(f, y, u)

    def outer(self, p: torch.Tensor) -> torch.Tensor:
        """Return the diagonal of E[score scoreᵀ]."""
        return p

    def weight(self, f: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the loss at the reference."""
        return self.loss.elements(torch.full_like(f, self.reference), y)

    def score_of(self, drawn: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        """Return e_y."""
        return drawn


class Probabilities(LogProbabilities):
    """Probabilities (m, K, ...), whose logarithm a skorch classifier takes in its loss."""

    reference = math.exp(-1.0)

    def probabilities(self, f: torch.Tensor) -> torch.Tensor:
        """Return p, which the outputs are."""
        return f

    def outer(self, p: torch.Tensor) -> torch.Tensor:
        """Return the diagonal of E[score scoreᵀ], 1 / p, and 0 for what is never drawn."""
        return torch.where(p > 0, 1 / p, 0.0)

    def score_of(self, drawn: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
        """Return e_y / p."""
        return torch.where(drawn > 0, drawn / p, 0.0)


class SampledHessian(OutputHessian):
    """The Fisher in the outputs by sampled labels, whose columns are made from their draws.

    Parameters
    ----------
    predictive : Predictive
        The distribution of labels.
    f, y : tensor
        Outputs (m, ...) and true targets.
    draws : tensor of shape (m, r, labels)
        Uniform.
    """

    def __init__(self, predictive: Predictive, f: torch.Tensor, y: torch.Tensor, draws: torch.Tensor) -> None:
        self.predictive, self.f, self.y, self.draws = predictive, f, y, draws
        self.rows, self.outputs, self.rank = len(f), f[0].numel(), draws.shape[1]

    @property
    def nbytes(self) -> int:
        """The draws and the outputs."""
        return self.draws.nbytes + self.f.nbytes

    def products(self, U: torch.Tensor) -> torch.Tensor:
        """Return S Sᵀ u, over the columns in chunks."""
        total = torch.zeros_like(U)
        for _, S in self._chunks():
            total += torch.einsum("mcr,kmr->kmc", S, torch.einsum("mcr,kmc->kmr", S, U))
        return total

    def columns(self, start: int, stop: int) -> torch.Tensor:
        """Return the scores of the labels drawn, over √r."""
        return self.predictive.columns(self.f, self.y, self.draws[:, start:stop]).mT / math.sqrt(self.rank)

    def combined(self, a: torch.Tensor) -> torch.Tensor:
        """Return S a, over the columns in chunks."""
        total = self.f.new_zeros(self.rows, self.outputs)
        for start, S in self._chunks():
            total += S @ a[start : start + S.shape[2]]
        return total

    def _chunks(self) -> Iterator[tuple[int, torch.Tensor]]:
        step = rows_within(4 * self.f.nbytes)
        for start in range(0, self.rank, step):
            yield start, self.columns(start, min(start + step, self.rank))


def predictive_of(model: TorchTwiceDifferentiable, f: torch.Tensor, batch: Any) -> Predictive:
    """Return the distribution that the model's loss is the negative log-likelihood of, for its outputs on a batch."""
    loss: Any = model.loss
    own = type(model).per_sample_loss is not TorchTwiceDifferentiable.per_sample_loss
    if own or not isinstance(loss, ModuleLoss):
        raise _unknown("per_sample_loss" if own else "a callable")
    kind, f = type(loss.module), f.detach()
    if kind not in _KINDS:
        raise _unknown(str(loss.module))
    if _is_plain(loss, f, f, batch[1]):
        chosen = _KINDS[kind]
        return PoissonRate(loss) if kind is nn.PoissonNLLLoss and not loss.module.log_input else chosen(loss)
    # skorch's classifiers take the logarithm themselves, of this.
    logarithm = (f + torch.finfo(f.dtype).eps).log()
    if kind is nn.NLLLoss and bool((f >= 0).all()) and _is_plain(loss, f, logarithm, batch[1]):
        return Probabilities(loss)
    got = f"{loss.module} with more to it"
    raise _unknown(got)


_KINDS: dict[type, Any] = {
    nn.MSELoss: Gaussian,
    nn.BCEWithLogitsLoss: Bernoulli,
    nn.CrossEntropyLoss: Categorical,
    nn.NLLLoss: LogProbabilities,
    nn.PoissonNLLLoss: PoissonLog,
}


def _is_plain(loss: ModuleLoss, f: torch.Tensor, seen: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether the loss of outputs f is its module's of what it sees: a net's own ``get_loss`` may do more."""
    if type(loss) is ModuleLoss:
        return True
    with torch.no_grad():
        received, expected = loss.elements(f, y), ModuleLoss(loss.module).elements(seen, y)
    return received.shape == expected.shape and torch.allclose(received, expected, rtol=1e-3, atol=1e-4)


def _unknown(got: str) -> ValueError:
    must = (
        "the negative log-likelihood of a known distribution: cross_entropy, nll, mse, bce_with_logits or poisson_nll"
    )
    return ValueError(must_be("The loss for the Fisher", must, got, 'Try curvature="ggn".'))


def _check_normalised(p: torch.Tensor) -> None:
    worst = float((p.sum(1) - 1).abs().max())
    if worst > 1e3 * torch.finfo(p.dtype).eps * p.shape[1]:
        hint = 'Try loss="cross_entropy" for logits, or curvature="ggn".'
        raise ValueError(must_be("The outputs for nll", "log-probabilities", f"exp(outputs) {worst:.3g} off 1", hint))
