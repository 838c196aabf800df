"""A randomised sketch of a positive semi-definite operator, and the eigenpairs of its Nyström approximation."""

from __future__ import annotations

import math
from functools import partial

import torch

from .._check import all_finite, must_be
from .._checkpoint import NOWHERE, Checkpoint
from .._memory import check_memory, rows_within
from .._progress import progress
from .._scaling import norms
from .._types import State
from ..operators import Eigenvectors, LinearOperator, Spectral
from .lanczos import gaussian_rows

__all__ = ["Sketch", "not_psd"]

# The rank that "adaptive" starts from, and the iterations of its power method.
FIRST_RANK, POWER_ITERATIONS = 16, 20
# Products at once: enough for their speed, few enough for a bar to move.
AT_ONCE = 64
# What a checkpoint calls it.
SKETCH = "sketch"


class Sketch:
    """Orthonormal rows Ω (r, p) and their products Y = Ω A; ``verbose`` of 1 shows how many there are to come.

    ``checkpoint`` keeps both, so that a sketch begins with what an earlier run left: rows, and products of the first.
    """

    def __init__(
        self, A: LinearOperator, generator: torch.Generator, verbose: int = 0, checkpoint: Checkpoint = NOWHERE
    ) -> None:
        self.A, self.generator, self.verbose, self.checkpoint = A, generator, verbose, checkpoint
        self.Omega = self.Y = torch.empty(0, A.size, dtype=A.dtype, device=A.device)
        self._found: tuple[torch.Tensor, torch.Tensor] | None = None
        known = checkpoint.resumed(
            SKETCH, {"Omega": f"tensor[r,{A.size}]", "Y": f"tensor[s,{A.size}]", "generator": "bytes[g]"}
        )
        if known is not None:
            self.Omega, self.Y = known["Omega"], known["Y"]
            generator.set_state(known["generator"].cpu())

    def grow(self, rank: int) -> None:
        """Add random rows until there are ``rank`` of them, and their products."""
        check_memory(
            5 * rank * self.A.size * self.A.dtype.itemsize,
            f"A Nyström sketch of rank {rank:,}",
            "Try a smaller rank.",
            self.A.device,
        )
        if rank > len(self.Omega):
            self._draw(rank - len(self.Omega))
        left, step = self.Omega[len(self.Y) :], rows_within(4 * self.A.size * self.A.dtype.itemsize, AT_ONCE)
        # Of no rows `split` makes one part.
        parts, products = left.split(step) if len(left) else (), [self.Y]
        for part in progress(parts, f"sketch of rank {rank:,}", self.verbose, len(parts)):
            products.append(self.A.apply(part))
            if not all_finite(products[-1]):
                raise ValueError(must_be("The curvature", "finite", "NaN or infinity", "Look at the parameters."))
            self.checkpoint.keep(SKETCH, partial(self._state, products))
        self.Y, self._found = torch.cat(products), None
        self.checkpoint.finish(SKETCH, self._state([self.Y]))

    def _state(self, products: list[torch.Tensor]) -> State:
        return {"Omega": self.Omega, "Y": torch.cat(products), "generator": self.generator.get_state()}

    def _draw(self, count: int) -> None:
        rows = gaussian_rows(count, self.A, self.generator)
        # Orthogonal to the rows so far: their span is that of one Gaussian draw all the same.
        for _ in range(2):
            rows = rows - (rows @ self.Omega.mT) @ self.Omega
            rows = torch.linalg.qr(rows.mT).Q.mT.contiguous()
        self.Omega = torch.cat([self.Omega, rows])

    def grow_until(self, tolerance: float) -> None:
        """Double the rank until the estimate of ‖A − Â‖ is within the tolerance."""
        self.grow(max(min(FIRST_RANK, self.A.size), len(self.Omega)))
        while len(self.Y) < self.A.size and self._exceeds(tolerance):
            self.grow(min(2 * len(self.Y), self.A.size))

    def decompose(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return Λ (r,), ascending, and U (r, p) with Â = Uᵀ diag(Λ) U."""
        if self._found is None:
            self._found = self._decompose()
        return self._found

    def _decompose(self) -> tuple[torch.Tensor, torch.Tensor]:
        eps, rough = torch.finfo(self.Y.dtype).eps, self.A.eps > torch.finfo(self.Y.dtype).eps
        # Of products in a lesser dtype the rounding is that of each, not of a sum: from a hundredth of it on.
        nu = max(math.sqrt(self.A.size) * eps, self.A.eps / 100 if rough else 0.0) * float(norms(self.Y).norm())
        if nu == 0:
            return self.Y.new_zeros(len(self.Y)), self.Omega
        core = self.Y @ self.Omega.mT
        core, identity = (core + core.mT) / 2, torch.eye(len(core), dtype=core.dtype, device=core.device)
        cholesky, info = torch.linalg.cholesky_ex(core + nu * identity)
        for _ in range(2 if rough else 1):
            if int(info) == 0:
                break
            # Products of a float32 network round more than those of a matrix.
            nu *= 10
            cholesky, info = torch.linalg.cholesky_ex(core + nu * identity)
        if int(info) != 0:
            raise ValueError(not_psd(float(torch.linalg.eigvalsh(core)[0]), self.A.hint))
        B = torch.linalg.solve_triangular(cholesky, self.Y + nu * self.Omega, upper=False)
        _, sizes, vectors = torch.linalg.svd(B, full_matrices=False)
        # Not a clip of negative curvature: sizes² ≥ ν up to rounding.
        return (sizes.square() - nu).clamp(min=0).flip(0), vectors.flip(0)

    def _exceeds(self, tolerance: float) -> bool:
        """Return whether ‖A − Â‖ exceeds the tolerance, as far as the power method tells."""
        values, vectors = self.decompose()
        approximation = Spectral(Eigenvectors(vectors), values)
        v = gaussian_rows(1, self.A, self.generator)
        for _ in range(POWER_ITERATIONS):
            v = v / norms(v)[:, None].to(v)
            v = self.A.apply(v) - approximation.apply(v)
            # ‖(A − Â)v‖ ≤ ‖A − Â‖: above the tolerance it is a proof, and no further product is needed.
            size = float(norms(v))
            if not 0 < size <= tolerance:
                return size > tolerance
        return False


def not_psd(least: float, hint: str = "") -> str:
    """Return what to say of a curvature with a negative eigenvalue."""
    hint = hint if 'curvature="ggn"' in hint else f'{hint} Try curvature="ggn".'.strip()
    return must_be("The curvature for nystroem", "positive semi-definite", f"an eigenvalue of {least:.3g}", hint)
