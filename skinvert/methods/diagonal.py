"""The inverse of the curvature's diagonal: the cheapest approximation."""

from __future__ import annotations

from typing import ClassVar

from ..operators import LinearOperator, StandardBasis
from .base import InverseOperator, Method
from .null_space import without_rounding
from .spectral_inverse import SpectralInverse

__all__ = ["Diagonal"]


class Diagonal(Method):
    r"""x = b / (diag(A) + λ), with the exact diagonal of the chosen curvature.

    What it inverts is diag(A) + λI, not A + λI. Entries are judged one by one, since parameters may differ in scale by
    many decades: a positive one counts, however small; one that is zero, or below it by no more than rounding of the
    largest, is zero. With λ > 0 none is left out; at λ = 0 zeros are (the pseudo-inverse), and right-hand sides with a
    part there are warned of. Negative entries, which only an indefinite curvature has, are inverted as they are, with a
    warning. ``info["residual"]`` is against the exact A + λI.

    Cost: the diagonal, one pass of per-sample gradients or Jacobians over the data (``empirical_fisher``, ``ggn``); of
    the ``hessian`` a third of a product at most for each entry of the layers' results, where all are Linear and see one
    row a sample, else p products. Then O(p) per right-hand side, and a product for its true residual. Memory: p
    numbers.

    References
    ----------
    LeCun, Denker & Solla (1990), "Optimal brain damage": the diagonal of the Hessian alone.

    Examples
    --------
    >>> import torch
    >>> from skinvert.operators import Dense
    >>> inverse = Diagonal().invert(Dense(torch.tensor([[1.0, 0.5], [0.5, 3.0]])), 1.0)
    >>> inverse.solve(torch.tensor([[2.0, 2.0]])).x
    tensor([[1.0000, 0.5000]])
    """

    name: ClassVar[str] = "diagonal"
    gaussian: ClassVar[bool] = True
    cost: ClassVar[str] = "c backward passes; Hessian Σ d directions, or p products"
    memory: ClassVar[str] = "p"
    exactness: ClassVar[str] = "the diagonal alone"
    choose_it_for: ClassVar[str] = "the cheapest baseline; preconditioning"

    def invert(self, A: LinearOperator, hessian_perturbation: float, verbose: int = 0) -> InverseOperator:
        """Compute the diagonal of A."""
        entries = without_rounding(A.diagonal())
        basis = StandardBasis(len(entries))
        return SpectralInverse(basis, entries, hessian_perturbation, name=self.name, hint=A.hint).judged_by(A)
