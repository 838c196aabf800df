"""Any method inside each block of a block-diagonal curvature."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from sklearn.base import clone

from .._checkpoint import NOWHERE, Checkpoint
from .._progress import say
from ..operators import BlockDiagonal, LinearOperator
from ..reasons import Reason
from ..results import InverseHvpResult
from .base import InverseOperator, Method
from .mixed_precision import inverted

__all__ = ["BlockInverse", "invert_blocks"]

# Why a block may fail to solve its own system; what scores ask for comes last, and wins.
FAILURES = (
    Reason.MAX_ITERATIONS,
    Reason.STAGNATED,
    Reason.SINGULAR,
    Reason.OUT_OF_RANGE,
    Reason.NEGATIVE_CURVATURE,
)


def invert_blocks(
    method: Method,
    A: BlockDiagonal,
    hessian_perturbation: float,
    verbose: int = 0,
    checkpoint: Checkpoint = NOWHERE,
) -> BlockInverse:
    """Return the inverse of each block by ``method`` (or what it chooses for the block)."""
    inverses = []
    for number, operator in enumerate(A.operators, start=1):
        own, why = clone(method).explain(operator, hessian_perturbation)
        place = f"block {number} of {len(A.operators)}, {operator.size:,} parameters"
        say(f"{place}: method {own.name or type(own).__name__}, {why}", verbose)
        inverses.append(inverted(own, operator, hessian_perturbation, checkpoint.within(f"block {number}"), verbose))
    return BlockInverse(inverses, A, hessian_perturbation)


class BlockInverse(InverseOperator):
    """(A + λI)⁻¹ of a block-diagonal A, one inverse a block.

    Parameters
    ----------
    inverses : sequence of InverseOperator
        The blocks' inverses.
    blocks : BlockDiagonal
        Which entries of a row each block acts on.
    hessian_perturbation : float
        λ.
    """

    _fields: ClassVar[dict[str, str]] = {
        "inverses": "list[InverseOperator]",
        "hessian_perturbation": "float",
        "name": "str",
        "judges": "bool|missing",
        "order": "index[p]|None",
        "positive_definite": "bool|None",
        "keeps_operator": "bool",
    }
    approximate = True

    def __init__(self, inverses: Sequence[InverseOperator], blocks: BlockDiagonal, hessian_perturbation: float) -> None:
        # The whole is judged, once: no block has the exact curvature at hand.
        self.inverses = list(inverses)
        self.hessian_perturbation = float(hessian_perturbation)
        self.name = "blocks"
        self.order = blocks.order
        known = [inverse.positive_definite for inverse in self.inverses]
        self.positive_definite = False if False in known else (None if None in known else True)
        self.keeps_operator = any(inverse.keeps_operator for inverse in self.inverses)

    @property
    def operator(self) -> LinearOperator:
        """A + λI, block by block as each method inverts it."""
        return self._blocks

    @property
    def _blocks(self) -> BlockDiagonal:
        # Made when asked for: kept, a pickle would hold every block's matrix twice.
        whole = BlockDiagonal([inverse.operator for inverse in self.inverses])
        whole.order = self.order
        return whole

    @property
    def moves(self) -> bool:
        """Whether every block's inverse serves another λ from what it keeps."""
        return all(inverse.moves for inverse in self.inverses)

    @property
    def tolerance(self) -> float:
        """That of the strictest block."""
        return min(inverse.tolerance for inverse in self.inverses)

    def solve(self, B: torch.Tensor) -> InverseHvpResult:
        """Return the solutions.

        ``info`` holds ``residual`` (k,) against the whole of the exact curvature, ``converged`` (k,) by it,
        ``residual_of_approximation`` (k,), of the block-diagonal system, ``reason`` (k,), a block's where one failed,
        ``approximate`` True, and ``blocks``, each block's own info.
        """
        results = [inverse.solve(part) for inverse, part in zip(self.inverses, self._blocks.parts(B), strict=True)]
        X = self._blocks.joined([result.x for result in results])
        infos = [result.info for result in results]
        info = self.verdict(B, X, self._residual(B, infos), causes=_failures(infos))
        return InverseHvpResult(X, {**info, "blocks": infos})

    def apply(self, V: torch.Tensor) -> torch.Tensor:
        """Return the solutions alone."""
        parts = zip(self.inverses, self._blocks.parts(V), strict=True)
        return self._blocks.joined([inverse.apply(part) for inverse, part in parts])

    def started_at(self, x0: torch.Tensor) -> Self:
        """Return this inverse with each block started at its part of ``x0`` (k, p)."""
        other = copy.copy(self)
        parts = zip(self.inverses, self._blocks.parts(x0), strict=True)
        other.inverses = [inverse.started_at(part) for inverse, part in parts]
        return other

    def scale_free(self) -> Self:
        """Return this inverse without settings on the scale of b."""
        other = copy.copy(self)
        other.inverses = [inverse.scale_free() for inverse in self.inverses]
        return other

    def unjudged(self) -> Self:
        """Return this inverse without a residual, its own and that of its blocks."""
        other = super().unjudged()
        other.inverses = [inverse.unjudged() for inverse in self.inverses]
        return other

    @property
    def gaussian(self) -> bool:
        """Whether every block has ``log_det`` and ``root``."""
        return all(inverse.gaussian for inverse in self.inverses)

    def log_det(self) -> float:
        """Return the sum of the blocks'."""
        return sum(inverse.log_det() for inverse in self.inverses)

    @property
    def noise_size(self) -> int:
        """That of all blocks."""
        return sum(inverse.noise_size for inverse in self.inverses)

    def root(self, Z: torch.Tensor) -> torch.Tensor:
        """Return each block's own, of its part of the noise."""
        parts = zip(self.inverses, Z.split([inverse.noise_size for inverse in self.inverses], dim=1), strict=True)
        return self._blocks.joined([inverse.root(part) for inverse, part in parts])

    @property
    def own_eigenvalues(self) -> torch.Tensor | None:
        """Those of all blocks, where each knows its own."""
        found = [inverse.own_eigenvalues for inverse in self.inverses]
        known = [values for values in found if values is not None]
        return torch.cat(known).sort().values if len(known) == len(found) else None

    def at(self, hessian_perturbation: float) -> BlockInverse:
        """Return the inverse at another λ, where every block's method allows it."""
        inverses = [inverse.at(hessian_perturbation) for inverse in self.inverses]
        other = BlockInverse(inverses, self._blocks, hessian_perturbation)
        return other.judged_as(self)

    def check(self) -> None:
        """Raise ValueError where a block contradicts itself, or the whole its blocks."""
        for inverse in self.inverses:
            inverse.check()
        self.compare(BlockInverse(self.inverses, self._blocks, self.hessian_perturbation), but=("inverses",))

    def _residual(self, B: torch.Tensor, infos: Sequence[dict[str, Any]]) -> torch.Tensor:
        """Return ‖r‖ / ‖b‖ of the whole, from the blocks' own: a block with b = 0 has its absolute residual."""
        total = torch.zeros(len(B), dtype=torch.float64, device=B.device)
        for part, info in zip(self._blocks.parts(B), infos, strict=True):
            size = part.norm(dim=1).to(total)
            own = info.get("residual_of_approximation", info["residual"])
            total += (own.to(total) * torch.where(size > 0, size, 1.0)).square()
        size = B.norm(dim=1).to(total)
        return total.sqrt() / torch.where(size > 0, size, 1.0)


def _failures(infos: Sequence[dict[str, Any]]) -> list[tuple[Reason, torch.Tensor]]:
    """Return the rows (k,) that failed in a block, for each reason."""
    # A method of one's own may give none.
    told = [info["reason"] for info in infos if "reason" in info]
    return [(reason, (torch.stack(told) == reason).any(0)) for reason in FAILURES] if told else []
