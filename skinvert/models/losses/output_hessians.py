"""∇²_f sᵢ of the rows of a batch: products by a few numbers an output, and the columns of a factor on demand."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch

__all__ = ["DiagonalHessian", "FactoredHessian", "OutputHessian", "SoftmaxHessian", "explains", "explains_differences"]


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
        """Return Sᵢ a (m, c) of coefficients a (r,), or Sᵢ aᵢ of coefficients of each row's own (m, r)."""


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
        if T == 1:
            size = (self.weight * self.p[:, start:stop, 0]).sqrt()
            blocks = -self.p * size[:, None]
            blocks.diagonal(-start, 1, 2).add_(size)
            return blocks
        places = torch.arange(start, stop, device=self.p.device)
        v, t = places // T, places % T
        size = (self.weight[:, t] * self.p[:, v, t]).sqrt()
        blocks = -self.p[:, :, t] * size[:, None]
        own = torch.arange(len(places), device=self.p.device)
        blocks[:, v, own] += size
        part = self.p.new_zeros(self.rows, K, T, len(places))
        part[:, :, t, own] = blocks
        return part.flatten(1, 2)

    def combined(self, a: torch.Tensor) -> torch.Tensor:
        """Return √w (√p ⊙ a − p √pᵀa)."""
        root = self.p.sqrt()
        along = root * a.reshape(*a.shape[:-1], *self.p.shape[1:])
        return (self.weight.sqrt()[:, None] * (along - self.p * along.sum(1, keepdim=True))).flatten(1)


class FactoredHessian(OutputHessian):
    """Any other loss: S as it is.

    Parameters
    ----------
    factor : tensor of shape (m, c, r)
        S itself.
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
        return (self.factor @ a[..., None]).squeeze(-1)


PerSample = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def explains(closed: OutputHessian, per_sample: PerSample, f: torch.Tensor, y: torch.Tensor) -> bool:
    """Return whether products with a closed form are those of autograd's ∇²_f sᵢ, along one random direction."""
    v = _direction(f)
    free = f.detach().requires_grad_(True)
    gradient = _gradient(per_sample, free, y, create_graph=True)
    expected = torch.zeros_like(v)
    if gradient.requires_grad:
        (expected,) = torch.autograd.grad(gradient, free, v, materialize_grads=True)
    return _are_products(closed, v, expected)


def explains_differences(closed: OutputHessian, per_sample: PerSample, f: torch.Tensor, y: torch.Tensor) -> bool:
    """Return the same of differences of the gradient, for float64: a loss may have first derivatives alone."""
    v = _direction(f)
    step = 1e-5 * (1 + f.abs().max())
    ahead, behind = (_gradient(per_sample, (f + e * v).detach().requires_grad_(True), y) for e in (step, -step))
    return _are_products(closed, v, (ahead - behind) / (2 * step))


def _direction(f: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator(f.device).manual_seed(0)
    return torch.randn(f.shape, generator=generator, dtype=f.dtype, device=f.device)


def _gradient(per_sample: PerSample, f: torch.Tensor, y: torch.Tensor, create_graph: bool = False) -> torch.Tensor:
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(per_sample(f, y).sum(), f, create_graph=create_graph)
    return gradient


def _are_products(closed: OutputHessian, v: torch.Tensor, expected: torch.Tensor) -> bool:
    received = closed.products(v.reshape(1, len(v), -1)).reshape(v.shape)
    rounding = 100 * torch.finfo(v.dtype).eps * v.norm()
    return bool((received - expected).norm() <= 1e-4 * expected.norm() + rounding)
