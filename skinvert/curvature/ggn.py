"""The generalised Gauss–Newton matrix: Σ wᵢ Jᵢᵀ (∇²_f ℓᵢ) Jᵢ / Σ wᵢ."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar

import torch

from .._check import must_be
from .._checkpoint import NOWHERE, Checkpoint
from .._memory import check_memory, rows_within
from .._storage import HERE, Storage
from .._types import Batch
from ..models import FactoredHessian, OutputHessian, map_tensors
from ..operators import KroneckerFactors
from .base import Curvature
from .columns import Columns
from .layered import Layered
from .layers import Signals
from .loss_curvature import check_convex, loss_products, output_factor
from .objective import Objective
from .per_sample import jacobian_rows, split_batch
from .products import Products, Share, both_passes, flat_products, forward_products

__all__ = ["GGN"]

# The backward passes a chunk of rows that Kronecker factors may take.
MOST_PASSES = 5_000


class GGN(Layered):
    r"""G = Σᵢ wᵢ Jᵢᵀ (∇²_f ℓᵢ) Jᵢ / Σᵢ wᵢ + penalty, with Jᵢ the Jacobian of the outputs f.

    Positive semi-definite for a loss that is convex in the outputs, and equal to the Hessian where the outputs are
    linear in the parameters.

    References
    ----------
    Schraudolph (2002), "Fast curvature matrix-vector products for second-order gradient descent", sec. 3.
    """

    name: ClassVar[str] = "ggn"
    # A subclass of another output Hessian than the loss's own has no derivatives of the loss to verify.
    of_the_loss: ClassVar[bool] = True

    def __init__(self, objective: Objective) -> None:
        super().__init__(objective)
        batch, _ = next(iter(objective.batches))
        few, _ = next(split_batch(batch, torch.zeros(8, device="cpu"), 8))
        outputs = objective.model.forward(self.data_of(few))
        if not isinstance(outputs, torch.Tensor):
            hint = 'Return one tensor from `outputs`, or use curvature="hessian".'
            raise TypeError(must_be("The model's outputs for the GGN", "a tensor", type(outputs).__name__, hint))
        self._by_rows = not self._has_products(outputs)
        # c outputs, and as many rows of F a sample where the output Hessian has no closed form.
        self._outputs = self.rank = outputs[0].numel()
        closed = self.closed_hessian(outputs.detach(), few)
        if closed is None:
            self._check_loss(few, batch)
        else:
            self.rank = closed.rank

    # -- what the Fisher has of its own ------------------------------------------------------------------------------

    def closed_hessian(self, outputs: torch.Tensor, batch: Batch) -> OutputHessian | None:
        """Return ∇²_f sᵢ where the loss has it in closed form, else None."""
        return self.objective.model.output_hessian(outputs, batch)

    # -- what a batch gives ------------------------------------------------------------------------------------------

    def outputs(self, batch: Batch) -> torch.Tensor:
        """Return the model's outputs f on a batch, with gradients on."""
        outputs: torch.Tensor = self.objective.model.forward(self.data_of(batch))
        return outputs

    def output_hessian(self, outputs: torch.Tensor, batch: Batch) -> OutputHessian:
        """Return what the curvature has for ∇²_f sᵢ: its closed form, else that of the loss."""
        closed = self.closed_hessian(outputs, batch)
        return self.exact_hessian(outputs, self.data_of(batch)) if closed is None else closed

    def exact_hessian(self, outputs: torch.Tensor, batch: Batch) -> OutputHessian:
        """Return ∇²_f sᵢ of the loss: its closed form, else by an eigendecomposition (m, c, c)."""
        closed = self.objective.model.output_hessian(outputs, batch)
        if closed is not None:
            return closed
        size = 6 * len(outputs) * self._outputs**2 * self.dtype.itemsize
        way_out = 'Try a torch loss module, a method that needs products alone ("cg"), or curvature="empirical_fisher".'
        check_memory(size, f"The output Hessian of {self._outputs:,} outputs", way_out, self.device)
        return FactoredHessian(output_factor(self.objective.model, outputs, batch))

    def graph(self, batch: Batch, weights: torch.Tensor) -> Products:
        """Return the products of Σ wᵢ Jᵢᵀ ∇²_f ℓᵢ Jᵢ over one batch: forward, output Hessian, backward."""
        if self._by_rows:
            return super().graph(batch, weights)
        outputs = self.outputs(batch)
        model = self.objective.model
        along = forward_products(outputs, model.theta, model.eps)
        middle = self._output_products(outputs, batch, self.objective.scale * weights)
        back = flat_products(outputs, model.theta, model.eps)
        row_bytes = 3 * outputs.numel() * outputs.element_size()

        def products(V: torch.Tensor) -> torch.Tensor:
            parts = torch.split(V, rows_within(row_bytes))
            return torch.cat([back(middle(along(rows)).flatten(1)) for rows in parts])

        return Share(products, middle.nbytes)

    def share(self, batch: Batch, weights: torch.Tensor, many: bool) -> Products:
        """Return the products by the operations of both passes, where they have rules; else ``graph``."""
        if not many or not self._has_rules or self._by_rows:
            return self.graph(batch, weights)
        name, proven = self._known(batch)
        passes = both_passes(lambda: self.outputs(batch), self.objective.model.theta, proven)
        self._has_rules = passes is not None
        if passes is None:
            return self.graph(batch, weights)
        self._proven.add(name)
        middle = self._output_products(passes.outputs, batch, self.objective.scale * weights)
        return Share(lambda V: passes.through(V, middle), passes.nbytes + middle.nbytes, alone=middle.alone)

    def factor_of(self, batch: Batch, weights: torch.Tensor) -> torch.Tensor:
        """Return √wᵢ SᵢᵀJᵢ (m, r, p), with ∇²_f ℓᵢ = SᵢSᵢᵀ."""
        return torch.cat(list(self.factor_parts(batch, weights)), dim=1)

    def factor_parts(self, batch: Batch, weights: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield ``factor_of`` in chunks of the columns of S."""
        with torch.no_grad():
            outputs = self.outputs(batch).detach()
        columns = self._columns(outputs, batch, weights)
        step = rows_within(len(weights) * self._numbers * self.dtype.itemsize, len(columns))
        for start in range(0, len(columns), step):
            part = columns.between(start, min(start + step, len(columns)))
            yield jacobian_rows(self.objective.model, self.data_of(batch), part)

    def signals(self, batch: Batch, weights: torch.Tensor) -> Signals:
        """Return the columns of √wᵢ Sᵢ at the outputs."""
        outputs = self.outputs(batch)
        columns = self._columns(outputs.detach(), batch, weights)
        return Signals(outputs, columns, self.objective.model.mass(outputs, self.data_of(batch)))

    # -- what all the data give --------------------------------------------------------------------------------------

    def apply(self, V: torch.Tensor) -> torch.Tensor:
        """Return the products, by a factor only where the model has no second derivatives."""
        return super().apply(V) if self._by_rows else Curvature.apply(self, V)

    def to_dense(self, verbose: int = 0) -> torch.Tensor:
        """Return the matrix (p, p): from the layers or the factor, or by products where they are fewer."""
        return super().to_dense(verbose) if self.rank <= self.size else Curvature.to_dense(self, verbose)

    def diagonal(self) -> torch.Tensor:
        """Return the diagonal, from the squares of the factor, or by products where they are fewer."""
        return super().diagonal() if self.rank <= self.size else Curvature.diagonal(self)

    def kronecker_factors(
        self,
        approx: str = "expand",
        unsupported: str = "error",
        verbose: int = 0,
        checkpoint: Checkpoint = NOWHERE,
        storage: Storage = HERE,
    ) -> KroneckerFactors:
        """Return the factors of each layer."""
        if self.rank > MOST_PASSES:
            must = f"at most {MOST_PASSES:,} for Kronecker factors, which take a backward pass for each"
            hint = "Try curvature=SampledGGN(), or another method."
            raise ValueError(must_be("The columns of the curvature's factor", must, f"{self.rank:,} outputs", hint))
        return super().kronecker_factors(approx, unsupported, verbose, checkpoint, storage)

    # -- helpers -----------------------------------------------------------------------------------------------------

    @property
    def _numbers(self) -> int:
        return 3 * (self.size + self._outputs)

    def _columns(self, outputs: torch.Tensor, batch: Batch, weights: torch.Tensor) -> Columns:
        """Return the columns √wᵢ Sᵢ with ∇²_f ℓᵢ = SᵢSᵢᵀ."""
        return Columns(self.output_hessian(outputs, batch), self.objective.scale * weights, outputs.shape)

    def _output_products(self, outputs: torch.Tensor, batch: Batch, weights: torch.Tensor) -> Share:
        """Return U (k, m, c) -> w ∇²_f s U."""
        closed = self.closed_hessian(outputs.detach(), batch)
        if closed is not None:
            return Share(lambda U: closed.products(U) * weights[:, None], closed.nbytes, alone=True)
        free = outputs.detach().requires_grad_(True)
        return Share(loss_products(self.objective.model, free, self.data_of(batch), weights))

    def _check_loss(self, few: Batch, batch: Batch) -> None:
        """Hold a loss without closed form against differences on a few rows, and look for where it is not convex."""
        if self.of_the_loss:
            self.objective.model.verify_loss_derivative(self.outputs(few).detach(), few)
        outputs = self.outputs(batch)
        if self.rank <= 256:
            some = slice(self._chunk())
            self.output_hessian(outputs.detach()[some], map_tensors(lambda tensor: tensor[some], batch))
        else:
            check_convex(self.objective.model, outputs, self.data_of(batch))

    def _has_products(self, outputs: torch.Tensor) -> bool:
        """Return whether uᵀ(Jv) = (Jᵀu)ᵀv on a few rows: J v takes a second derivative, which a layer may lack."""
        generator = torch.Generator("cpu").manual_seed(0)
        size = outputs.numel() + self.size
        drawn = torch.randn(size, generator=generator, dtype=torch.float64, device="cpu").to(outputs)
        u, v = drawn[: outputs.numel()], drawn[outputs.numel() :]
        try:
            Jv = forward_products(outputs, self.objective.model.theta)(v[None]).flatten()
            Jtu = flat_products(outputs, self.objective.model.theta)(u[None])[0]
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError):
            return False
        gap, scale = (u * Jv).sum() - (v * Jtu).sum(), (u * Jv).norm() + (v * Jtu).norm()
        # Not finite on both sides is the data's fault, and is said elsewhere.
        return not bool(gap.abs() > math.sqrt(self.objective.eps) * scale)
