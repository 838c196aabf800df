"""What every loss must keep: rows on their own, derivatives that are its own, and shares that make its mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..models import Loss, as_loss
from .claims import claim, raise_faults

__all__ = ["LOSS_CHECKS", "check_loss"]

# Steps of central differences in float64: their error is of the order of its square, and of 1e-16 over it.
STEP = 1e-5
CLOSE = 1e-6


@dataclass(frozen=True)
class _Sample:
    """A loss with outputs (m, ...) and targets of m rows."""

    loss: Loss
    outputs: torch.Tensor
    targets: torch.Tensor

    def values(self, outputs: torch.Tensor) -> torch.Tensor:
        return self.loss.per_sample(outputs, self.targets)

    def gradient(self, outputs: torch.Tensor) -> torch.Tensor:
        free = outputs.detach().requires_grad_(True)
        return torch.autograd.grad(self.values(free).sum(), free)[0]


def check_loss(loss: object, outputs: torch.Tensor, targets: torch.Tensor) -> None:
    """Hold a loss to its contract on a batch; AssertionError with every fault that was found.

    One value a row that no other row changes; gradients against central differences; the closed form of the output
    Hessian, where there is one, against differences of gradients, and its factor against it; shares mᵢ ≥ 0 of the
    denominator, one a row; and for what is a torch module or a function, its own value against Σ sᵢ / Σ mᵢ.

    Parameters
    ----------
    loss : Loss, str, torch loss module or callable
        As ``HessianInverter`` takes it.
    outputs : tensor of shape (m, ...), float64
        Outputs of a model where the loss is smooth, m ≥ 2.
    targets : tensor of shape (m, ...)
        Their targets.

    Raises
    ------
    AssertionError
        With one line for each check that failed.

    Examples
    --------
    >>> check_loss("mse", torch.tensor([[1.0], [2.0]], dtype=torch.float64), torch.zeros(2, 1))
    """
    known = as_loss(loss)
    known.check(outputs, targets)
    known.verify(outputs, targets)
    raise_faults(_Sample(known, outputs.detach(), targets), type(known).__name__, LOSS_CHECKS)


def check_rows_are_alone(sample: _Sample) -> None:
    """Hold each row's value to that of the row alone."""
    values = sample.values(sample.outputs)
    claim(values.shape == (len(sample.outputs),), "there is one value a row", tuple(values.shape))
    for i in range(len(values)):
        alone = sample.loss.per_sample(sample.outputs[i : i + 1], sample.targets[i : i + 1])
        gap = float((alone - values[i]).abs().max())
        claim(gap <= 1e-9 * max(1.0, float(values[i].abs())), f"row {i} alone has the value it has", f"{gap:.3g} off")


def check_gradient(sample: _Sample) -> None:
    """Hold the gradient in the outputs to central differences."""
    gradient, direction = sample.gradient(sample.outputs), _direction(sample.outputs)
    step = STEP * direction
    ahead, behind = sample.values(sample.outputs + step), sample.values(sample.outputs - step)
    expected = (ahead - behind) / (2 * STEP)
    received = (gradient * direction).reshape(len(expected), -1).sum(1)
    _near(received, expected, "the gradient is that of differences")


def check_output_hessian(sample: _Sample) -> None:
    """Hold the closed form of ∇²_f sᵢ to differences of gradients, and its factor to its products."""
    closed = sample.loss.output_hessian(sample.outputs, sample.targets)
    if closed is None:
        return
    m, direction = len(sample.outputs), _direction(sample.outputs)
    ahead, behind = (sample.gradient(sample.outputs + s * STEP * direction) for s in (1, -1))
    U = direction.reshape(1, m, -1)
    products = closed.products(U)
    _near(products, ((ahead - behind) / (2 * STEP)).reshape(U.shape), "the output Hessian is that of differences")
    S = closed.columns(0, closed.rank)
    _near((S @ (S.mT @ U[0][:, :, None]))[None, :, :, 0], products, "SSᵀ is the output Hessian")


def check_mass(sample: _Sample) -> None:
    """Hold the shares of the denominator: one a row, none negative, of the row alone."""
    mass = sample.loss.mass(sample.outputs, sample.targets)
    claim(mass.shape == (len(sample.outputs),), "there is one share a row", tuple(mass.shape))
    claim(bool((mass >= 0).all()), "no share is negative", mass.tolist())
    alone = [sample.loss.mass(sample.outputs[i : i + 1], sample.targets[i : i + 1]) for i in range(len(mass))]
    _near(torch.cat(alone), mass, "a row's share is its own")


def check_conversion(sample: _Sample) -> None:
    """Hold the loss in float32 to itself."""
    other = sample.loss.to(torch.float32, sample.outputs.device)
    targets = sample.targets.float() if sample.targets.is_floating_point() else sample.targets
    other.verify(sample.outputs.float(), targets)
    values = other.per_sample(sample.outputs.float(), targets).double()
    gap = float((values - sample.values(sample.outputs)).norm())
    claim(gap <= 1e-4 * max(1.0, float(values.norm())), "float32 gives the values of float64", f"{gap:.3g} off")


LOSS_CHECKS: list[Callable[[_Sample], None]] = [
    check_rows_are_alone,
    check_gradient,
    check_output_hessian,
    check_mass,
    check_conversion,
]


def _direction(like: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def _near(received: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    gap, size = float((received - expected).detach().norm()), float(expected.detach().norm())
    claim(gap <= CLOSE * max(1.0, size), what, f"a difference of {gap:.3g} in {size:.3g}")
