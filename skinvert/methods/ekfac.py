"""Kronecker-factored eigenbases with re-fitted eigenvalues."""

from __future__ import annotations

from typing import ClassVar

from .._checkpoint import Checkpoint
from .._storage import storage_of
from ..operators import LinearOperator
from .kfac import KFAC, decomposed, factors_of, inverse_of_layers, spectrum_of, with_penalty
from .spectral_inverse import SpectralInverse

__all__ = ["EKFAC"]


class EKFAC(KFAC):
    r"""H ≈ Q diag(QᵀHQ) Qᵀ in each layer, with Q = U_G ⊗ U_A the eigenbasis of KFAC's factors.

    Of all matrices with these eigenvectors it is the nearest to the layer's exact block. The eigenvalues come from
    per-sample gradients, e = Σᵢ wᵢ (U_Gᵀ (Σ_t g_t a_tᵀ) U_A)² / Σᵢ wᵢ, summed over the columns of the output Hessian's
    factor; the sum over t, the rows that a layer sees of one sample, is taken before the square.

    A penalty adds its diagonal in that basis, diag(QᵀRQ): itself, where it is the same for all of a layer's parameters.
    It costs what ``kfac`` does, and one more pass over the data. It is a good start for conjugate gradients on
    a few rows (``CG(start="ekfac", maxiter=m)``: a few products bring it near the exact solution), and a poor
    preconditioner.

    Parameters
    ----------
    approx : {"expand", "reduce"}, default="expand"
        Of the factors that give the eigenbases, as in ``KFAC``; the eigenvalues are exact in either basis.
    unsupported : {"error", "diagonal"}, default="error"
        As in ``KFAC``.
    offload : None, "cpu" or path of a folder, default=None
        As in ``KFAC``; after the fit the room of the factors in a folder is given back.

    References
    ----------
    George, Laurent, Bouthillier, Ballas & Vincent (2018), "Fast approximate natural gradient descent in a
    Kronecker-factored eigenbasis", eq. 9 and alg. 1.

    Examples
    --------
    One parameter, G A = 6 and the re-fitted 8.

    >>> import torch
    >>> from skinvert.operators import DiagonalMatrix, KroneckerBlock, KroneckerFactors
    >>> one = torch.ones(1, 1)
    >>> class Layered(DiagonalMatrix):
    ...     def kronecker_factors(self, approx, unsupported, verbose=0):
    ...         block = KroneckerBlock("fc", torch.zeros(1, 1, dtype=torch.long), 2 * one, 3 * one, None)
    ...         rest = torch.empty(0, dtype=torch.long), torch.empty(0)
    ...         return KroneckerFactors((block,), *rest, lambda bases: [8 * one])
    >>> EKFAC().invert(Layered(torch.tensor([8.0])), 2.0).solve(torch.tensor([[5.0]])).x
    tensor([[0.5000]])
    """

    name: ClassVar[str] = "ekfac"
    cost: ClassVar[str] = "as kfac, and a second pass"
    memory: ClassVar[str] = "2 (d² + i²) + d i a layer"
    exactness: ClassVar[str] = "kfac's eigenvectors, the exact curvature along them"
    choose_it_for: ClassVar[str] = "as kfac, at a better accuracy"

    def resume(
        self, A: LinearOperator, hessian_perturbation: float, checkpoint: Checkpoint, verbose: int = 0
    ) -> SpectralInverse:
        """Compute them from where ``checkpoint`` has them."""
        storage = storage_of(self.offload, A.device)
        factors = factors_of(A, self.approx, self.unsupported, verbose, checkpoint, storage)
        bases = [basis for basis, _ in decomposed(factors.blocks, checkpoint, storage)]
        spectrum, parts = spectrum_of(factors, storage)
        refitted = zip(factors.blocks, bases, parts, factors.refit(bases), strict=True)
        for block, basis, part, eigenvalues in refitted:
            part.copy_(with_penalty(block, basis, eigenvalues.to(A.device)))
        layers = (factors, bases, spectrum, hessian_perturbation, storage)
        return inverse_of_layers(*layers, name=self.name).judged_by(A)
