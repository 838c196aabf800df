"""Minimal residuals of all rows over one space: many right-hand sides of an indefinite A need few iterations."""

from __future__ import annotations

import torch

from .._memory import rows_within
from .._scaling import norms
from .block_cg import orthonormal_rows
from .minres import pays
from .row_cg import CGState

__all__ = ["BlockMINRESRun"]

# The most directions kept to orthogonalise against: a row of them costs about as much as a product over 1,000 samples.
KEPT = 1024
# Steps between two looks at rows whose residual stands still.
PATIENCE = 10
# A residual of which less than this was taken off does not span a new direction well.
TAKEN = 0.5


class BlockMINRESRun(CGState):
    r"""Block conjugate residuals over a space that grows by one direction for each row under way, never breaking down.

    With directions Z, (r, p) orthonormal rows, and all Q = PA so far orthonormal: W = ZA is orthogonalised against
    them, Z along with it, and an SVD turns both into new rows P, Q = PA, r or fewer. Then X ← X + (RQᵀ)P and
    R ← R − (RQᵀ)Q, which is the least residual of each row over the whole space. The next Z are residuals where RQᵀ is
    large, and else the Q themselves, which span the same where neither breaks down: an indefinite A may leave a
    residual as it is.

    All directions are kept while 1,024 of them fit scikit-learn's ``working_memory``, else as many as fit, but two
    steps' at least: in exact arithmetic these two are enough, and rounding makes more of them save products.

    A row leaves when its true residual is within the tolerance; when the recurrence ended twice and the true residual
    was not halved in between; or when it is in the null space of A, and x a least-squares solution.

    References
    ----------
    O'Leary (1980), "The block conjugate gradient algorithm and related methods", sec. 4 (several rows, one space);
    Jiránek & Rozložník (2010), "Adaptive version of simpler GMRES", sec. 2: residuals or Q as directions, here for
    blocks, told by the singular values of RQᵀ.
    """

    def __post_init__(self) -> None:
        self.start = None if self.x0 is None else self.x0.clone()
        super().__post_init__()
        self.odd, self.norm = False, 0.0
        # Below it ‖PA‖ is rounding, relative to ‖P‖‖A‖.
        self.cut = 100 * torch.finfo(self.B.dtype).eps
        self.most = rows_within(2 * self.B.shape[1] * self.B.element_size(), KEPT)
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        # ‖x‖ and ‖r‖ of the last X whose length paid; ‖r‖ when it was last looked at; who was refused a longer x since.
        self.own_norm = torch.full_like(self.tolerance, torch.inf)
        self.own_size, self.last_size = self.own_norm.clone(), self.own_norm.clone()
        self.refused = torch.zeros_like(self.stagnated)
        self.Z = orthonormal_rows(self.R[self.rows])

    def step(self) -> None:
        """Advance all rows under way by one iteration."""
        W = self.apply(self.Z)
        size = norms(W)
        self.odd = not bool(torch.isfinite(size).all())
        if self.odd:
            return
        self.steps += 1
        self.n_iter[self.rows] += 1
        self.norm = max(self.norm, float(size.max()))
        P, Q = self._orthogonal(self.Z, W)
        # Twice: the first pass leaves rounding of the size that a row had before.
        P, Q = self._orthogonal(P, Q)
        if len(Q):
            self._advance(P, Q)
        else:
            self._begin_anew()

    def result(self) -> torch.Tensor:
        """Return the X of each row, less the null vectors that rows outside the range of A brought into the space.

        What is left of such a row is its part in the null space.
        """
        N = self._null_vectors() if bool(self.stagnated.any()) else self.B[:0]
        if len(N):
            self.X -= ((self.X if self.start is None else self.X - self.start) @ N.mT) @ N
            self.true[:] = torch.nan
        return self.X

    def ends(self, candidate: torch.Tensor, drifted: torch.Tensor) -> torch.Tensor:
        """Return the rows whose recurrence ended: between plateaus of an indefinite A, drift alone is no end."""
        return candidate

    def _null_vectors(self) -> torch.Tensor:
        """Return orthonormal null vectors of A among the residuals of rows that came to no end: a product for each."""
        rows = orthonormal_rows(self.R[self.stagnated])
        U, values, _ = torch.linalg.svd(self.apply(rows), full_matrices=False)
        return U.mT[values <= self.cut * self.norm] @ rows

    def _orthogonal(self, P: torch.Tensor, W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return W less its part in the Q that are kept, as orthonormal rows, and P along with it."""
        size = norms(P)
        for P_kept, Q_kept in self.kept:
            along = W @ Q_kept.mT
            part = along @ P_kept
            W, P, size = W - along @ Q_kept, P - part, torch.maximum(size, norms(part))
        if not len(W):
            return P, W
        Q, T = torch.linalg.qr(W.mT)
        U, values, Vt = torch.linalg.svd(T, full_matrices=False)
        # The product with what is less than rounding of its parts is rounding.
        least = self.cut * self.norm * torch.clamp(Vt.abs() @ size.to(values), min=1.0)
        large = values > least
        return (Vt[large] / values[large, None]) @ P, (Q @ U[:, large]).mT.contiguous()

    def _advance(self, P: torch.Tensor, Q: torch.Tensor) -> None:
        rows, before = self.rows, norms(self.R[self.rows])
        alpha = self._minimise(rows, P, Q)
        self._keep(P, Q)
        restart = self.check(self.claims())
        if bool(restart.any()):
            self._minimise_again(self.rows[restart])
        flat = self.steps % PATIENCE == 0 and self._look_at_flat_rows()
        if bool(restart.any()) or flat:
            self.Z = orthonormal_rows(self.R[self.rows])
            return
        stay = torch.isin(rows, self.rows)
        self.Z = self._next(alpha[stay], before[stay, None].to(alpha), Q)

    def _minimise(self, rows: torch.Tensor, P: torch.Tensor, Q: torch.Tensor) -> torch.Tensor:
        """Take RQᵀ of both x and r, and return it: zero for rows of which it would only make x longer."""
        alpha = self.R[rows] @ Q.mT
        X, R = self.X[rows] + alpha @ P, self.R[rows] - alpha @ Q
        norm, size = norms(X), norms(R)
        decades = torch.log10(norm / self.own_norm[rows])
        paid = pays(decades, size, self.own_size[rows]) | (size <= self.tolerance[rows])
        taken = (paid | (decades <= 1)) & torch.isfinite(norm)
        paid &= taken
        self.own_norm[rows[paid]], self.own_size[rows[paid]] = norm[paid], size[paid]
        self.X[rows[taken]], self.R[rows[taken]] = X[taken], R[taken]
        self.refused[rows[~taken]] = True
        return torch.where(taken[:, None], alpha, 0.0)

    def _keep(self, P: torch.Tensor, Q: torch.Tensor) -> None:
        self.kept.append((P, Q))
        while len(self.kept) > 2 and sum(len(Q) for _, Q in self.kept) > self.most:
            self.kept.pop(0)

    def _minimise_again(self, rows: torch.Tensor) -> None:
        """Take off what the kept directions do of residuals that are new, at no product."""
        for P, Q in self.kept:
            self._minimise(rows, P, Q)

    def _next(self, alpha: torch.Tensor, before: torch.Tensor, Q: torch.Tensor) -> torch.Tensor:
        """Return the next directions of the rows under way: mixtures of r that have changed, or else rows of Q."""
        if not len(alpha):
            return Q[:0]
        U, values, Vt = torch.linalg.svd(alpha / before, full_matrices=False)
        mixtures = U.mT @ (self.R[self.rows] / before)
        return orthonormal_rows(torch.where((values > TAKEN)[:, None], mixtures, Vt @ Q))

    def _begin_anew(self) -> None:
        """Begin from the true residuals, with no direction kept, where the space grows no more."""
        self.check(torch.ones_like(self.rows, dtype=torch.bool))
        self.kept = []
        self.Z = orthonormal_rows(self.R[self.rows])

    def _look_at_flat_rows(self) -> bool:
        """Let least-squares solutions leave, and offer what was refused again; return whether any residual changed."""
        size = norms(self.R[self.rows])
        flat = size > 0.99 * self.last_size[self.rows]
        self.last_size[self.rows] = size
        if not bool(flat.any()):
            return False
        rows = self.rows[flat]
        slope = norms(self.apply(self.R[rows] / size[flat, None].to(self.R)))
        leaving = flat.clone()
        leaving[flat] = slope <= self.cut * self.norm
        self.stagnated[self.rows[leaving]] = True
        self.leave(leaving)
        again = rows[self.refused[rows] & ~self.stagnated[rows]]
        self.refused[again] = False
        self._minimise_again(again)
        return bool(len(again))
