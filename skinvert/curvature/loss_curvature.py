"""∇²_f sᵢ of a loss without a closed form, by autograd; and whether it is convex in the outputs."""

from __future__ import annotations

import torch

from .._check import must_be
from .._types import Batch
from ..models import TorchTwiceDifferentiable, doubled
from .products import Products, flat_products

__all__ = ["check_convex", "loss_products", "output_factor"]


def output_factor(model: TorchTwiceDifferentiable, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the symmetric root Sᵢ (m, c, c) of ∇²_f sᵢ by autograd; raise where the loss is not convex in the outputs.

    The root that is symmetric is the only one that is continuous in ∇²_f sᵢ: draws made of its columns are a row's own,
    whatever batch it is in, where others turn with the last digit of eigenvalues that are alike.
    """
    values, vectors = torch.linalg.eigh(_output_hessians(model, outputs, batch))
    if bool((values < 0).any()):
        _check_least(model, outputs, batch, values)
    # The root of an eigenvalue that is rounding would be rounding of half the digits.
    rounding = values.shape[1] * torch.finfo(values.dtype).eps * values[:, -1:]
    roots = torch.where(values > rounding, values, 0).clamp(min=0).sqrt()
    factor: torch.Tensor = (vectors * roots[:, None, :]) @ vectors.mT
    return factor


def _check_least(model: TorchTwiceDifferentiable, outputs: torch.Tensor, batch: Batch, values: torch.Tensor) -> None:
    """Raise where the least of the eigenvalues (m, c) is more than rounding makes of zero.

    In float32 that of the loss's own scale may hide all of a loss that is nearly flat here: float64 has it then.
    """
    if float(values.min()) < -_rounding(model, outputs, batch, values):
        raise _not_convex(float(values.min()))
    if values.dtype == torch.float64 or float(values.min()) >= -_relative_rounding(values) * float(values.max()):
        return
    exact, rows = outputs.double(), doubled(batch)
    try:
        values = torch.linalg.eigvalsh(_output_hessians(model, exact, rows))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError):
        # A loss that holds float32 tensors; a callable's errors are ValueErrors by then.
        return
    _check_least(model, exact, rows, values)


def check_convex(model: TorchTwiceDifferentiable, outputs: torch.Tensor, batch: Batch) -> None:
    """Raise where a few power iterations on ∇²_f sᵢ, all rows at once, meet a negative eigenvalue: c² would not fit."""
    ones = torch.ones(len(outputs), dtype=outputs.dtype, device=outputs.device)
    free, zero = outputs.detach().requires_grad_(True), torch.zeros_like(outputs, requires_grad=True)
    products = loss_products(model, free, batch, ones)
    largest = float(_extreme(products, free, 0.0).abs().max())
    lowest = float(_extreme(products, free, largest).min())
    # All those of confident rows are rounding.
    at_zero = float(_extreme(loss_products(model, zero, batch, ones), zero, 0.0).abs().max().nan_to_num(0.0, 0.0, 0.0))
    # A few iterations find large negative parts, not those at the size of rounding.
    if lowest < -1e-3 * max(largest, at_zero):
        raise _not_convex(lowest)


def loss_products(
    model: TorchTwiceDifferentiable, outputs: torch.Tensor, batch: Batch, weights: torch.Tensor
) -> Products:
    """Return U (k, m, c) -> wᵢ ∇²_f sᵢ U."""
    with torch.enable_grad():
        losses = (model.per_sample_loss(outputs, batch) * weights).sum()
        gradient = torch.autograd.grad(losses, outputs, create_graph=True)[0]
    products = flat_products(gradient, [outputs])
    return lambda U: products(U.flatten(1)).reshape(U.shape)


def _extreme(products: Products, f: torch.Tensor, shift: float) -> torch.Tensor:
    """Return the Rayleigh quotient (m,) of each row's ∇²_f s after ten steps of H − shift."""
    generator = torch.Generator(f.device).manual_seed(0)
    v = torch.randn(1, len(f), f[0].numel(), generator=generator, dtype=f.dtype, device=f.device)
    tiny = torch.finfo(f.dtype).tiny
    value = torch.zeros(len(f), dtype=f.dtype, device=f.device)
    for _ in range(10):
        v = v / v.norm(dim=2, keepdim=True).clamp(min=tiny)
        Hv = products(v)
        value = (v * Hv).sum(2)[0]
        v = Hv - shift * v
    return value


def _not_convex(least: float) -> ValueError:
    hint = 'Try curvature="hessian" or "empirical_fisher".'
    return ValueError(must_be("The loss for the GGN", "convex in the outputs", f"an eigenvalue {least:.3g}", hint))


def _rounding(model: TorchTwiceDifferentiable, outputs: torch.Tensor, batch: Batch, values: torch.Tensor) -> float:
    """Return how negative rounding alone can make an eigenvalue.

    All those of confident rows are rounding: the loss's own scale is the larger of what it has here and at zero.
    """
    at_zero = _output_hessians(model, 0 * outputs, batch).abs().max().nan_to_num(0.0, 0.0, 0.0)
    return _relative_rounding(values) * float(torch.maximum(values.abs().max(), at_zero))


def _relative_rounding(values: torch.Tensor) -> float:
    return 100 * values.shape[1] * torch.finfo(values.dtype).eps


def _output_hessians(model: TorchTwiceDifferentiable, outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return ∇²_f sᵢ (m, c, c), by autograd of the loss."""
    free = outputs.detach().requires_grad_(True)
    products = loss_products(model, free, batch, torch.ones(len(free), dtype=free.dtype, device=free.device))
    c = free[0].numel()
    rows = [products(unit.expand(1, len(free), c))[0] for unit in torch.eye(c, dtype=free.dtype, device=free.device)]
    return torch.stack(rows, dim=1)
