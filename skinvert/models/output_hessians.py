"""∇²_f sᵢ of the rows of a batch: products by a few numbers an output, and the columns of a factor on demand."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["DiagonalHessian", "FactoredHessian", "OutputHessian", "SoftmaxHessian", "closed_form"]


class OutputHessian(ABC):
    """∇²_f sᵢ = SᵢSᵢᵀ of m rows with c outputs each, flat in the order of the outputs; S (m, c, r) is never held whole.

    Attributes
    ----------
    rows, outputs, rank : int
        m, c and r.
    """

    rows: int
    outputs: int
    rank: int

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """What is held."""

    @property
    def column_numbers(self) -> int:
        """How many numbers of a row one column of S takes."""
        return self.outputs

    @abstractmethod
    def products(self, U: torch.Tensor) -> torch.Tensor:
        """Return SᵢSᵢᵀ u for each row of U (k, m, c)."""

    @abstractmethod
    def columns(self, start: int, stop: int) -> torch.Tensor:
        """Return the columns start, …, stop − 1 of S, (m, c, stop − start)."""

    @abstractmethod
    def combined(self, a: torch.Tensor) -> torch.Tensor:
        """Return Sᵢ a (m, c) of coefficients a (r,)."""


class DiagonalHessian(OutputHessian):
    """A loss whose outputs do not meet: its second derivatives, clipped at zero where rounding made them negative.

    Parameters
    ----------
    values : tensor of shape (m, ...)
        Of each output.
    """

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values.reshape(len(values), -1).clamp(min=0)
        self.rows, self.outputs = self.values.shape
        self.rank = self.outputs

    @property
    def nbytes(self) -> int:
        """The values."""
        return self.values.nbytes

    def products(self, U: torch.Tensor) -> torch.Tensor:
        """Return the entries times the values."""
        return U * self.values

    def columns(self, start: int, stop: int) -> torch.Tensor:
        """Return the roots of the values, each in a column of its own."""
        part = self.values.new_zeros(self.rows, self.outputs, stop - start)
        part[:, start:stop] = torch.diag_embed(self.values[:, start:stop].sqrt())
        return part

    def combined(self, a: torch.Tensor) -> torch.Tensor:
        """Return the coefficients times the roots."""
        return self.values.sqrt() * a


class SoftmaxHessian(OutputHessian):
    r"""Cross-entropy of K logits at each of T positions: wₜ (diag(pₜ) − pₜpₜᵀ), block-diagonal over the positions.

    Its factor is √w (diag(√p) − p√pᵀ), and products take that form too, p ⊙ C²u with Cu = u − pᵀu: exact for one-hot p,
    where diag(p) − ppᵀ cancels.

    Parameters
    ----------
    f : tensor of shape (m, K, ...)
        Logits, the classes along dimension 1.
    weight : tensor of shape (m, ...)
        What the targets of a position weigh; 0 where it is ignored.
    """

    def __init__(self, f: torch.Tensor, weight: torch.Tensor) -> None:
        self.p = f.reshape(len(f), f.shape[1], -1).softmax(1)
        self.weight = weight.reshape(len(f), -1)
        self.rows, self.outputs = len(f), self.p[0].numel()
        self.rank = self.outputs

    @property
    def nbytes(self) -> int:
        """Probabilities and weights."""
        return self.p.nbytes + self.weight.nbytes

    def products(self, U: torch.Tensor) -> torch.Tensor:
        """Return w p ⊙ C²u."""
        u = U.reshape(len(U), *self.p.shape)
        for _ in range(2):
            u = u - (self.p * u).sum(2, keepdim=True)
        return (u.mul_(self.p).mul_(self.weight[:, None])).reshape(U.shape)

    def columns(self, start: int, stop: int) -> torch.Tensor:
        """Return √(w p_v) (e_v − p) of the classes v, at their positions."""
        K, T = self.p.shape[1:]
        places = torch.arange(start, stop, device=self.p.device)
        v, t = places // T, places % T
        size = (self.weight[:, t] * self.p[:, v, t]).sqrt()
        blocks = -self.p[:, :, t] * size[:, None]
        own = torch.arange(len(places), device=self.p.device)
        blocks[:, v, own] += size
        if T == 1:
            return blocks
        part = self.p.new_zeros(self.rows, K, T, len(places))
        part[:, :, t, own] = blocks
        return part.flatten(1, 2)

    def combined(self, a: torch.Tensor) -> torch.Tensor:
        """Return √w (√p ⊙ a − p √pᵀa)."""
        root = self.p.sqrt()
        along = root * a.reshape(self.p.shape[1:])
        return (self.weight.sqrt()[:, None] * (along - self.p * along.sum(1, keepdim=True))).flatten(1)


class FactoredHessian(OutputHessian):
    """Any other loss: S as it is.

    Parameters
    ----------
    factor : tensor of shape (m, c, r)
        S.
    """

    def __init__(self, factor: torch.Tensor) -> None:
        self.factor = factor
        self.rows, self.outputs, self.rank = factor.shape

    @property
    def nbytes(self) -> int:
        """The factor."""
        return self.factor.nbytes

    def products(self, U: torch.Tensor) -> torch.Tensor:
        """Return S Sᵀ u."""
        return torch.einsum("mcr,kmr->kmc", self.factor, torch.einsum("mcr,kmc->kmr", self.factor, U))

    def columns(self, start: int, stop: int) -> torch.Tensor:
        """Return columns of S."""
        return self.factor[:, :, start:stop]

    def combined(self, a: torch.Tensor) -> torch.Tensor:
        """Return S a."""
        return self.factor @ a


def closed_form(module: nn.Module, f: torch.Tensor, y: torch.Tensor) -> OutputHessian | None:
    """Return ∇²_f of the unreduced loss of a torch module, or None where there is no closed form.

    ``y`` is as the module takes it: class indices as int64, all else in the dtype of the outputs f (m, ...).
    """
    # Exactly these: a user's subclass may mean something else.
    form = _FORMS.get(type(module))
    return None if form is None else form(module, f.detach(), y)


def _squared_error(_: nn.MSELoss, f: torch.Tensor, __: torch.Tensor) -> OutputHessian:
    return DiagonalHessian(torch.full_like(f, 2.0))


def _logistic(module: nn.BCEWithLogitsLoss, f: torch.Tensor, y: torch.Tensor) -> OutputHessian:
    values = f.sigmoid() * (-f).sigmoid()
    if module.pos_weight is not None:
        values = values * (1 + (module.pos_weight - 1) * y)
    return DiagonalHessian(values if module.weight is None else values * module.weight)


def _cross_entropy(module: nn.CrossEntropyLoss, f: torch.Tensor, y: torch.Tensor) -> OutputHessian:
    """Return the form for the mass Σ_v q_v of the target's weighted distribution q, which is all that counts."""
    K, smoothing = f.shape[1], module.label_smoothing
    w = f.new_ones(K) if module.weight is None else module.weight.to(f.dtype)
    if y.is_floating_point():
        mass = torch.einsum("k,mk...->m...", w, y * (1 - smoothing) + smoothing / K)
    else:
        valid = y != module.ignore_index
        own = w[y.where(valid, 0)]
        mass = ((1 - smoothing) * own + smoothing / K * w.sum()) * valid
    return SoftmaxHessian(f, mass)


def _huber(module: nn.HuberLoss, f: torch.Tensor, y: torch.Tensor) -> OutputHessian:
    return DiagonalHessian(((f - y).abs() < module.delta).to(f.dtype))


def _smooth_l1(module: nn.SmoothL1Loss, f: torch.Tensor, y: torch.Tensor) -> OutputHessian | None:
    if not module.beta > 0:
        return None
    return DiagonalHessian(((f - y).abs() < module.beta).to(f.dtype) / module.beta)


def _poisson(module: nn.PoissonNLLLoss, f: torch.Tensor, y: torch.Tensor) -> OutputHessian:
    return DiagonalHessian(f.exp() if module.log_input else y / (f + module.eps).square())


def _linear(_: nn.Module, f: torch.Tensor, __: torch.Tensor) -> OutputHessian:
    return DiagonalHessian(torch.zeros_like(f))


_FORMS: dict[type, Callable[[Any, torch.Tensor, torch.Tensor], OutputHessian | None]] = {
    nn.MSELoss: _squared_error,
    nn.BCEWithLogitsLoss: _logistic,
    nn.CrossEntropyLoss: _cross_entropy,
    nn.HuberLoss: _huber,
    nn.SmoothL1Loss: _smooth_l1,
    nn.PoissonNLLLoss: _poisson,
    nn.NLLLoss: _linear,
    nn.KLDivLoss: _linear,
}
