"""Randomised Nyström: a positive semi-definite curvature from its products with a few random rows."""

from __future__ import annotations

from typing import ClassVar, Self

import torch

from .._check import check_number, must_be
from .._checkpoint import NOWHERE, Checkpoint
from ..operators import Eigenvectors, LinearOperator, zero_cut
from ..solvers.extremes import extreme_eigenvalues
from ..solvers.lanczos import seeded
from ..solvers.sketch import Sketch, not_psd
from .base import InverseOperator, Method
from .spectral_inverse import SpectralInverse

__all__ = ["Nystroem"]


class Nystroem(Method):
    r"""Replace H by Ĥ = (HΩ)(ΩᵀHΩ)⁺(HΩ)ᵀ = Uᵀ Λ U for random Ω (p, r), and invert Ĥ + λI, λ > 0.

    (Ĥ + λI)⁻¹ = Uᵀ (Λ + λ)⁻¹ U + (I − UᵀU) / λ. It takes r products with H, in one pass where they fit the memory, and
    a solve is five GEMMs, O(r p) a row. Memory: r p numbers, four times that while it is made. Ĥ ≼ H, and the relative
    error of a solve is at most ‖H − Ĥ‖ / λ. The sketch knows no λ, so that one serves every λ; ``"adaptive"`` chooses
    its size by the first.

    H must be positive semi-definite. Unless it is by construction, its smallest eigenvalue is estimated, and a negative
    one is an error; one within rounding of zero is zero. As a preconditioner of ``CG`` it takes the form
    (Λ_r + λ) Uᵀ (Λ + λ)⁻¹ U + (I − UᵀU).

    Parameters
    ----------
    rank : int or "adaptive", default="adaptive"
        r; more than p is p, and exact. ``"adaptive"`` starts from 16 and doubles it, keeping the products, until the
        estimate of ‖H − Ĥ‖ is at most ``tol`` λ.
    random_state : int, default=None
        Of Ω; None is 0.
    tol : float, default=0.1
        For ``"adaptive"``. As a preconditioner 10 is enough.

    References
    ----------
    Frangella, Tropp & Udell (2023), "Randomized Nyström preconditioning", SIAM J. Matrix Anal. Appl. 44(2): Alg. 2.1
    (the sketch), eq. 1.3 and 5.3 (the preconditioner), App. E (adaptive rank, power method).
    Deviation: the stabilising shift is √p·eps·‖HΩ‖, as in the implementation of Tropp et al. (2017).

    Examples
    --------
    >>> from skinvert.operators import LowRank
    >>> A = LowRank(torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    >>> Nystroem(rank=2).invert(A, 1.0).solve(torch.tensor([[5.0, 2.0, 1.0]])).x
    tensor([[1.0000, 1.0000, 1.0000]])
    """

    name: ClassVar[str] = "nystroem"
    gaussian: ClassVar[bool] = True
    resumes: ClassVar[bool] = True
    cost: ClassVar[str] = "r products once; 2 r p a row"
    memory: ClassVar[str] = "r p"
    exactness: ClassVar[str] = "the r largest eigenvalues, at random; exact for r = p"
    needs_psd: ClassVar[bool] = True
    choose_it_for: ClassVar[str] = "a positive semi-definite curvature that falls fast; preconditioning"

    @classmethod
    def tight(cls) -> Self:
        """Return it with all eigenpairs of matrices up to this size."""
        return cls(rank=1000)

    def __init__(self, *, rank: int | str = "adaptive", random_state: int | None = None, tol: float = 0.1) -> None:
        self.rank, self.random_state, self.tol = rank, random_state, tol

    def invert(self, A: LinearOperator, hessian_perturbation: float, verbose: int = 0) -> InverseOperator:
        """Check that A is positive semi-definite, and sketch it."""
        return self.resume(A, hessian_perturbation, NOWHERE, verbose)

    def resume(
        self, A: LinearOperator, hessian_perturbation: float, checkpoint: Checkpoint, verbose: int = 0
    ) -> InverseOperator:
        """Sketch it from where ``checkpoint`` has the sketch."""
        tol = check_number(self.tol, "tol", owner="Nystroem", low=0.0)
        rank = A.size if self.rank == "adaptive" else self._checked_rank(A)
        if hessian_perturbation == 0 and (self.rank == "adaptive" or rank < A.size):
            hint = "The part of the parameters outside the sketch is divided by it. Try 1e-3."
            raise ValueError(must_be("hessian_perturbation for nystroem", "> 0", hessian_perturbation, hint))
        generator = seeded(self.random_state, "Nystroem")
        sketch = Sketch(A, generator, verbose, checkpoint)
        # An earlier run has checked it before it drew any row.
        if not A.is_psd and not len(sketch.Omega):
            _check_psd(A, *extreme_eigenvalues(A, random_state=self.random_state or 0))
        if self.rank == "adaptive":
            sketch.grow_until(tol * hessian_perturbation)
        else:
            sketch.grow(rank)
        values, vectors = sketch.decompose()
        basis = Eigenvectors(vectors)
        return SpectralInverse(basis, values, hessian_perturbation, name=self.name, complement=0.0).judged_by(A)

    def _checked_rank(self, A: LinearOperator) -> int:
        if isinstance(self.rank, str):
            raise ValueError(must_be("The 'rank' parameter of Nystroem", 'an int or "adaptive"', repr(self.rank)))
        return min(A.size, check_number(self.rank, "rank", owner="Nystroem", low=1, integer=True))


def _check_psd(A: LinearOperator, smallest: tuple[float, float], largest: tuple[float, float]) -> None:
    """Raise where the smallest eigenvalue is negative beyond rounding."""
    most = torch.tensor([smallest[0], largest[0]], dtype=A.dtype, device="cpu")
    if smallest[0] < -zero_cut(most, A.size):
        raise ValueError(not_psd(smallest[0], A.hint))
