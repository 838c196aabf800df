"""Eigenpairs of a symmetric operator, by block Lanczos with full re-orthogonalisation and thick restarts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .._check import check_number, must_be
from .._checkpoint import NOWHERE, Checkpoint
from .._memory import check_memory
from .._progress import progress
from .._types import State
from ..operators import LinearOperator, check_dense_memory

__all__ = ["RitzPairs", "by_magnitude", "eigenpairs", "from_both_ends", "gaussian_rows", "seeded"]

# Rows per product: enough to share a pass over the data, few enough to keep the degree of the Krylov space.
BLOCK = 4
# Products of a block of random rows after which an eigenvalue that was missed would show.
DEPTH = 5
# What a checkpoint calls a space, and holds of it.
SPACE = "Krylov space"
FIELDS = {
    **{"T": "double[f,f]", "done": "int", "depth": "int", "left": "int", "found": "double[c]|None"},
    "generator": "bytes[g]",
}

Order = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class RitzPairs:
    """Approximate eigenpairs.

    Attributes
    ----------
    values : tensor of shape (r,), float64
        In the order that was asked for.
    vectors : tensor of shape (r, p)
        One per row, orthonormal.
    errors : tensor of shape (r,), float64
        ‖Au − θu‖ as the recurrence estimates it: an eigenvalue of A lies within it of θ.
    converged : bool
        Whether all errors are within the tolerance, and a fresh start found no eigenvalue that was missed.
    """

    values: torch.Tensor
    vectors: torch.Tensor
    errors: torch.Tensor
    converged: bool


def by_magnitude(values: torch.Tensor) -> torch.Tensor:
    """Return the indices of ``values``, the largest magnitude first."""
    return values.abs().argsort(descending=True, stable=True)


def from_both_ends(values: torch.Tensor) -> torch.Tensor:
    """Return the indices of ascending ``values``: the smallest, the largest, the second smallest, and so on."""
    up = torch.arange(len(values), device=values.device)
    return torch.stack([up, up.flip(0)], dim=1).flatten()[: len(values)]


def seeded(random_state: int | None, owner: str) -> torch.Generator:
    """Return a generator on the CPU, so that a seed means the same draws on every device; None is 0."""
    state = 0 if random_state is None else random_state
    seed = check_number(state, "random_state", owner=owner, low=0, integer=True)
    return torch.Generator("cpu").manual_seed(seed)


def gaussian_rows(k: int, A: LinearOperator, generator: torch.Generator) -> torch.Tensor:
    """Return standard normal rows (k, p), the same numbers in both dtypes and however many are drawn at a time."""
    rows = torch.empty(k, A.size, dtype=A.dtype, device="cpu")
    for row in rows:
        row.copy_(torch.randn(A.size, dtype=torch.float64, generator=generator, device="cpu"))
    return rows.to(A.device)


def eigenpairs(
    A: LinearOperator,
    count: int,
    order: Order,
    *,
    dimension: int,
    tol: float,
    floor: float,
    maxiter: int,
    generator: torch.Generator,
    repeated: bool = True,
    verbose: int = 0,
    checkpoint: Checkpoint = NOWHERE,
) -> RitzPairs:
    """Return the first ``count`` eigenpairs of A in the given order.

    A Krylov space of a block of random rows is built, with every new row orthogonalised against all others (twice),
    until it has ``dimension`` rows; then it restarts from the best Ritz vectors and the last block. A space that closes
    early goes on with fresh random rows. As a Krylov space holds no more copies of a repeated eigenvalue than its
    block has rows, a result that has converged is tested by a restart from random rows: it stands when some products
    later it has not changed, and the next eigenvalue, which these rows know, is settled below it. Where ``dimension``
    is about p, the matrix is decomposed instead: exact, and no dearer.

    Parameters
    ----------
    A : LinearOperator
        Symmetric.
    count : int
        r.
    order : function
        Ascending values -> indices, the wanted ones first.
    dimension : int
        Rows of the Krylov space, more than r. Memory: (dimension + 8) p numbers.
    tol, floor : float
        A pair has converged when ‖Au − θu‖ ≤ max(tol |θ|, floor · max|θ|).
    maxiter : int
        Most times that the space is filled.
    repeated : bool
        Whether all copies of a repeated eigenvalue are wanted, and a converged result is tested for them.
    checkpoint : Checkpoint
        Where the space is kept, product by product.

    References
    ----------
    Wu & Simon (2000), "Thick-restart Lanczos method for large symmetric eigenvalue problems", Alg. 3, in blocks;
    Parlett (1998), "The Symmetric Eigenvalue Problem", sec. 6.9 (twice is enough) and thm. 4.5.1 (the error).
    """
    fields = {"values": "double[r]", "vectors": f"tensor[r,{A.size}]", "errors": "double[r]", "converged": "bool"}
    known = checkpoint.resumed("eigenpairs", fields)
    if known is not None:
        pairs = RitzPairs(**known)
    elif dimension + 2 * BLOCK >= A.size:
        pairs = _dense_eigenpairs(A, count, order, verbose)
    else:
        space = _KrylovSpace(A, dimension, generator, maxiter, checkpoint)
        pairs = _restarted(space, count, order, tol, floor, maxiter, repeated, verbose)
    checkpoint.finish("eigenpairs", vars(pairs), replaces=SPACE)
    return pairs


def _restarted(
    space: _KrylovSpace,
    count: int,
    order: Order,
    tol: float,
    floor: float,
    maxiter: int,
    repeated: bool,
    verbose: int,
) -> RitzPairs:
    """Return the pairs of a space that is filled and restarted until they have converged."""
    dimension = space.dimension
    for left in progress(range(space.left, -1, -1), "Lanczos", verbose, maxiter):
        space.left = left
        values, errors = space.fill()
        first, least = order(values), floor * float(values.abs().max())
        wanted, sizes = first[:count], values[first[:count]].abs()
        limit = (tol * sizes).clamp(min=least)
        converged = bool((errors[wanted] <= limit).all())
        same = space.found is not None and bool(((sizes - space.found).abs() <= limit).all())
        settled = space.depth >= DEPTH and bool(errors[first[count]] <= max(0.1 * float(sizes.min()), least))
        done = converged and (not repeated or (same and settled))
        if done or not left:
            break
        fresh = converged and not same
        space.found = sizes if fresh else space.found
        space.restart(wanted if fresh else first[: count + (dimension - count) // 3], fresh)
    return RitzPairs(values[wanted], space.vectors(wanted), errors[wanted], done)


def _dense_eigenpairs(A: LinearOperator, count: int, order: Order, verbose: int) -> RitzPairs:
    check_dense_memory(A, 3)
    matrix = A.to_dense(verbose)
    _check_finite(matrix)
    values, vectors = torch.linalg.eigh(matrix)
    wanted = order(values)[:count]
    found = values[wanted].to(torch.float64)
    return RitzPairs(found, vectors.mT[wanted].contiguous(), torch.zeros_like(found), True)


class _KrylovSpace:
    """Orthonormal rows Q, of which A has been applied to the first ``done``, and T = Q A Qᵀ of those.

    Beside them how often the space may be filled again, ``left``, and the sizes ``found`` of a result under test.
    """

    def __init__(
        self, A: LinearOperator, dimension: int, generator: torch.Generator, maxiter: int, checkpoint: Checkpoint
    ) -> None:
        capacity = min(A.size, dimension + 2 * BLOCK)
        check_memory(
            2 * capacity * A.size * A.dtype.itemsize,
            f"A Krylov space of {dimension:,} rows of p = {A.size:,} parameters",
            "Try a smaller rank or krylov_dimension.",
            A.device,
        )
        self.A, self.dimension, self.generator = A, dimension, generator
        self.Q = torch.empty(capacity, A.size, dtype=A.dtype, device=A.device)
        self.T = torch.zeros(capacity, capacity, dtype=torch.float64, device=A.device)
        self.done = self.filled = self.depth = 0
        self.left, self.checkpoint = maxiter - 1, checkpoint
        self.found: torch.Tensor | None = None
        known = checkpoint.resumed(SPACE, {**FIELDS, "Q": f"tensor[f,{A.size}]"})
        if known is None:
            self._append(self.Q[:0])
        else:
            self._restore(known)

    def fill(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply A until ``dimension`` rows are done; return the Ritz values, ascending, and their errors."""
        while self.done < self.dimension:
            self.checkpoint.keep(SPACE, self._state)
            last = slice(self.done, self.filled)
            W = self.A.apply(self.Q[last])
            _check_finite(W)
            along = self._remove(W, self.filled).to(torch.float64)
            self.T[last, : self.filled], self.T[: self.filled, last] = along, along.mT
            self.T[last, last] = (along[:, last] + along[:, last].mT) / 2
            self.done, self.depth = self.filled, self.depth + 1
            coupling = self._append(W)
        self.values, self.S = torch.linalg.eigh(self.T[: self.done, : self.done])
        return self.values, (self.S[last].mT @ coupling.to(torch.float64)).norm(dim=1)

    def _state(self) -> State:
        kept = slice(0, self.filled)
        return {
            **{"Q": self.Q[kept], "T": self.T[kept, kept], "done": self.done, "depth": self.depth},
            **{"left": self.left, "found": self.found, "generator": self.generator.get_state()},
        }

    def _restore(self, known: State) -> None:
        self.filled, self.done, self.depth = len(known["Q"]), known["done"], known["depth"]
        self.left, self.found = known["left"], known["found"]
        if not self.done < min(self.filled, self.dimension) or self.filled > len(self.Q):
            got = f"{self.done} of {self.filled} rows"
            raise ValueError(must_be("The Krylov space of a checkpoint", f"one of {self.dimension} rows", got))
        self.Q[: self.filled], self.T[: self.filled, : self.filled] = known["Q"], known["T"]
        self.generator.set_state(known["generator"].cpu())

    def vectors(self, which: torch.Tensor) -> torch.Tensor:
        """Return the Ritz vectors as rows."""
        return self.S[:, which].mT.to(self.Q) @ self.Q[: self.done]

    def restart(self, which: torch.Tensor, fresh: bool) -> None:
        """Keep some Ritz vectors, and go on from the last block, or from random rows."""
        kept, rest = self.vectors(which), self.Q[self.done : self.filled].clone()
        k = len(which)
        self.Q[:k] = kept
        self.T.zero_()
        self.T.diagonal()[:k] = self.values[which]
        self.done = self.filled = k
        self.depth = 0 if fresh else self.depth
        self._append(self.Q[:0] if fresh else rest)

    def _append(self, W: torch.Tensor) -> torch.Tensor:
        """Add an orthonormal basis of the rows W, with random rows where they are dependent; return W's part in it."""
        room = min(BLOCK, len(self.Q) - self.filled)
        _, sizes, basis = torch.linalg.svd(W, full_matrices=False)
        scale = max(float(self.T.abs().max()), float(sizes.max()) if len(sizes) else 0.0)
        basis = basis[sizes > 10 * torch.finfo(W.dtype).eps * scale][:room]
        rows = torch.cat([basis, gaussian_rows(room - len(basis), self.A, self.generator)])
        self._remove(rows, self.filled)
        rows = torch.linalg.qr(rows.mT).Q.mT.contiguous()
        self.Q[self.filled : self.filled + room] = rows
        self.filled += room
        return W @ rows.mT

    def _remove(self, rows: torch.Tensor, count: int) -> torch.Tensor:
        """Take the part along the first rows of Q out of ``rows``, in place; return its coefficients."""
        Q = self.Q[:count]
        # Twice: the first pass leaves rounding of the size that a row had before.
        total = torch.zeros(len(rows), count, dtype=rows.dtype, device=rows.device)
        for _ in range(2):
            along = rows @ Q.mT
            rows -= along @ Q
            total += along
        return total


def _check_finite(values: torch.Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        raise ValueError(must_be("The curvature", "finite", "NaN or infinity", "Look at the parameters."))
