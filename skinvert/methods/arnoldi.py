"""Inversion from the eigenpairs of largest magnitude, by block Lanczos."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from sklearn.exceptions import ConvergenceWarning

from .._check import check_choice, check_number, must_be
from .._checkpoint import NOWHERE, Checkpoint
from .._telling import warn
from ..operators import Eigenvectors, LinearOperator, zero_cut
from ..solvers.lanczos import by_magnitude, eigenpairs, seeded
from .base import InverseOperator, Method
from .spectral_inverse import SpectralInverse

__all__ = ["Arnoldi"]


class Arnoldi(Method):
    r"""Replace H by its r eigenpairs of largest magnitude, and invert these: Uᵀ (θ + λ)⁻¹ U + (I − UᵀU) / (λ + τ).

    For a symmetric H Arnoldi's iteration is Lanczos'; it runs in blocks, re-orthogonalised in full, so that repeated
    eigenvalues are found as often as they occur. λ enters after the decomposition: one serves every λ, and a solve is
    five GEMMs, O(r p) a row. Cost: three to ten times r products with H. Memory: r p numbers, and krylov_dimension · p
    while it is made. With rank = p it is exact.

    Parameters
    ----------
    rank : int, default=None
        r; more than p is p. None is min(p, 50), or all of a given ``decomposition``.
    krylov_dimension : int, default=None
        Rows of the Krylov space, more than ``rank``: a larger one restarts less. None is 2 ``rank`` + 20.
    tol : float, default=None
        A pair has converged when ‖Hu − θu‖ ≤ ``tol`` \|θ\|. None is 1e-4 in float32, 1e-8 in float64.
    maxiter : int, default=100
        Most times that the Krylov space is filled.
    complement : {"shift", "trace", "drop"}, default="shift"
        What stands for the p − r eigenvalues that are not computed: ``"shift"`` that of the penalty alone, τ its mean
        on the complement (0 without one), so that this is divided by λ + τ > 0; ``"trace"`` their mean
        τ = (tr H − Σθ) / (p − r); ``"drop"`` leaves the complement out of x.
    decomposition : tuple of arrays or tensors (r,) and (r, p), default=None
        Eigenvalues and orthonormal eigenvectors (rows) of H, instead of computing them.
    random_state : int, default=None
        Of the starting rows; None is 0.

    References
    ----------
    Schioppa, Zablotskaia, Vilar & Sokolov (2022), "Scaling up influence functions", sec. 3.2 (``complement="drop"``);
    Wu & Simon (2000), "Thick-restart Lanczos method for large symmetric eigenvalue problems", Alg. 3.
    Deviation: the complement is kept, as dropping it leaves out most of a generic right-hand side.

    Examples
    --------
    >>> from skinvert.operators import DiagonalMatrix
    >>> inverse = Arnoldi(rank=1).invert(DiagonalMatrix(torch.tensor([3.0, 0.5])), 1.0)
    >>> inverse.solve(torch.tensor([[4.0, 4.0]])).x
    tensor([[1., 4.]])
    """

    name: ClassVar[str] = "arnoldi"
    gaussian: ClassVar[bool] = True
    resumes: ClassVar[bool] = True
    cost: ClassVar[str] = "some 4 products per rank, once; 2 r p a row"
    memory: ClassVar[str] = "r p"
    exactness: ClassVar[str] = "the r largest eigenvalues, and a rule for the rest; exact for r = p"
    choose_it_for: ClassVar[str] = "a spectrum that falls fast; many λ"

    @classmethod
    def tight(cls) -> Self:
        """Return it with all eigenpairs of matrices up to this size."""
        return cls(rank=1000)

    def __init__(
        self,
        *,
        rank: int | None = None,
        krylov_dimension: int | None = None,
        tol: float | None = None,
        maxiter: int = 100,
        complement: str = "shift",
        decomposition: Any = None,
        random_state: int | None = None,
    ) -> None:
        self.rank, self.krylov_dimension, self.tol, self.maxiter = rank, krylov_dimension, tol, maxiter
        self.complement, self.decomposition, self.random_state = complement, decomposition, random_state

    def invert(self, A: LinearOperator, hessian_perturbation: float, verbose: int = 0) -> InverseOperator:
        """Decompose A, or take the decomposition given."""
        return self.resume(A, hessian_perturbation, NOWHERE, verbose)

    def resume(
        self, A: LinearOperator, hessian_perturbation: float, checkpoint: Checkpoint, verbose: int = 0
    ) -> InverseOperator:
        """Decompose A from where ``checkpoint`` has the Krylov space."""
        check_choice(self.complement, "The 'complement' parameter of Arnoldi", ["shift", "trace", "drop"])
        if self.rank is not None:
            check_number(self.rank, "rank", owner="Arnoldi", low=1, integer=True)
        values, vectors = self._decompose(A, checkpoint, verbose) if self.decomposition is None else self._given(A)
        # By rounding alone, unless they were given: those may be of another matrix.
        if A.is_psd and (self.decomposition is None or bool((values >= -zero_cut(values, A.size)).all())):
            values = values.clamp(min=0)
        basis, complement = Eigenvectors(vectors), self._mean_of_rest(A, values, vectors)
        inverse = SpectralInverse(
            basis, values, hessian_perturbation, name=self.name, complement=complement, hint=A.hint
        )
        return inverse.judged_by(A)

    def _decompose(self, A: LinearOperator, checkpoint: Checkpoint, verbose: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the eigenvalues, ascending, and the eigenvectors."""
        rank = min(A.size, 50 if self.rank is None else self.rank)
        dimension = 2 * rank + 20 if self.krylov_dimension is None else self.krylov_dimension
        low = min(rank + 1, A.size)
        dimension = check_number(dimension, "krylov_dimension", owner="Arnoldi", low=low, integer=True)
        eps = torch.finfo(A.dtype).eps
        tol = {torch.float32: 1e-4}.get(A.dtype, 1e-8) if self.tol is None else self.tol
        tol = check_number(tol, "tol", owner="Arnoldi", low=0.0)
        maxiter = check_number(self.maxiter, "maxiter", owner="Arnoldi", low=1, integer=True)
        pairs = eigenpairs(
            A,
            rank,
            by_magnitude,
            dimension=dimension,
            tol=tol,
            # The rounding of a product: an eigenvalue of about zero never has a small relative error.
            floor=100 * eps,
            maxiter=maxiter,
            generator=seeded(self.random_state, "Arnoldi"),
            verbose=verbose,
            checkpoint=checkpoint,
        )
        if not pairs.converged:
            self._warn(pairs.values, pairs.errors)
        ascending = pairs.values.argsort()
        return pairs.values[ascending].to(A.dtype), pairs.vectors[ascending]

    def _warn(self, values: torch.Tensor, errors: torch.Tensor) -> None:
        worst = int((errors / values.abs().clamp(min=1e-300)).argmax())
        warn(
            f"arnoldi did not converge: the eigenvalue {float(values[worst]):.3g} has a residual of "
            f"{float(errors[worst]):.3g}. Try a larger `krylov_dimension` or `maxiter`, or another `rank`.",
            ConvergenceWarning,
        )

    def _given(self, A: LinearOperator) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the decomposition given, checked, or its ``rank`` pairs of largest magnitude."""
        what = "The 'decomposition' parameter of Arnoldi"
        must = f"a pair of eigenvalues (r,) and orthonormal eigenvectors (r, {A.size})"
        try:
            values, vectors = (torch.as_tensor(part).detach().to(A.device, A.dtype) for part in self.decomposition)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(must_be(what, must, type(self.decomposition).__name__)) from error
        if values.ndim != 1 or not len(values) or vectors.shape != (len(values), A.size):
            got = f"shapes {tuple(values.shape)} and {tuple(vectors.shape)}"
            raise ValueError(must_be(what, must, got, "Eigenvectors are rows."))
        if not bool(torch.isfinite(values).all() and torch.isfinite(vectors).all()):
            raise ValueError(must_be(what, "finite", "NaN or infinity"))
        gap = float(
            (vectors @ vectors.mT - torch.eye(len(values), dtype=vectors.dtype, device=vectors.device)).abs().max()
        )
        if gap > torch.finfo(A.dtype).eps ** 0.5:
            raise ValueError(must_be(what, must, f"rows whose products are off by {gap:.3g}"))
        kept = by_magnitude(values)[: self.rank].sort().values
        kept = kept[values[kept].argsort()]
        return values[kept].clone(), vectors[kept].clone()

    def _mean_of_rest(self, A: LinearOperator, values: torch.Tensor, vectors: torch.Tensor) -> float | None:
        """Return τ, what stands for the eigenvalues that are not computed; None drops their span."""
        rest = A.size - len(values)
        if self.complement == "drop":
            return None
        if not rest:
            return 0.0
        if self.complement == "shift":
            return _mean_penalty(A, vectors)
        trace = float(A.diagonal().to(torch.float64).sum())
        mean = (trace - float(values.to(torch.float64).sum())) / rest
        return mean if abs(mean) > zero_cut(values, A.size) else 0.0


def _mean_penalty(A: LinearOperator, vectors: torch.Tensor) -> float:
    """Return the mean of the penalty R on the complement of orthonormal rows u: (tr R − Σ uᵀRu) / (p − r)."""
    if A.penalty is None:
        return 0.0
    R = A.penalty.double()
    inside = sum(float(u.double().square() @ R) for u in vectors)
    # Between its entries whatever the rounding.
    return min(max((float(R.sum()) - inside) / (A.size - len(vectors)), float(R.min())), float(R.max()))
