"""The spectrum of an operator: its extreme eigenvalues with their errors, and all of them or their density."""

from __future__ import annotations

import math

import numpy as np
import scipy.sparse.linalg
import torch

from .._check import check_number
from .._memory import rows_within
from .._progress import progress_by
from .._scaling import ScaledProducts, norms
from ..operators import LinearOperator, check_dense_memory
from ..results import Spectrum
from .lanczos import eigenpairs, from_both_ends, gaussian_rows, seeded

__all__ = ["extreme_eigenvalues", "lanczos_density", "smallest_eigenvalue", "spectrum"]

# Up to so many parameters, or rows of a factor, all eigenvalues are computed.
EXACT_SIZE = 1000


def smallest_eigenvalue(A: LinearOperator, random_state: int = 0) -> tuple[float, float]:
    """Return the smallest eigenvalue of A and the residual of its Lanczos vector; (inf, inf) where none converged.

    A separate Lanczos run: the coefficients of conjugate gradients see the right-hand side's part of the spectrum only.
    """
    if A.size <= 32:
        return float(np.linalg.eigvalsh(A.to_dense().cpu().numpy())[0]), 0.0
    # ARPACK's tolerance has an absolute floor of about eps ** (2/3): A is brought near one.
    start = np.random.default_rng(random_state).standard_normal(A.size)
    products = ScaledProducts(A.apply, A.dtype)
    if not bool(products(torch.from_numpy(start)[None].to(A.device, A.dtype)).any()):
        # It maps a random row to zero: it is zero, and ARPACK has no Krylov space of it.
        return 0.0, 0.0
    operator = _Scaled(A, products).aslinearoperator()
    start = start.astype(operator.dtype)
    try:
        values, vectors = scipy.sparse.linalg.eigsh(operator, k=1, which="SA", v0=start, tol=1e-2, maxiter=200)
    except scipy.sparse.linalg.ArpackNoConvergence:
        return np.inf, np.inf
    theta, v = float(values[0]), vectors[:, 0]
    error = float(np.linalg.norm(operator @ v - theta * v))
    return math.ldexp(theta, products.exponent), math.ldexp(error, products.exponent)


class _Scaled(LinearOperator):
    """A on the scale of its products."""

    def __init__(self, A: LinearOperator, products: ScaledProducts) -> None:
        super().__init__(A.size, A.dtype, A.device)
        self.products = products

    def apply(self, V: torch.Tensor) -> torch.Tensor:
        """Return the scaled products."""
        return self.products(V)


def extreme_eigenvalues(
    A: LinearOperator, *, tol: float = 1e-4, maxiter: int = 20, random_state: int | None = 0, verbose: int = 0
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the smallest and the largest eigenvalue of A, each with a bound of its error.

    Each is a Ritz value θ with its residual ‖Au − θu‖, within which an eigenvalue of A lies; no eigenvalue of A lies
    above the smallest θ or below the largest, so that a θ < 0 proves A indefinite. One Lanczos run for both: 60 to
    some 800 products.

    Parameters
    ----------
    A : LinearOperator
        Symmetric.
    tol : float, default=1e-4
        Residual, relative to the largest magnitude, at which the run ends.
    maxiter : int, default=20
        Most times that the Krylov space of 60 rows is filled.
    random_state : int, default=0
        Of the starting rows.
    verbose : int, default=0
        1 shows a progress bar.

    Returns
    -------
    smallest, largest : tuple of (float, float)
        Eigenvalue and error.

    References
    ----------
    Parlett (1998), "The Symmetric Eigenvalue Problem", thm. 4.5.1.

    Examples
    --------
    >>> from skinvert.operators import DiagonalMatrix
    >>> extreme_eigenvalues(DiagonalMatrix(torch.tensor([1.0, 3.0, -2.0])))
    ((-2.0, 0.0), (3.0, 0.0))
    """
    pairs = eigenpairs(
        A,
        min(2, A.size),
        from_both_ends,
        dimension=60,
        tol=0.0,
        floor=tol,
        maxiter=maxiter,
        generator=seeded(random_state, "extreme_eigenvalues"),
        verbose=verbose,
        repeated=False,
    )
    found = list(zip(pairs.values.tolist(), pairs.errors.tolist(), strict=True))
    return found[0], found[-1]


def lanczos_density(
    A: LinearOperator, n_probes: int = 10, steps: int = 60, random_state: int | None = 0, verbose: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Return nodes and weights of the spectral density of A, by stochastic Lanczos quadrature.

    (1/p) tr f(A) ≈ Σⱼ weightⱼ f(nodeⱼ): each probe, a random direction v, gives the Gauss quadrature of vᵀ f(A) v,
    exact for polynomials up to degree 2 · ``steps`` − 1; the mean over probes has a standard error of about
    √(2 / (p · ``n_probes``)) times the root mean square of f over the spectrum. ``n_probes`` · ``steps`` products.

    Parameters
    ----------
    A : LinearOperator
        Symmetric.
    n_probes : int, default=10
        Random directions.
    steps : int, default=60
        Lanczos steps of each; at most p.
    random_state : int, default=0
        Of the probes; None is 0.
    verbose : int, default=0
        1 shows a progress bar.

    Returns
    -------
    nodes : tensor of shape (m,), float64, on the CPU
        Ascending.
    weights : tensor of shape (m,), float64, on the CPU
        Non-negative; their sum is 1.

    References
    ----------
    Ubaru, Chen & Saad (2017), "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature", Alg. 1;
    Lin, Saad & Yang (2016), "Approximating spectral densities of large matrices", sec. 3.2.
    """
    n_probes = check_number(n_probes, "n_probes", owner="lanczos_density", low=1, integer=True)
    steps = min(A.size, check_number(steps, "steps", owner="lanczos_density", low=1, integer=True))
    generator = seeded(random_state, "lanczos_density")
    nodes, weights = [], []
    chunk = rows_within(2 * steps * A.size * A.dtype.itemsize, n_probes)
    counts = [min(chunk, n_probes - done) for done in range(0, n_probes, chunk)]
    for count in progress_by(counts, int, "spectral density", verbose, n_probes):
        probes = gaussian_rows(count, A, generator)
        values, S = torch.linalg.eigh(_tridiagonal(A, probes, steps))
        nodes.append(values.flatten())
        weights.append(S[:, 0].square().flatten())
    found, weight = torch.cat(nodes).cpu(), torch.cat(weights).cpu()
    order = found.argsort()
    return found[order], weight[order] / weight.sum()


def _tridiagonal(A: LinearOperator, starts: torch.Tensor, steps: int) -> torch.Tensor:
    """Return the tridiagonal matrices (k, steps, steps) of Lanczos from each row, re-orthogonalised in full."""
    Q = starts.new_zeros(len(starts), steps, A.size)
    T = torch.zeros(len(starts), steps, steps, dtype=torch.float64, device=A.device)
    q, scale = starts / starts.norm(dim=1, keepdim=True), 0.0
    for j in range(steps):
        Q[:, j] = q
        W = A.apply(q)
        T[:, j, j] = (W * q).sum(1).to(torch.float64)
        for _ in range(2):
            along = torch.einsum("kp,kjp->kj", W, Q[:, : j + 1])
            W = W - torch.einsum("kj,kjp->kp", along, Q[:, : j + 1])
        beta = norms(W)
        scale = max(scale, float(T[:, j, j].abs().max()), float(beta.max()))
        # A space that has closed: zero rows from here on have no weight.
        beta = torch.where(beta > 10 * torch.finfo(W.dtype).eps * scale, beta, 0.0)
        q = torch.where(beta[:, None] > 0, W / beta[:, None].clamp(min=1e-300), 0.0).to(W)
        if j + 1 < steps:
            T[:, j, j + 1] = T[:, j + 1, j] = beta.to(torch.float64)
    return T


def spectrum(
    A: LinearOperator | None,
    known: torch.Tensor | None = None,
    *,
    n_probes: int = 10,
    steps: int = 60,
    random_state: int | None = 0,
    verbose: int = 0,
) -> Spectrum:
    """Return all eigenvalues of A where they are known or cheap, else their density.

    Known: given as such, of a full decomposition. Cheap: up to 1,000 parameters, or rows of a factor. ``verbose=1``
    shows progress bars.
    """
    found = None if known is None else _uniform(known)
    if found is None:
        assert A is not None
        found = _computed_eigenvalues(A, verbose)
    if found is not None:
        values, weights = found
        return Spectrum(values, weights, True, (float(values[0]), 0.0), (float(values[-1]), 0.0))
    assert A is not None
    smallest, largest = extreme_eigenvalues(A, random_state=random_state, verbose=verbose)
    nodes, density = lanczos_density(A, n_probes, steps, random_state, verbose)
    return Spectrum(nodes.numpy(), density.numpy(), False, smallest, largest)


def _computed_eigenvalues(A: LinearOperator, verbose: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Return all eigenvalues of a small matrix, or of a factor of few rows, with their weights; else None."""
    penalty = A.penalty
    rows = A.size if A.factor_shape is None else A.factor_shape[0]
    if rows < A.size and rows <= EXACT_SIZE and (penalty is None or bool((penalty == penalty[0]).all())):
        rest = 0.0 if penalty is None else float(penalty[0])
        F = A.factor(verbose)
        values = torch.linalg.eigvalsh((F @ F.mT).to(torch.float64)).clamp(min=0) + rest
        weights = np.full(rows + 1, 1 / A.size)
        weights[0] = (A.size - rows) / A.size
        return np.concatenate([[rest], values.cpu().numpy()]), weights
    if A.size > EXACT_SIZE:
        return None
    check_dense_memory(A, 2)
    return _uniform(torch.linalg.eigvalsh(A.to_dense(verbose)))


def _uniform(eigenvalues: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    values = np.sort(eigenvalues.to(torch.float64).cpu().numpy())
    return values, np.full(len(values), 1 / len(values))
