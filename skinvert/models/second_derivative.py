"""Whether autograd's second derivatives are those of the gradient: held against differences of gradients.

A backward pass that was written for one derivative (a fused kernel, a custom ``autograd.Function``) may take as
constants what depends on the parameters. The products with the Hessian are then wrong, and nothing else shows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from .._check import must_be
from .._memory import working_memory
from .._types import Batch

if TYPE_CHECKING:
    from .leaks import Watch
    from .torch import TorchTwiceDifferentiable

__all__ = [
    "SecondDerivativeError",
    "check_loss_derivative",
    "check_second_derivative",
    "constant_entries",
    "in_float64",
]

NOT_FINITE = "NaN or infinity, where the gradient is finite (a root or a norm at zero?)"
HINT = 'Try curvature="ggn", which takes first derivatives alone.'


class SecondDerivativeError(ValueError):
    """Autograd's second derivatives are not those of its first ones."""


def constant_entries(model: TorchTwiceDifferentiable, batch: Batch) -> torch.Tensor:
    """Return which entries of θ (p,) autograd takes as constants on a batch.

    What a ``detach()`` cuts off, or nothing depends on; and the padding rows of embeddings.
    """
    value = model.per_sample_loss(model.forward(batch), batch).sum()
    reached: Any = [None] * len(model.theta)
    if value.requires_grad:
        reached = torch.autograd.grad(value, model.theta, allow_unused=True)
    parts = [
        torch.full(tensor.shape, part is None, dtype=torch.bool, device=tensor.device)
        for tensor, part in zip(model.theta, reached, strict=True)
    ]
    places = {id(tensor): part for tensor, part in zip(model.theta, parts, strict=True)}
    for module in model.module.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.padding_idx is not None:
            if id(module.weight) in places:
                places[id(module.weight)][module.padding_idx] = True
    return torch.cat([part.reshape(-1) for part in parts])


def in_float64(model: TorchTwiceDifferentiable, batch: Batch) -> Any:
    """Return a copy of the model in float64 that takes a batch, in float64 too; None where there is none.

    Nor where its gradient is not the loss's own, as a straight-through estimate is not: differences of it mean nothing.
    """
    if not _fits(model):
        return None
    names = [escape(name) for name in model.layout.names]
    try:
        double, watch = _probed(model, names, torch.float64)
        probe = _Probe(double, batch)
        gradient, v, step = probe.gradient(), probe.direction(1), probe.precision.steps[0]
        with probe.at(step * v):
            ahead = probe.loss()
        with probe.at(-step * v):
            slope = (ahead - probe.loss()) / (2 * step)
    except Exception:
        # A model may hold to its own dtype.
        return None
    if watch.lower:
        # Differences would be of its rounding.
        return None
    # Not (a > b): NaN compares false.
    return double if abs(slope - float((gradient * v).sum())) <= 1e-4 * float((gradient * v).norm()) else None


def check_second_derivative(model: TorchTwiceDifferentiable, batch: Batch, doubled: Any) -> None:
    """Raise where products with the Hessian on a batch of few rows are not differences of gradients, or asymmetric.

    In a float64 copy where the model takes one and it fits the memory.

    Parameters
    ----------
    model : TorchTwiceDifferentiable
        Unchanged.
    batch, doubled : batch
        Of tensors on the model's device; the same in float64.
    """
    names = [escape(name) for name in model.layout.names]
    if model.dtype == torch.float64 or not _fits(model):
        fault = _fault(*_own(model, names, batch))
    else:
        try:
            double, watch = _probed(model, names, torch.float64)
            fault, in_double = _fault(double, doubled), not watch.lower
        except Exception:
            # A model may hold to its own dtype, in its code or in tensors that are no buffers.
            in_double = False
        if not in_double:
            fault = _fault(*_own(model, names, batch))
    if fault is not None:
        must = "those of its gradient"
        message = must_be('The second derivatives of the loss for curvature="hessian"', must, fault, HINT)
        # There differences of gradients would be no better.
        raise ValueError(message) if fault == NOT_FINITE else SecondDerivativeError(message)


def check_loss_derivative(model: TorchTwiceDifferentiable, outputs: torch.Tensor, batch: Batch, doubled: Any) -> None:
    """Raise where the loss's second derivatives in the outputs, of which the GGN is made, are not its gradient's."""
    try:
        fault = _fault(_LossAlone(model, outputs.double()), doubled)
    except Exception:
        # A loss may hold to its own dtype.
        fault = _fault_of_loss(model, outputs, batch)
    if fault is not None:
        hint = 'Try curvature="empirical_fisher", which takes first derivatives alone.'
        raise ValueError(
            must_be("The second derivatives of the loss in the outputs", "those of its gradient", fault, hint)
        )


def _fault_of_loss(model: TorchTwiceDifferentiable, outputs: torch.Tensor, batch: Batch) -> str | None:
    try:
        return _fault(_LossAlone(model, outputs), batch)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        # As of a probability of 1: there is no step beyond it.
        got, hint = f"outputs at its edge: {error}", 'Try a loss of logits, as "bce_with_logits".'
        raise ValueError(must_be("The outputs", "inside of the loss's domain", got, hint)) from error


class _LossAlone:
    """A loss as a function of the outputs, which stand where the parameters do."""

    def __init__(self, model: TorchTwiceDifferentiable, outputs: torch.Tensor) -> None:
        self.model, self.dtype = model, outputs.dtype
        self.theta = [outputs.detach().clone().requires_grad_(True)]
        self.layout = SimpleNamespace(names=("the loss",))

    def forward(self, _: Any) -> torch.Tensor:
        return self.theta[0]

    def per_sample_loss(self, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
        return self.model.per_sample_loss(outputs, batch)

    def gradient_of(self, value: torch.Tensor, create_graph: bool = False) -> torch.Tensor:
        parts = torch.autograd.grad(value, self.theta, create_graph=create_graph, materialize_grads=True)
        return parts[0].reshape(-1)


class _Precision(NamedTuple):
    """Steps relative to θ, what a difference must agree with itself to, and what is a fault."""

    steps: tuple[float, float]
    trusted: float
    fault: float


_PRECISION = {
    torch.float64: _Precision((1e-6, 2e-7), 3e-5, 2e-4),
    torch.float32: _Precision((1e-2, 2e-3), 2e-2, 1e-1),
}


class _Probe:
    """Gradients and products with the Hessian of the summed loss of a few rows, at θ and near it."""

    def __init__(self, model: TorchTwiceDifferentiable | _LossAlone, batch: Batch) -> None:
        self.model, self.batch = model, batch
        self.home = [tensor.detach().clone() for tensor in model.theta]
        self.sizes = [tensor.numel() for tensor in self.home]
        self.precision = _PRECISION.get(model.dtype, _PRECISION[torch.float32])
        self.eps = torch.finfo(model.dtype).eps
        self.moves = None if isinstance(model, _LossAlone) else ~constant_entries(model, batch)

    def direction(self, seed: int) -> torch.Tensor:
        """Return a random direction (p,), in each tensor on the scale of its own entries."""
        generator = torch.Generator("cpu").manual_seed(seed)
        scales = [float(tensor.square().mean().sqrt()) for tensor in self.home]
        usual = max(scales) or 1.0
        parts = [
            (scale or usual) * torch.randn(size, generator=generator, dtype=torch.float64, device="cpu").to(tensor)
            for scale, size, tensor in zip(scales, self.sizes, self.home, strict=True)
        ]
        drawn = torch.cat(parts)
        return drawn if self.moves is None else drawn * self.moves

    def loss(self) -> float:
        """Return the summed losses."""
        return float(self.model.per_sample_loss(self.model.forward(self.batch), self.batch).sum().detach())

    def gradient(self, create_graph: bool = False) -> torch.Tensor:
        """Return the gradient (p,) of the summed losses."""
        losses = self.model.per_sample_loss(self.model.forward(self.batch), self.batch)
        gradient = self.model.gradient_of(losses.sum(), create_graph)
        return gradient if create_graph else gradient.detach()

    def products(self, *directions: torch.Tensor) -> list[torch.Tensor]:
        """Return the Hessian's product with each direction, by a second derivative."""
        gradient = self.gradient(create_graph=True)
        if not gradient.requires_grad:
            return [torch.zeros_like(v) for v in directions]
        theta = self.model.theta
        products = [
            torch.autograd.grad(gradient, theta, v, retain_graph=True, materialize_grads=True) for v in directions
        ]
        return [torch.cat([part.reshape(-1) for part in parts]).detach() for parts in products]

    def difference(self, v: torch.Tensor, step: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (g(θ + hv) − g(θ − hv)) / 2h, and the second difference over 2h: large where a kink is crossed."""
        with self.at(step * v):
            ahead = self.gradient()
        with self.at(-step * v):
            behind = self.gradient()
        return (ahead - behind) / (2 * step), (ahead - 2 * self.gradient() + behind) / (2 * step)

    def reach(self) -> torch.Tensor:
        """Return ‖Jᵀr‖ (of each tensor) for a random r on the outputs: what rounding in the loss is multiplied by."""
        outputs = self.model.forward(self.batch)
        if not isinstance(outputs, torch.Tensor):
            outputs = self.model.per_sample_loss(outputs, self.batch)
        generator = torch.Generator("cpu").manual_seed(0)
        r = torch.randn(outputs.shape, generator=generator, dtype=torch.float64, device="cpu").to(outputs)
        size = outputs.detach().abs().max().clamp(min=1)
        return size * self.norms(self.model.gradient_of((r * outputs).sum()).detach())

    def norms(self, flat: torch.Tensor) -> torch.Tensor:
        """Return the norm of each tensor's part of a flat row."""
        return torch.stack([part.norm() for part in flat.split(self.sizes)])

    @contextmanager
    def at(self, offset: torch.Tensor) -> Iterator[None]:
        """Stand at θ + ``offset`` for a while."""
        parts = zip(self.model.theta, self.home, offset.split(self.sizes), strict=True)
        with torch.no_grad():
            for tensor, home, part in parts:
                tensor.copy_(home + part.reshape(home.shape))
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, home in zip(self.model.theta, self.home, strict=True):
                    tensor.copy_(home)


def _fault(model: TorchTwiceDifferentiable | _LossAlone, batch: Batch) -> str | None:
    """Return what is wrong with the second derivatives, or None."""
    probe = _Probe(model, batch)
    u, v = probe.direction(1), probe.direction(2)
    try:
        Hu, Hv = probe.products(u, v)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise SecondDerivativeError(
            must_be('The model for curvature="hessian"', "twice differentiable", str(error), HINT)
        ) from error
    difference, _ = probe.difference(v, probe.precision.steps[1])
    if not bool(torch.isfinite(difference).all()):
        return None
    if not bool(torch.isfinite(torch.stack([Hu, Hv])).all()):
        return NOT_FINITE
    close = probe.norms(Hv - difference) <= probe.precision.fault * probe.norms(difference)
    gap, size = (u * Hv).sum() - (v * Hu).sum(), (u * Hv).norm() + (v * Hu).norm()
    if bool(close.all()) and bool(gap.abs() <= probe.precision.fault * size):
        return None
    return _confirmed(probe, {1: Hu, 2: Hv})


def _confirmed(probe: _Probe, products: dict[int, torch.Tensor]) -> str | None:
    """Return the fault where neither kinks nor rounding explain it, in both directions."""
    u, v = probe.direction(1), probe.direction(2)
    with probe.at(100 * probe.eps * probe.direction(3)):
        again = dict(zip(products, probe.products(u, v), strict=True))
    reach = probe.reach()
    bad = [_differs(probe, probe.direction(seed), products[seed], again[seed], reach) for seed in products]
    both = [name for name, one, other in zip(probe.model.layout.names, *bad, strict=True) if one and other]
    if both:
        layers = ", ".join(dict.fromkeys(name.rpartition(".")[0] or name for name in both))
        return (
            f"products with the Hessian that are no differences of gradients in {layers} "
            "(there, or behind it, a backward pass is not made for a second derivative)"
        )
    gap, size = (u * products[2]).sum() - (v * products[1]).sum(), (u * products[2]).norm() + (v * products[1]).norm()
    moved = ((u * (products[2] - again[2])).sum().abs() + (v * (products[1] - again[1])).sum().abs()) * 4
    rounding = 1e3 * probe.eps * (reach * probe.norms(u)).sum() * (reach * probe.norms(v)).sum()
    if bool(gap.abs() > probe.precision.fault * size + moved + rounding):
        value = float((u * products[2]).sum())
        return f"a Hessian that is not symmetric: uᵀHv − vᵀHu = {float(gap):.3g} for uᵀHv = {value:.3g}"
    return None


def _differs(
    probe: _Probe, v: torch.Tensor, product: torch.Tensor, again: torch.Tensor, reach: torch.Tensor
) -> list[bool]:
    """Return for each tensor whether its part of the product is surely none of the gradient's derivative along v."""
    (first, kink), (second, sharp) = (probe.difference(v, step) for step in probe.precision.steps)
    norms, trusted = probe.norms, probe.precision.trusted
    error, sizes = norms(product - second), torch.maximum(norms(product), norms(second))
    # Forward agrees with backward, or comes nearer to it with the step: then no kink lies between.
    flat = (norms(kink) <= trusted * norms(first)) & (norms(sharp) <= trusted * norms(second))
    smooth = (norms(kink) <= 5 * trusted * norms(first)) & (norms(sharp) <= 2 * trusted * norms(second))
    smooth &= norms(sharp) <= 0.3 * norms(kink)
    # Steps of two lengths agree: then rounding is small.
    steady = 4 * torch.maximum(norms(first - second), norms(product - again)) <= error
    seen = error > probe.precision.fault * sizes + 1e3 * probe.eps / probe.precision.steps[0] * reach
    return ((flat | smooth) & steady & seen).tolist()


def _probed(
    model: TorchTwiceDifferentiable, names: list[str], dtype: torch.dtype
) -> tuple[TorchTwiceDifferentiable, Watch]:
    """Return a copy whose parameters may be moved, and its look-out, which says nothing of casts: none asked for it."""
    duplicate = model.at_point(names, dtype, model.device)
    watch = duplicate.watch
    assert watch is not None
    watch.quiet = True
    return duplicate, watch


def _own(model: TorchTwiceDifferentiable, names: list[str], batch: Batch) -> tuple[TorchTwiceDifferentiable, Batch]:
    """Return a copy in the model's own dtype, whose parameters may be moved."""
    duplicate, _ = _probed(model, names, model.dtype)
    duplicate.loss, duplicate._verified = model.loss, model._verified
    return duplicate, batch


def _fits(model: TorchTwiceDifferentiable) -> bool:
    tensors = [*model.module.parameters(), *model.module.buffers()]
    return 8 * sum(tensor.numel() for tensor in tensors) <= working_memory()
