"""What every symmetric operator on rows must keep, and each of its optional faces."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import ArrayLike

from .._check import must_be
from ..operators import LinearOperator
from .claims import ROUNDING, claim, raise_faults
from .problems import dense, rows

__all__ = ["OPERATOR_CHECKS", "check_operator"]


def check_operator(A: LinearOperator, matrix: ArrayLike | None = None) -> None:
    """Hold an operator to its contract; AssertionError with every fault that was found.

    The dot test, symmetry, linearity, rows together as alone, no rows at all, ``to_dense``, ``diagonal``, ``is_psd``
    against ``eigvalsh``; and of the faces that it has: the factor in whole and in chunks, the samples' gradients, and
    the mean over minibatches.

    Parameters
    ----------
    A : LinearOperator
        Of a few hundred parameters at most.
    matrix : array or tensor of shape (p, p), default=None
        What it should be, from elsewhere; None holds its forms against each other alone.

    Raises
    ------
    AssertionError
        With one line for each check that failed.

    Examples
    --------
    >>> from skinvert.operators import LowRank
    >>> check_operator(LowRank(torch.tensor([[1.0, 2.0]])), [[1.0, 2.0], [2.0, 4.0]])
    """
    if not isinstance(A, LinearOperator):
        raise TypeError(must_be("A", "a LinearOperator", repr(A)))
    checks: list[Callable[[LinearOperator], None]] = list(OPERATOR_CHECKS)
    if matrix is not None:
        expected = np.asarray(matrix, dtype=np.float64)

        def check_is_its_matrix(A: LinearOperator) -> None:
            _near(dense(A), expected, A, "products are those of the matrix given")

        checks.append(check_is_its_matrix)
    raise_faults(A, type(A).__name__, checks)


def check_is_symmetric(A: LinearOperator) -> None:
    """Hold the dot test: uᵀ(Av) = (Au)ᵀv."""
    U, V = rows(3, A.size, A.dtype), rows(3, A.size, A.dtype, seed=1)
    left, right = U @ A.apply(V).mT, A.apply(U) @ V.mT
    _near(left, right, A, "uᵀ(Av) = (Au)ᵀv")


def check_is_linear(A: LinearOperator) -> None:
    """Hold linearity, rows together as alone, no rows as no rows, and the rows left as they were."""
    V = rows(4, A.size, A.dtype)
    before = V.clone()
    product = A.apply(V)
    claim(bool((V == before).all()), "the rows stay as they were", "other rows")
    claim(product.shape == V.shape and product.dtype == V.dtype, "products have the rows' shape and dtype", product)
    alone = torch.cat([A.apply(v[None]) for v in V])
    _near(product, alone, A, "rows together are as alone")
    _near(A.apply(2 * V[:1] - 3 * V[1:2]), 2 * product[:1] - 3 * product[1:2], A, "products are linear")
    claim(A.apply(V[:0]).shape == (0, A.size), "no rows give no rows", tuple(A.apply(V[:0]).shape))


def check_matrix_is_its_products(A: LinearOperator) -> None:
    """Hold ``to_dense`` against the products."""
    _near(A.to_dense(), dense(A), A, "to_dense is made of the products")


def check_diagonal_is_its_own(A: LinearOperator) -> None:
    """Hold ``diagonal`` against the products."""
    _near(A.diagonal(), np.diag(dense(A)), A, "diagonal is that of the matrix")


def check_is_psd_where_it_says_so(A: LinearOperator) -> None:
    """Hold ``is_psd`` against the eigenvalues."""
    values = np.linalg.eigvalsh(dense(A))
    least = float(values[0]) + 10 * ROUNDING[A.dtype] * float(np.abs(values).max())
    claim(least >= 0 or not A.is_psd, "is_psd is true of the eigenvalues", f"one of {values[0]:.3g}")


def check_copies_compute_alike(A: LinearOperator) -> None:
    """Hold a shallow copy to the same products, and repeated products to the same numbers."""
    V = rows(2, A.size, A.dtype)
    product = A.apply(V)
    _near(copy.copy(A).apply(V), product, A, "a copy's products are the same")
    _near(A.apply(V), product, A, "a second product is as the first")


def check_factor(A: LinearOperator) -> None:
    """Hold FᵀF + diag(penalty) against the matrix, and its shape and chunks against it."""
    if "factor" not in A.faces:
        return
    F = A.factor().double().cpu().numpy()
    claim(A.factor_shape == F.shape, "factor_shape is known before the factor", f"{A.factor_shape}, then {F.shape}")
    _near(F.T @ F + _penalty(A), dense(A), A, "FᵀF + diag(penalty) is the matrix")
    if "factor_chunks" in A.faces:
        _near(torch.cat(list(A.factor_chunks())), F, A, "the chunks make up the factor")


def check_gradient_rows(A: LinearOperator) -> None:
    """Hold Σ sᵢ gᵢgᵢᵀ + diag(penalty) against the matrix."""
    if "gradient_rows" not in A.faces:
        return
    A.gradient_rows()[0].zero_()
    # Whose rows these are: a method writes over them.
    G, shares = (part.double().cpu().numpy() for part in A.gradient_rows())
    claim(bool(np.isclose(shares.sum(), 1.0, atol=ROUNDING[A.dtype])), "shares add up to 1", shares.sum())
    _near(G.T @ (G * shares[:, None]) + _penalty(A), dense(A), A, "the gradients' outer products make up the matrix")


def check_minibatches(A: LinearOperator) -> None:
    """Hold the mean over minibatches of one sample, and over halves, against the matrix: they are unbiased."""
    if "minibatch" not in A.faces:
        return
    for parts in (torch.arange(A.n_samples).split(1), _halves(A.n_samples)):
        mean = sum(len(part) / A.n_samples * dense(A.minibatch(part)) for part in parts)
        _near(np.asarray(mean), dense(A), A, f"the mean over {len(parts)} minibatches is the matrix")


def check_sample_factors(A: LinearOperator) -> None:
    """Hold the chunks of the samples' own factors to one of each sample."""
    if "sample_factors" not in A.faces:
        return
    shapes = [tuple(chunk.shape) for chunk in A.sample_factors()]
    whole = sum(shape[0] for shape in shapes)
    expected = A.n_samples if "minibatch" in A.faces else whole
    claim(whole == expected, f"there are factors of {expected} samples", whole)
    claim(all(len(shape) == 3 and shape[2] == A.size for shape in shapes), "each is (m, r, p)", shapes)


OPERATOR_CHECKS: list[Callable[[LinearOperator], None]] = [
    check_is_symmetric,
    check_is_linear,
    check_matrix_is_its_products,
    check_diagonal_is_its_own,
    check_is_psd_where_it_says_so,
    check_copies_compute_alike,
    check_factor,
    check_gradient_rows,
    check_minibatches,
    check_sample_factors,
]


def _halves(n: int) -> list[torch.Tensor]:
    """Return 0, …, n − 1 in two parts, or one where n = 1."""
    return [part for part in torch.arange(n).tensor_split(2) if len(part)]


def _penalty(A: LinearOperator) -> np.ndarray:
    return np.zeros(A.shape) if A.penalty is None else np.diag(A.penalty.double().cpu().numpy())


def _near(
    received: torch.Tensor | np.ndarray, expected: torch.Tensor | np.ndarray, A: LinearOperator, what: str
) -> None:
    got, want = _float64(received), _float64(expected)
    claim(got.shape == want.shape, f"{what}, of shape {tuple(want.shape)}", tuple(got.shape))
    gap, size = float((got - want).norm()), float(want.norm())
    claim(gap <= ROUNDING[A.dtype] * (size or 1.0), what, f"a difference of {gap:.3g} in {size:.3g}")


def _float64(values: torch.Tensor | np.ndarray) -> torch.Tensor:
    if isinstance(values, torch.Tensor):
        return values.detach().double().cpu()
    # A copy: a view of a diagonal is read-only.
    return torch.from_numpy(np.array(values, dtype=np.float64))
