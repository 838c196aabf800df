"""The generalised Gauss–Newton matrix: Σ wᵢ Jᵢᵀ (∇²_f ℓᵢ) Jᵢ / Σ wᵢ."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .._memory import rows_within, working_memory
from .._progress import progress
from .._validation import must_be
from ..block_operators import KroneckerFactors
from ..models import map_tensors
from ..operators import add_to_diagonal, symmetrise
from .base import Curvature, Objective, flat_products
from .kronecker import Signals, kronecker_factors
from .layers import linear_layers, outer_sum
from .rows import jacobian_rows

__all__ = ["GGN"]


class GGN(Curvature):
    r"""G = Σᵢ wᵢ Jᵢᵀ (∇²_f ℓᵢ) Jᵢ / Σᵢ wᵢ + penalty, with Jᵢ the Jacobian of the outputs f.

    Positive semi-definite for a loss that is convex in the outputs, and equal to the Hessian where the outputs are
    linear in the parameters.

    References
    ----------
    Schraudolph (2002), "Fast curvature matrix-vector products for second-order gradient descent", sec. 3.
    """

    is_psd = True

    def __init__(self, objective: Objective) -> None:
        super().__init__(objective)
        self.hint = ""
        batch, _ = next(iter(objective.batches))
        outputs = self.outputs(batch)
        if not isinstance(outputs, torch.Tensor):
            hint = 'Return one tensor from `outputs`, or use curvature="hessian".'
            raise TypeError(must_be("The model's outputs for the GGN", "a tensor", type(outputs).__name__, hint))
        few, _ = next(split_batch(batch, torch.zeros(8, device="cpu"), 8))
        self._by_rows = not self._has_products(few)
        self._check_loss(few)
        self._c = outputs[0].numel()
        if self._c <= 256:
            self._c = self.output_factor(outputs.detach(), batch).shape[2]

    def graph(self, batch: Any, weights: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the products of Σ wᵢ Jᵢᵀ ∇²_f sᵢ Jᵢ over one batch: forward, output Hessian, backward."""
        if self._by_rows:
            return self._row_products(batch, weights)
        model = self.objective.model
        outputs = self.outputs(batch)
        along = _forward_products(outputs, model.theta)
        middle = self._output_products(outputs, batch, weights)
        back = flat_products(outputs, model.theta)
        return lambda V: back(middle(along(V)))

    def data_of(self, batch: Any) -> Any:
        """Return the model's part of a batch: all of it."""
        return batch

    def outputs(self, batch: Any) -> Any:
        """Return the model's outputs f on a batch, with gradients on."""
        return self.objective.model.forward(self.data_of(batch))

    def output_factor(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        """Return Sᵢ (m, c, r) with ∇²_f sᵢ = Sᵢ Sᵢᵀ."""
        return output_factor(self.objective, outputs, batch)

    def signals(self, batch: Any, weights: torch.Tensor) -> Signals:
        """Return the columns of √(wᵢ / Σ w m) Sᵢ at the outputs."""
        outputs = self.outputs(batch)
        S = self._weighted_factor(outputs.detach(), batch, weights)
        mass = self.objective.model.mass(outputs, self.data_of(batch))
        return Signals(outputs, S.permute(2, 0, 1).reshape(-1, *outputs.shape), mass)

    def kronecker_factors(
        self, approx: str = "expand", unsupported: str = "error", verbose: int = 0
    ) -> KroneckerFactors:
        """Return the factors of each layer."""
        return kronecker_factors(self, approx, unsupported, verbose)

    @property
    def factor_shape(self) -> tuple[int, int]:
        """(n c, p), known before the factor is built."""
        return (self.objective.batches.n_samples * self._c, self.size)

    def factor(self, verbose: int = 0) -> torch.Tensor:
        """Return F (n c, p) with G = FᵀF + diag(penalty)."""
        return torch.cat(list(self.factor_chunks(verbose)))

    def factor_chunks(self, verbose: int = 0) -> Iterator[torch.Tensor]:
        """Yield the factor in chunks of rows that fit the working memory."""
        chunk = rows_within(3 * self._c * self.size * self.dtype.itemsize)
        for batch, weights in progress(self.objective.batches, "Jacobians", verbose):
            for rows, part in split_batch(batch, weights, chunk):
                yield self._factor_of(rows, part).flatten(0, 1)

    def sample_factors(self) -> Iterator[torch.Tensor]:
        """Yield Fᵢ (m, r, p) with FᵢᵀFᵢ = hᵢ, each row's own GGN term, without its weight, in chunks of rows."""
        chunk = rows_within(3 * self._c * self.size * self.dtype.itemsize)
        for batch, weights in self.objective.batches:
            for rows, part in split_batch(batch, torch.ones_like(weights), chunk):
                yield math.sqrt(self.objective.weight_sum) * self._factor_of(rows, part)

    def to_dense(self, verbose: int = 0) -> torch.Tensor:
        """Return the matrix (p, p): Σᵢ Dᵢ ⊗ aᵢaᵢᵀ for Linear layers, else one GEMM per chunk of the factor."""
        matrix = self._dense_from_layers(verbose)
        if matrix is None:
            matrix = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
            for rows in self.factor_chunks(verbose):
                matrix.addmm_(rows.mT, rows)
        return symmetrise(add_to_diagonal(matrix, self.penalty))

    def diagonal(self) -> torch.Tensor:
        """Return the diagonal, from the squares of the factor."""
        diagonal = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        for rows in self.factor_chunks():
            diagonal += rows.square().sum(0)
        return diagonal if self.penalty is None else diagonal + self.penalty

    def _factor_of(self, batch: Any, weights: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            outputs = self.outputs(batch).detach()
        return jacobian_rows(self.objective.model, self.data_of(batch), self._weighted_factor(outputs, batch, weights))

    def _weighted_factor(self, outputs: torch.Tensor, batch: Any, weights: torch.Tensor) -> torch.Tensor:
        return self.output_factor(outputs, batch) * (weights / self.objective.mass_sum).sqrt()[:, None, None]

    def _check_loss(self, batch: Any) -> None:
        """Hold the loss's second derivatives in the outputs against differences, where they have no closed form."""
        outputs = self.outputs(batch).detach()
        if type(self) is GGN and self.objective.model.output_factor(outputs, batch) is None:
            self.objective.model.verify_loss_derivative(outputs, batch)

    def _has_products(self, batch: Any) -> bool:
        """Return whether uᵀ(Jv) = (Jᵀu)ᵀv on a few rows: J v takes a second derivative, which a layer may lack."""
        outputs = self.outputs(batch)
        generator = torch.Generator("cpu").manual_seed(0)
        size = outputs.numel() + self.size
        drawn = torch.randn(size, generator=generator, dtype=torch.float64, device="cpu").to(outputs)
        u, v = drawn[: outputs.numel()], drawn[outputs.numel() :]
        try:
            Jv = _forward_products(outputs, self.objective.model.theta)(v[None]).flatten()
            Jtu = flat_products(outputs, self.objective.model.theta)(u[None])[0]
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError):
            return False
        gap, scale = (u * Jv).sum() - (v * Jtu).sum(), (u * Jv).norm() + (v * Jtu).norm()
        # Not finite on both sides is the data's fault, and is said elsewhere.
        return not bool(gap.abs() > math.sqrt(torch.finfo(outputs.dtype).eps) * scale)

    def _row_products(self, batch: Any, weights: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the products by the factor, from first derivatives alone; it is kept where it fits the memory."""
        step = rows_within(3 * self._c * self.size * self.dtype.itemsize)
        scale = math.sqrt(self.objective.mass_sum)

        def factors() -> Iterator[torch.Tensor]:
            for rows, part in split_batch(batch, weights, step):
                yield scale * self._factor_of(rows, part).flatten(0, 1)

        entries = self.objective.batches.n_samples * self._c * self.size
        kept = list(factors()) if entries * self.dtype.itemsize <= working_memory() else None
        return lambda V: sum(((V @ F.mT) @ F for F in kept or factors()), start=torch.zeros_like(V))

    def _output_products(
        self, outputs: torch.Tensor, batch: Any, weights: torch.Tensor
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        return _output_products(self.objective.model, outputs, batch, weights)

    def _dense_from_layers(self, verbose: int) -> torch.Tensor | None:
        """Assemble from layer inputs and output derivatives; None where a layer is not a plain Linear.

        The result is checked against a product, which shares none of its code: weights that the model also uses
        outside the layer would go unseen otherwise.
        """
        layers = linear_layers(self.objective.model, self.data_of(next(iter(self.objective.batches))[0]))
        if layers is None:
            return None
        matrix = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for batch, weights in progress(self.objective.batches, "assembly", verbose):
            outputs, captured = layers.capture(self.data_of(batch))
            S = self._weighted_factor(outputs.detach(), batch, weights)
            outer_sum(matrix, layers, captured, layers.derivatives(outputs, captured, S))
        generator = torch.Generator(self.device).manual_seed(0)
        v = torch.randn(1, self.size, dtype=self.dtype, device=self.device, generator=generator)
        expected = self.apply(v) if self.penalty is None else self.apply(v) - v * self.penalty
        error = (v @ matrix - expected).norm()
        tolerance = 1e3 * torch.finfo(self.dtype).eps * (matrix.norm() * v.norm())
        return matrix if error <= tolerance else None


def output_factor(objective: Objective, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
    """Return Sᵢ (m, c, c) with ∇²_f sᵢ = SᵢSᵢᵀ; raise where the loss is not convex in the outputs."""
    closed = objective.model.output_factor(outputs, batch)
    if closed is not None:
        return closed
    values, vectors = torch.linalg.eigh(output_hessians(objective, outputs, batch))
    if bool((values < 0).any()) and float(values.min()) < -_rounding(objective, outputs, batch, values):
        hint = 'Try curvature="hessian" or "empirical_fisher".'
        got = f"an eigenvalue {values.min():.3g}"
        raise ValueError(must_be("The loss for the GGN", "convex in the outputs", got, hint))
    return vectors * values.clamp(min=0).sqrt()[:, None, :]


def _rounding(objective: Objective, outputs: torch.Tensor, batch: Any, values: torch.Tensor) -> float:
    """Return how negative rounding alone can make an eigenvalue.

    All those of confident rows are rounding: the loss's own scale is the larger of what it has here and at zero.
    """
    at_zero = output_hessians(objective, 0 * outputs, batch).abs().max().nan_to_num(0.0, 0.0, 0.0)
    return 100 * values.shape[1] * torch.finfo(values.dtype).eps * float(torch.maximum(values.abs().max(), at_zero))


def output_hessians(objective: Objective, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
    """Return ∇²_f sᵢ (m, c, c), by autograd of the loss."""
    free = outputs.detach().requires_grad_(True)
    products = _loss_products(objective.model, free, batch, torch.ones(len(free), dtype=free.dtype, device=free.device))
    c = free[0].numel()
    rows = [products(unit.expand(1, len(free), c))[0] for unit in torch.eye(c, dtype=free.dtype, device=free.device)]
    return torch.stack(rows, dim=1)


def split_batch(batch: Any, weights: torch.Tensor, size: int) -> Iterator[tuple[Any, torch.Tensor]]:
    """Yield a batch in chunks of at most ``size`` rows."""
    for start in range(0, len(weights), size):
        rows = slice(start, start + size)
        yield map_tensors(lambda tensor, rows=rows: tensor[rows], batch), weights[rows]


def _forward_products(outputs: torch.Tensor, theta: list[torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return V (k, p) -> J V (k, m, c), by differentiating Jᵀu along V: no forward mode needed."""
    if not outputs.requires_grad:
        # This batch reaches none of the parameters.
        return lambda V: V.new_zeros(len(V), len(outputs), outputs[:1].numel())
    dummy = torch.zeros_like(outputs, requires_grad=True)
    pulled = torch.autograd.grad(outputs, theta, dummy, create_graph=True, materialize_grads=True)
    along = flat_products(torch.cat([part.reshape(-1) for part in pulled]), [dummy])
    return lambda V: along(V).reshape(len(V), len(outputs), -1)


def _output_products(
    model: Any, outputs: torch.Tensor, batch: Any, weights: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return U (k, m, c) -> w ∇²_f s U, flat (k, m c)."""
    closed = model.output_factor(outputs.detach(), batch)
    if closed is not None:
        S = closed * weights.sqrt()[:, None, None]
        return lambda U: torch.einsum("mcr,kmr->kmc", S, torch.einsum("mcr,kmc->kmr", S, U)).flatten(1)
    products = _loss_products(model, outputs.detach().requires_grad_(True), batch, weights)
    return lambda U: products(U).flatten(1)


def _loss_products(
    model: Any, outputs: torch.Tensor, batch: Any, weights: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    with torch.enable_grad():
        losses = (model.per_sample_loss(outputs, batch) * weights).sum()
        gradient = torch.autograd.grad(losses, outputs, create_graph=True)[0]
    products = flat_products(gradient, [outputs])
    return lambda U: products(U.flatten(1)).reshape(U.shape)
