"""The generalised Gauss–Newton matrix: Σ wᵢ Jᵢᵀ (∇²_f ℓᵢ) Jᵢ / Σ wᵢ."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .._memory import check_memory, rows_within, working_memory
from .._progress import progress
from .._validation import must_be
from ..models import FactoredHessian, OutputHessian, map_tensors
from ..operators import KroneckerFactors, add_to_diagonal, symmetrise
from .base import Curvature, Objective, flat_products
from .columns import Columns
from .kronecker import Signals, kronecker_factors
from .layers import linear_layers, outer_sum
from .rows import jacobian_rows

__all__ = ["GGN"]

# The backward passes a chunk of rows that Kronecker factors may take.
MOST_PASSES = 5_000


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
        # r of the factor's columns, and c.
        self._c = self._outputs = outputs[0].numel()
        closed = self.closed_hessian(outputs.detach(), batch)
        if closed is not None:
            self._c = closed.rank
        elif self._c <= 256:
            # A loss that is not convex is told of at once.
            some = slice(self._chunk())
            self.output_hessian(outputs.detach()[some], map_tensors(lambda tensor: tensor[some], batch))
        else:
            check_convex(objective.model, outputs, self.data_of(batch))

    def graph(self, batch: Any, weights: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the products of Σ wᵢ Jᵢᵀ ∇²_f sᵢ Jᵢ over one batch: forward, output Hessian, backward."""
        if self._by_rows:
            return self._row_products(batch, weights)
        outputs = self.outputs(batch)
        along = _forward_products(outputs, self.objective.model.theta)
        middle, held = self._output_products(outputs, batch, weights)
        back = flat_products(outputs, self.objective.model.theta)
        return _Share(along, middle, back, 3 * outputs.numel() * outputs.element_size(), held)

    def data_of(self, batch: Any) -> Any:
        """Return the model's part of a batch: all of it."""
        return batch

    def outputs(self, batch: Any) -> Any:
        """Return the model's outputs f on a batch, with gradients on."""
        return self.objective.model.forward(self.data_of(batch))

    def closed_hessian(self, outputs: torch.Tensor, batch: Any) -> OutputHessian | None:
        """Return ∇²_f sᵢ where the loss has it in closed form, else None."""
        return self.objective.model.output_hessian(outputs, batch)

    def output_hessian(self, outputs: torch.Tensor, batch: Any) -> OutputHessian:
        """Return ∇²_f sᵢ: the closed form, else by an eigendecomposition (m, c, c)."""
        closed = self.closed_hessian(outputs, batch)
        if closed is not None:
            return closed
        size = 6 * len(outputs) * self._outputs**2 * self.dtype.itemsize
        way_out = 'Try a torch loss module, a method that needs products alone ("cg"), or curvature="empirical_fisher".'
        check_memory(size, f"The output Hessian of {self._outputs:,} outputs", way_out, self.device)
        return FactoredHessian(output_factor(self.objective, outputs, self.data_of(batch)))

    def signals(self, batch: Any, weights: torch.Tensor) -> Signals:
        """Return the columns of √(wᵢ / Σ w m) Sᵢ at the outputs."""
        outputs = self.outputs(batch)
        if self._c > MOST_PASSES:
            must = f"at most {MOST_PASSES:,} for Kronecker factors, which take a backward pass for each"
            hint = "Try curvature=SampledFisher(n_samples=10), or another method."
            raise ValueError(must_be("The columns of the curvature's factor", must, f"{self._c:,} outputs", hint))
        columns = Columns(self.output_hessian(outputs.detach(), batch), self._shares_of(weights), outputs.shape)
        return Signals(outputs, columns, self.objective.model.mass(outputs, self.data_of(batch)))

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
        """Yield the factor in chunks of rows that fit the working memory, and of columns where one row does not."""
        for batch, weights in progress(self.objective.batches, "Jacobians", verbose):
            for rows, part in split_batch(batch, weights, self._chunk()):
                for factor in self._factors_of(rows, part):
                    yield factor.flatten(0, 1)

    def sample_factors(self) -> Iterator[torch.Tensor]:
        """Yield Fᵢ (m, r, p) with FᵢᵀFᵢ = hᵢ, each row's own GGN term, without its weight, in chunks of rows."""
        way_out = "Try fewer parameters with `params`."
        check_memory(self._c * self.size * self.dtype.itemsize, "One row's factor", way_out, self.device)
        for batch, weights in self.objective.batches:
            for rows, part in split_batch(batch, torch.ones_like(weights), self._chunk()):
                factor = torch.cat(list(self._factors_of(rows, part)), dim=1)
                yield math.sqrt(self.objective.weight_sum) * factor

    def to_dense(self, verbose: int = 0) -> torch.Tensor:
        """Return the matrix (p, p).

        Σᵢ Dᵢ ⊗ aᵢaᵢᵀ for Linear layers, else one GEMM per chunk of the factor, or products where they are fewer.
        """
        if self._c > self.size:
            return super().to_dense(verbose)
        matrix = self._dense_from_layers(verbose)
        if matrix is None:
            matrix = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
            for rows in self.factor_chunks(verbose):
                matrix.addmm_(rows.mT, rows)
        return symmetrise(add_to_diagonal(matrix, self.penalty))

    def diagonal(self) -> torch.Tensor:
        """Return the diagonal, from the squares of the factor, or by products where they are fewer."""
        if self._c > self.size:
            return super().diagonal()
        diagonal = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        for rows in self.factor_chunks():
            diagonal += rows.square().sum(0)
        return diagonal if self.penalty is None else diagonal + self.penalty

    def _chunk(self, extra: int = 0) -> int:
        """Return of how many rows the columns and what they are pulled back to fit the working memory."""
        return rows_within(self._c * (3 * self.size + 3 * self._outputs + extra) * self.dtype.itemsize)

    def _factors_of(self, batch: Any, weights: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield √(wᵢ / Σ w m) SᵢᵀJᵢ of a chunk of rows, in chunks of columns."""
        with torch.no_grad():
            outputs = self.outputs(batch).detach()
        columns = Columns(self.output_hessian(outputs, batch), self._shares_of(weights), outputs.shape)
        step = rows_within(len(weights) * 3 * (self.size + self._outputs) * self.dtype.itemsize, len(columns))
        for start in range(0, len(columns), step):
            part = columns.between(start, min(start + step, len(columns)))
            yield jacobian_rows(self.objective.model, self.data_of(batch), part)

    def _shares_of(self, weights: torch.Tensor) -> torch.Tensor:
        return weights / self.objective.mass_sum

    def _check_loss(self, batch: Any) -> None:
        """Hold the loss's second derivatives in the outputs against differences, where they have no closed form."""
        outputs = self.outputs(batch).detach()
        if type(self) is GGN and self.closed_hessian(outputs, batch) is None:
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
                yield from (scale * F.flatten(0, 1) for F in self._factors_of(rows, part))

        entries = self.objective.batches.n_samples * self._c * self.size
        kept = list(factors()) if entries * self.dtype.itemsize <= working_memory() else None
        return lambda V: sum(((V @ F.mT) @ F for F in kept or factors()), start=torch.zeros_like(V))

    def _output_products(
        self, outputs: torch.Tensor, batch: Any, weights: torch.Tensor
    ) -> tuple[Callable[[torch.Tensor], torch.Tensor], int]:
        """Return U (k, m, c) -> w ∇²_f s U, and the bytes that it holds."""
        closed = self.closed_hessian(outputs.detach(), batch)
        if closed is not None:
            return lambda U: closed.products(U) * weights[:, None], closed.nbytes
        free = outputs.detach().requires_grad_(True)
        return _loss_products(self.objective.model, free, self.data_of(batch), weights), 0

    def _dense_from_layers(self, verbose: int) -> torch.Tensor | None:
        """Assemble from layer inputs and output derivatives; None where a layer is not a plain Linear.

        The result is checked against a product, which shares none of its code: weights that the model also uses
        outside the layer would go unseen otherwise.
        """
        layers = linear_layers(self.objective.model, self.data_of(next(iter(self.objective.batches))[0]))
        if layers is None:
            return None
        matrix = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        chunk = self._chunk(2 * sum(len(module.weight) for module in layers.modules))
        for batch, weights in progress(self.objective.batches, "assembly", verbose):
            for rows, part in split_batch(batch, weights, chunk):
                outputs, captured = layers.capture(self.data_of(rows))
                hessian = self.output_hessian(outputs.detach(), rows)
                columns = Columns(hessian, self._shares_of(part), outputs.shape)
                outer_sum(matrix, layers, captured, layers.derivatives(outputs, captured, columns))
        generator = torch.Generator(self.device).manual_seed(0)
        v = torch.randn(1, self.size, dtype=self.dtype, device=self.device, generator=generator)
        expected = self.apply(v) if self.penalty is None else self.apply(v) - v * self.penalty
        error = (v @ matrix - expected).norm()
        tolerance = 1e3 * torch.finfo(self.dtype).eps * (matrix.norm() * v.norm())
        return matrix if error <= tolerance else None


class _Share:
    """A batch's products: forward, output Hessian, backward, of as many rows at a time as the working memory allows."""

    def __init__(self, along: Any, middle: Any, back: Any, row_bytes: int, nbytes: int) -> None:
        self.along, self.middle, self.back = along, middle, back
        self.row_bytes, self.nbytes = row_bytes, nbytes

    def __call__(self, V: torch.Tensor) -> torch.Tensor:
        parts = V.split(rows_within(self.row_bytes))
        return torch.cat([self.back(self.middle(self.along(rows)).flatten(1)) for rows in parts])


def output_factor(objective: Objective, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
    """Return Sᵢ (m, c, c) with ∇²_f sᵢ = SᵢSᵢᵀ by autograd; raise where the loss is not convex in the outputs."""
    values, vectors = torch.linalg.eigh(output_hessians(objective, outputs, batch))
    if bool((values < 0).any()) and float(values.min()) < -_rounding(objective, outputs, batch, values):
        raise _not_convex(float(values.min()))
    return vectors * values.clamp(min=0).sqrt()[:, None, :]


def check_convex(model: Any, outputs: torch.Tensor, batch: Any) -> None:
    """Raise where a few power iterations on ∇²_f sᵢ, all rows at once, meet a negative eigenvalue: c² would not fit."""
    ones = torch.ones(len(outputs), dtype=outputs.dtype, device=outputs.device)
    free, zero = outputs.detach().requires_grad_(True), torch.zeros_like(outputs, requires_grad=True)
    products = _loss_products(model, free, batch, ones)
    largest = float(_extreme(products, free, 0.0).abs().max())
    lowest = float(_extreme(products, free, largest).min())
    # All those of confident rows are rounding.
    at_zero = float(_extreme(_loss_products(model, zero, batch, ones), zero, 0.0).abs().max().nan_to_num(0.0, 0.0, 0.0))
    # A few iterations find large negative parts, not those at the size of rounding.
    if lowest < -1e-3 * max(largest, at_zero):
        raise _not_convex(lowest)


def _extreme(products: Callable[[torch.Tensor], torch.Tensor], f: torch.Tensor, shift: float) -> torch.Tensor:
    """Return the Rayleigh quotient (m,) of each row's ∇²_f s after ten steps of H − shift."""
    generator = torch.Generator(f.device).manual_seed(0)
    v = torch.randn(1, len(f), f[0].numel(), generator=generator, dtype=f.dtype, device=f.device)
    tiny = torch.finfo(f.dtype).tiny
    for _ in range(10):
        v = v / v.norm(dim=2, keepdim=True).clamp(min=tiny)
        Hv = products(v)
        value = (v * Hv).sum(2)[0]
        v = Hv - shift * v
    return value


def _not_convex(least: float) -> ValueError:
    hint = 'Try curvature="hessian" or "empirical_fisher".'
    return ValueError(must_be("The loss for the GGN", "convex in the outputs", f"an eigenvalue {least:.3g}", hint))


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


def _loss_products(
    model: Any, outputs: torch.Tensor, batch: Any, weights: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    with torch.enable_grad():
        losses = (model.per_sample_loss(outputs, batch) * weights).sum()
        gradient = torch.autograd.grad(losses, outputs, create_graph=True)[0]
    products = flat_products(gradient, [outputs])
    return lambda U: products(U.flatten(1)).reshape(U.shape)
