"""The trace of an operator: exact where its diagonal costs little, else estimated to about a per cent."""

from __future__ import annotations

import math

import torch

from .._autograd import ordinary
from .._check import must_be
from .base import LinearOperator

__all__ = ["trace"]

# Products with the identity, or numbers of a factor, up to which the trace is exact.
FEW, MOST_NUMBERS = 1024, 10**9
# Directions that the estimate takes out first, and at most; its standard error, relative to it.
FIRST, MOST = 32, 512
STANDARD_ERROR = 0.003


@ordinary
def trace(A: LinearOperator, seed: int = 0) -> float:
    r"""Return tr A, the sum of its eigenvalues.

    Exact where the operator gives its diagonal without products (dense, low-rank and plain rows, factors of up to 10⁹
    numbers), and for p ≤ 1,024. Else Hutch++: the trace on the range of a random sketch of k rows, which has the
    largest eigenvalues, is exact, and that of the rest is the mean of zᵀAz over k / 2 random signs z. k begins at 32,
    which takes 80 products, and doubles until the standard error is 0.3 % of the trace.

    Parameters
    ----------
    A : LinearOperator
        The operator.
    seed : int, default=0
        Of what is drawn.

    Raises
    ------
    ValueError
        Where k = 512 leaves an error larger than that: eigenvalues of both signs cancel.

    References
    ----------
    Meyer, Musco, Musco & Woodruff (2021), "Hutch++: Optimal stochastic trace estimation", Alg. 1. Deviation: k
    follows from the spread of the draws.

    Examples
    --------
    >>> from skinvert.operators import LowRank
    >>> trace(LowRank(torch.tensor([[1.0, 2.0]])))
    5.0
    """
    if A.size <= FEW or _gives_its_diagonal(A):
        return float(A.diagonal().double().sum())
    generator = torch.Generator("cpu").manual_seed(seed)
    Q = torch.empty(0, A.size, dtype=A.dtype, device=A.device)
    taken, found = 0.0, math.nan
    while len(Q) < MOST:
        grown = _grown(A, Q, generator)
        taken += float(_forms(A, grown).sum())
        Q = torch.cat([Q, grown])
        Z = _signs(len(Q) // 2, A, generator)
        forms = _forms(A, Z - (Z @ Q.mT) @ Q)
        found = taken + float(forms.mean())
        if float(forms.std()) / math.sqrt(len(forms)) <= STANDARD_ERROR * abs(found):
            return found
    hint = 'Its eigenvalues cancel. Try a number for λ, or curvature="ggn".'
    must = f"one that a sketch of {MOST} rows tells to 1 %"
    raise ValueError(must_be("The trace of the curvature", must, f"{found:.3g} or so", hint))


def _grown(A: LinearOperator, Q: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return as many rows as Q has, or the first ones, that are orthonormal beside it: of what A makes of signs."""
    rows = A.apply(_signs(max(FIRST, len(Q)), A, generator))
    # Twice: one pass leaves what rounding makes of the large directions.
    for _ in range(2):
        rows = rows - (rows @ Q.mT) @ Q
        rows = torch.linalg.qr(rows.mT).Q.mT.contiguous()
    return rows


def _forms(A: LinearOperator, V: torch.Tensor) -> torch.Tensor:
    """Return vᵀAv (k,) for the rows of V, in float64."""
    return (V * A.apply(V)).double().sum(1)


def _gives_its_diagonal(A: LinearOperator) -> bool:
    """Return whether its class has a way to the diagonal other than p products, and one of few numbers."""
    numbers = 0 if A.factor_shape is None else math.prod(A.factor_shape)
    return A.has_own_diagonal and numbers <= MOST_NUMBERS


def _signs(k: int, A: LinearOperator, generator: torch.Generator) -> torch.Tensor:
    """Return random signs (k, p)."""
    signs = torch.randint(0, 2, (k, A.size), generator=generator, device="cpu")
    return (2 * signs - 1).to(A.device, A.dtype)
