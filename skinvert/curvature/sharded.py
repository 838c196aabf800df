"""A curvature whose rows several processes share: the sum of what each makes of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from .._check import must_be
from .._checkpoint import NOWHERE, Checkpoint
from .._checksum import checksum
from .._distributed import Ranks
from .._memory import available_memory
from .._storage import HERE, Storage
from ..data import Shard
from ..operators import (
    KroneckerBasis,
    KroneckerBlock,
    KroneckerFactors,
    LinearOperator,
    add_to_diagonal,
    symmetrise,
)
from .objective import MeanLoss

__all__ = ["Sharded"]

# What one process alone may have, and what is joined where it is asked for.
KEPT = frozenset({"factor", "gradient_rows", "kronecker_factors", "minibatch"})


class SumOverRanks(LinearOperator):
    r"""A = Σᵣ cᵣAᵣ + diag(penalty) over the ranks r of a process group, each of which holds its own Aᵣ.

    Every product takes all ranks, with the same rows V; they are held against each other, by a checksum.

    Parameters
    ----------
    local : LinearOperator or None
        Aᵣ of this process; None where it is zero.
    like : LinearOperator
        Of the size, dtype and device.
    ranks : Ranks
        The processes.
    penalty : tensor of shape (p,) or None
        Counted once.
    scale : float
        cᵣ.
    """

    def __init__(
        self,
        local: LinearOperator | None,
        like: LinearOperator,
        ranks: Ranks,
        penalty: torch.Tensor | None,
        scale: float = 1.0,
    ) -> None:
        super().__init__(like.size, like.dtype, like.device)
        self.local, self.ranks, self.penalty, self.scale = local, ranks, penalty, scale
        self.is_psd, self.hint = like.is_psd, like.hint

    def apply(self, V: torch.Tensor) -> torch.Tensor:
        """Return the products with the rows of V (k, p), summed over the ranks: k p numbers from each."""
        local = self.local

        def own() -> list[torch.Tensor]:
            if local is None:
                return [torch.zeros_like(V)]
            product = local.apply(V)
            return [product if self.scale == 1.0 else self.scale * product]

        (product,) = self.ranks.summed("a product with H", own, {"rows": checksum(V)})
        return product if self.penalty is None else product.addcmul_(V, self.penalty)

    def available_memory(self) -> int:
        """Return the least of what the ranks can allocate."""
        return self.ranks.least(available_memory(self.device), "a look at the memory")


class Sharded(SumOverRanks):
    r"""The curvature of all ranks' rows: A = Σᵣ Aᵣ + diag(penalty), Aᵣ of rank r's rows over the denominators of all.

    Each face is what one process makes of all the rows: matrices, diagonals and Kronecker factors are summed, rows of a
    factor and gradients joined. What a method does with them is the same on every rank, and so are its solutions.

    Parameters
    ----------
    local : LinearOperator
        Aᵣ of this process, without the penalty.
    shard : Shard
        Which rows these are.
    penalty : tensor of shape (p,) or None
        The penalty's Hessian, a diagonal.
    objective : MeanLoss or None
        L over all ranks' denominators, with the batches of this process; None for plain rows.
    """

    local: LinearOperator

    def __init__(
        self, local: LinearOperator, shard: Shard, penalty: torch.Tensor | None, objective: MeanLoss | None = None
    ) -> None:
        super().__init__(local, local, shard.ranks, penalty)
        self.shard, self.objective, self.faces = shard, objective, local.faces & KEPT
        self.gradient_norm = None if objective is None else objective.gradient_norm
        self.unreached: tuple[str, ...] = () if objective is None else objective.unreached
        shape, least = local.factor_shape, 0.0 if local.is_psd else local.lower_bound
        # Of a borrowed row nothing counts.
        numbers = [0.0 if shape is None or shard.empty else float(shape[0]), least]
        facts = {"kind": type(local).__name__, "faces": sorted(self.faces)}
        (found,) = self.ranks.summed(
            "the curvature", lambda: [torch.tensor(numbers, dtype=torch.float64, device="cpu")], facts
        )
        self._factor_rows = None if shape is None else int(found[0])
        # All of them are zero, or one is NaN.
        self._least = float(found[1])

    @property
    def n_samples(self) -> int:
        """Number n of samples of all ranks."""
        return self.shard.n_samples

    @property
    def lower_bound(self) -> float:
        """The least penalty where each rank's part is positive semi-definite by construction; else NaN."""
        if self.penalty is None:
            return self._least
        return self._least + float(self.penalty.min()) * (1 - torch.finfo(self.dtype).eps)

    @property
    def has_own_diagonal(self) -> bool:
        """Whether each rank's part has."""
        return self.local.has_own_diagonal

    def to_dense(self, verbose: int = 0) -> torch.Tensor:
        """Return the matrix (p, p), summed over the ranks: p² numbers from each."""
        (matrix,) = self.ranks.summed("the matrix", lambda: [self.local.to_dense(verbose)])
        # The two halves may have been added up in another order.
        return symmetrise(add_to_diagonal(matrix, self.penalty))

    def diagonal(self) -> torch.Tensor:
        """Return the diagonal, summed over the ranks."""
        (diagonal,) = self.ranks.summed("the diagonal", lambda: [self.local.diagonal()])
        return diagonal if self.penalty is None else diagonal + self.penalty

    def in_float64(self) -> LinearOperator | None:
        """Return the curvature with its products in float64; None where a rank has none."""
        return self if self.dtype == torch.float64 else self._of("H in float64", self.local.in_float64)

    def in_autocast(self, dtype: torch.dtype) -> Sharded:
        """Return the curvature with each rank's passes under ``torch.autocast``, and sums as they were."""
        return Sharded(self.local.in_autocast(dtype), self.shard, self.penalty, self.objective)

    @property
    def eps(self) -> float:
        """The relative rounding of each rank's products."""
        return self.local.eps

    def psd_companion(self) -> LinearOperator | None:
        """Return a positive semi-definite operator in its place; None where a rank has none."""
        return self if self.is_psd else self._of("a companion of H", self.local.psd_companion)

    # -- optional faces ----------------------------------------------------------------------------------------------

    @property
    def factor_shape(self) -> tuple[int, int] | None:
        """(r, p) of ``factor``: the rows of all ranks."""
        return None if self._factor_rows is None else (self._factor_rows, self.size)

    def factor(self, verbose: int = 0) -> torch.Tensor:
        """Return the rows of all ranks' factors."""
        (rows,) = self.ranks.joined("the factor of H", lambda: [self._counted(self.local.factor(verbose))])
        return rows

    def gradient_rows(self, verbose: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows gᵢ (n, p) of all ranks, and their shares wᵢ/Σw (n,)."""
        rows, shares = self.ranks.joined(
            "the gradients of all rows", lambda: [self._counted(part) for part in self.local.gradient_rows(verbose)]
        )
        return rows, shares

    def minibatch(self, rows: torch.Tensor) -> LinearOperator:
        """Return an unbiased estimate from the samples of these numbers (m,), each on the rank that holds it."""
        own, n_own = self.shard.own(rows), self.shard.counts[self.ranks.rank]

        def part() -> list[torch.Tensor]:
            found.append(self.local.minibatch(own) if len(own) else None)
            return []

        found: list[LinearOperator | None] = []
        self.ranks.own("a minibatch", part, {"samples": checksum(rows)})
        # The part is (n_own / m_own) Σ over its samples.
        scale = self.n_samples * len(own) / (len(rows) * max(1, n_own))
        return SumOverRanks(found[0], self.local, self.ranks, self.penalty, scale)

    def kronecker_factors(
        self,
        approx: str = "expand",
        unsupported: str = "error",
        verbose: int = 0,
        checkpoint: Checkpoint = NOWHERE,
        storage: Storage = HERE,
    ) -> KroneckerFactors:
        """Return the factors of each layer, summed over the ranks; so is the diagonal that ``refit`` returns."""
        found: list[KroneckerFactors] = []

        def own() -> list[torch.Tensor]:
            if storage is not HERE:
                # Their sum over the ranks takes them as they are.
                raise ValueError(must_be("offload", "None for a fit with process_group", storage.place))
            found.append(self.local.kronecker_factors(approx, unsupported, verbose))
            return []

        self.ranks.own("the Kronecker factors", own, {"approx": approx, "unsupported": unsupported})
        (local,) = found
        blocks = self._same_forms(local)
        sides = [side for block in blocks for side in (block.left, block.right)]
        *sums, rest = self.ranks.summed(
            "the sum of Kronecker factors",
            lambda: [*sides, local.rest_diagonal],
            {"layers": [checksum(block.index) for block in blocks], "the other parameters": checksum(local.rest)},
        )
        penalty = self.penalty
        whole = [
            replace(block, left=left, right=right, penalty=None if penalty is None else penalty[block.index])
            for block, left, right in zip(blocks, map(_even, sums[::2]), map(_even, sums[1::2]), strict=True)
        ]
        rest = rest if penalty is None else rest + penalty[local.rest]
        return KroneckerFactors(tuple(whole), local.rest, rest, _SummedRefit(local.refit, self.ranks))

    def _same_forms(self, local: KroneckerFactors) -> Sequence[KroneckerBlock]:
        """Return this rank's blocks, their factors of the forms that all ranks have; raise where the layers differ."""
        forms = [(block.name, block.right.ndim) for block in local.blocks]
        told = self.ranks.gathered(forms, "the forms of Kronecker factors")
        if any([name for name, _ in one] != [name for name, _ in told[0]] for one in told):
            names = [{name for name, _ in one} for one in told]
            listed = ", ".join(sorted(set.union(*names) - set.intersection(*names)))
            hint = 'Another batch uses them in another way. Try method="cg", or leave them out with `params`.'
            raise ValueError(must_be("The layers with factors", "the same on every rank", f"{listed} on some", hint))
        # Of one-hot rows alone a factor is a diagonal.
        dims = [max(one[j][1] for one in told) for j in range(len(forms))]
        return [
            replace(block, right=torch.diag(block.right)) if block.right.ndim == 1 and most > 1 else block
            for block, most in zip(local.blocks, dims, strict=True)
        ]

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _counted(self, rows: torch.Tensor) -> torch.Tensor:
        return rows[:0] if self.shard.empty else rows

    def _of(self, step: str, make: Callable[[], LinearOperator | None]) -> Sharded | None:
        """Return the sum of what each rank makes of its own part; None where one makes nothing."""
        local = make()
        if not self.ranks.least(int(local is not None), step) or local is None:
            return None
        penalty = None if self.penalty is None else self.penalty.to(local.dtype)
        return Sharded(local, self.shard, penalty, self.objective)


class _SummedRefit:
    """The diagonal in other eigenbases, summed over the ranks."""

    def __init__(self, refit: Callable[[Sequence[KroneckerBasis]], list[torch.Tensor]], ranks: Ranks) -> None:
        self.refit, self.ranks = refit, ranks

    def __call__(self, bases: Sequence[KroneckerBasis]) -> list[torch.Tensor]:
        """Return diag(QᵀHQ) (d, i) of each layer."""
        # Other eigenvectors of an eigenvalue that repeats would be another basis.
        known = [[checksum(side) for side in vars(basis).values() if isinstance(side, torch.Tensor)] for basis in bases]
        return self.ranks.summed("the eigenvalues of layers", lambda: self.refit(bases), {"bases": known})


def _even(side: Any) -> Any:
    """Return a factor symmetric to the last bit: its halves may have been added up in another order."""
    return side if side.ndim == 1 else (side + side.mT) / 2
