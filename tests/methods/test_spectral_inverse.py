"""One rule of zero, one of negative, for every method that knows a spectrum, against matrices of a known spectrum."""

import pickle
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.exceptions import ConvergenceWarning

from skinvert import HessianInverter, load
from skinvert.methods import CG, EKFAC, KFAC, Arnoldi, Diagonal, Direct, Nystroem
from skinvert.methods.null_space import FILTERS
from skinvert.methods.spectral_inverse import SpectralInverse
from skinvert.operators import (
    BlockBasis,
    Dense,
    Eigenvectors,
    KroneckerBasis,
    KroneckerBlock,
    KroneckerFactors,
    LowRank,
    Spectral,
    StandardBasis,
)
from skinvert.reasons import Reason

P = 10
METHODS = {
    "direct": Direct(),
    "arnoldi": Arnoldi(rank=P),
    "nystroem": Nystroem(rank=P),
    "kfac": KFAC(),
    "ekfac": EKFAC(),
    "diagonal": Diagonal(),
}
# Eigenvalues of G, of A and of the rest, and λ.
CASES = {
    "definite": ([1.0, 2.0], [0.5, 1.0, 3.0], [0.5, 1.0, 2.0, 3.0], 0.0),
    "definite with λ": ([1.0, 2.0], [0.5, 1.0, 3.0], [0.5, 1.0, 2.0, 3.0], 0.3),
    "singular": ([0.0, 2.0], [0.5, 1.0, 3.0], [0.0, 1.0, 2.0, 3.0], 0.0),
    "singular with λ": ([0.0, 2.0], [0.5, 1.0, 3.0], [0.0, 1.0, 2.0, 3.0], 0.01),
    "singular, rounded below": ([-1e-20, 2.0], [0.5, 1.0, 3.0], [-1e-20, 1.0, 2.0, 3.0], 0.0),
    "indefinite": ([1.0, 2.0], [0.5, 1.0, 3.0], [-0.7, 1.0, 2.0, 3.0], 0.1),
    "indefinite at λ = 0": ([1.0, 2.0], [0.5, 1.0, 3.0], [-0.7, 1.0, 2.0, 3.0], 0.0),
    "at a negative eigenvalue": ([1.0, 2.0], [0.5, 1.0, 3.0], [-0.7, 1.0, 2.0, 3.0], 0.7),
    "zero": ([0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], 0.0),
}


class Layered(Dense):
    """A layer of G ⊗ A and a diagonal: what every method here can invert exactly."""

    def __init__(self, matrix, block, rest, diagonal):
        super().__init__(matrix)
        self.block, self.rest, self.rest_diagonal = block, rest, diagonal

    def kronecker_factors(self, approx="expand", unsupported="error", verbose=0):
        return KroneckerFactors((self.block,), self.rest, self.rest_diagonal, self.refit)

    def refit(self, bases):
        Q = torch.kron(bases[0].left.contiguous(), bases[0].right.contiguous())
        index = self.block.index.reshape(-1)
        return [(Q.mT @ self.matrix[index][:, index] @ Q).diagonal().reshape(2, 3)]


def orthogonal(size, seed, aligned):
    return np.eye(size) if aligned else np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]


def problem(case, dtype, aligned):
    """Return the operator, and the oracle's eigenvectors (columns) and eigenvalues in float64."""
    g, a, rest, shift = CASES[case]
    U, V = orthogonal(2, 0, aligned), orthogonal(3, 1, aligned)
    order = np.random.default_rng(2).permutation(P)
    Q = np.zeros((P, P))
    Q[order] = scipy.linalg.block_diag(np.kron(U, V), np.eye(4))
    theta = np.concatenate([np.outer(g, a).ravel(), rest])

    def tensor(array):
        return torch.from_numpy(np.array(array)).to(dtype)

    place = torch.from_numpy(order)
    block = KroneckerBlock("fc", place[:6].reshape(2, 3), tensor(U * g @ U.T), tensor(V * a @ V.T), None)
    return Layered(tensor(Q * theta @ Q.T), block, place[6:], tensor(rest)), Q, theta, shift


def told(call):
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        return call(), [(entry.category, str(entry.message)) for entry in record]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("name", "aligned"),
    [(name, aligned) for name in METHODS for aligned in (True, False) if aligned or name != "diagonal"],
)
def test_one_rule_for_all(name, aligned, case, dtype):
    A, Q, theta, shift = problem(case, dtype, aligned)
    # What is meant to be zero is so by construction, not by a cut.
    t = np.where(np.abs(theta) < 1e-15, 0.0, theta) + shift
    inverse, lost = np.divide(1.0, t, out=np.zeros(P), where=np.abs(t) > 1e-15), np.abs(t) < 1e-15
    negative = int((t < -1e-15).sum())
    if name == "nystroem" and theta.min() < -1e-15:
        with pytest.raises(ValueError, match="positive semi-definite"):
            METHODS[name].invert(A, shift)
        return

    found, said = told(lambda: METHODS[name].invert(A, shift).judged_by(A))
    assert [category for category, _ in said] == [scipy.linalg.LinAlgWarning] * (negative > 0)
    if negative:
        assert "is indefinite: its smallest eigenvalue is -" in said[0][1] and f"{negative} of {P} are" in said[0][1]
        assert f"{t.min():.2g}"[:4] in said[0][1]
    assert found.positive_definite == (negative == 0 and not lost.any())

    # Rows inside the range, and rows outside it.
    b = np.random.default_rng(3).standard_normal((6, P))
    b[:3] = b[:3] @ Q * ~lost @ Q.T
    B, tolerance = torch.from_numpy(b).to(dtype), 1e-2 if dtype == torch.float32 else 1e-8
    outside = np.array([False] * 3 + [bool(lost.any())] * 3)
    moved, _ = told(lambda: found.at(1.0).at(shift))
    for way in (found, moved):
        (x, info), said = told(lambda way=way: way.solve(B))
        np.testing.assert_allclose(x.double().numpy(), (b @ Q * inverse) @ Q.T, atol=tolerance)
        assert info["converged"].tolist() == (~outside).tolist()
        assert (info["reason"] == Reason.SINGULAR).tolist() == outside.tolist()
        assert [category for category, _ in said] == [scipy.linalg.LinAlgWarning] * bool(lost.any())
        if lost.any():
            assert f"is singular (rank {P - lost.sum()} of {P}) and 3 of 6" in said[0][1]
            assert "Try" in said[0][1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "aligned"), [(name, name == "diagonal") for name in METHODS])
def test_one_path_for_all(name, aligned, dtype):
    A, Q, theta, _ = problem("singular", dtype, aligned)
    inverse, b = METHODS[name].invert(A, 0.5), np.random.default_rng(3).standard_normal((4, P))
    B, shifts = torch.from_numpy(b).to(dtype), [1e-2, 0.5, 30.0]
    for shift, (x, info) in zip(shifts, inverse.solve_path(B, shifts), strict=True):
        expected = (b @ Q / (theta + shift)) @ Q.T
        np.testing.assert_allclose(x.double().numpy(), expected, atol=(1e-3 if dtype == torch.float32 else 1e-8) * 10)
        assert bool(info["converged"].all()) or inverse.approximate
        assert torch.equal(x, inverse.at(shift).solve(B).x)
        assert torch.equal(x, inverse.at(shift).apply(B))


# -- filters -----------------------------------------------------------------------------------------------------------


def test_damped_inverts_all_and_refuses_zero():
    basis, theta = StandardBasis(3), torch.tensor([2.0, 1e-9, 0.0], dtype=torch.float64)
    inverse = SpectralInverse(Eigenvectors(torch.eye(3).double()), theta, 1e-30, name="one", filter="damped")
    np.testing.assert_allclose(inverse.solve(torch.ones(1, 3).double()).x, [[0.5, 1e9, 1e30]])
    with pytest.raises(ValueError, match="other than 0. Got 1 that are 0 instead. Try another"):
        SpectralInverse(basis, theta, 0.0, name="one", filter="damped")
    # What counts as zero beside the largest is not left out.
    negative = torch.tensor([2.0, -1e-16], dtype=torch.float64)
    inverse = SpectralInverse(Eigenvectors(torch.eye(2).double()), negative, 0.0, name="one", filter="damped")
    np.testing.assert_allclose(inverse.inverted.inverse, [0.5, -1e16])
    assert not inverse.inverted.lost.any()


def test_another_filter_is_one_function_and_one_line(monkeypatch):
    monkeypatch.setitem(FILTERS, "squared", lambda values, zero: torch.where(zero, 0.0, values**-2))
    inverse = SpectralInverse(StandardBasis(2), torch.tensor([2.0, 0.0]), 0.0, name="one", filter="squared")
    assert inverse.apply(torch.tensor([[4.0, 0.0]])).tolist() == [[1.0, 0.0]]
    assert inverse.at(2.0).apply(torch.tensor([[32.0, 8.0]])).tolist() == [[2.0, 2.0]]
    with pytest.raises(ValueError, match="filter must be one of 'pseudo_inverse', 'damped', 'squared'"):
        SpectralInverse(StandardBasis(2), torch.ones(2), 0.0, name="one", filter="none")


# -- what is kept, and what is made anew -------------------------------------------------------------------------------


def test_a_cholesky_factor_remembers_the_eigenvectors_and_saves_none(monkeypatch):
    calls, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: calls.append(1) or eigh(matrix))
    A, Q, theta, _ = problem("definite", torch.float64, False)
    inverse, b = Direct().invert(A, 0.5), np.ones((1, P))
    before = len(pickle.dumps(inverse))
    assert inverse.all_eigenvalues is None and not calls
    for shift in (0.1, 2.0):
        x = inverse.at(shift).solve(torch.from_numpy(b)).x
        np.testing.assert_allclose(x, (b @ Q / (theta + shift)) @ Q.T, rtol=1e-10)
    inverse.path(torch.from_numpy(b), [0.1, 0.2])
    np.testing.assert_allclose(inverse.all_eigenvalues, np.sort(theta), rtol=1e-12)
    assert len(calls) == 1
    assert len(pickle.dumps(inverse)) <= before + 100


@pytest.mark.parametrize("name", METHODS)
def test_a_pickle_solves_the_same_to_the_last_bit(name):
    A, _, _, _ = problem("singular", torch.float32, name == "diagonal")
    inverse, B = METHODS[name].invert(A, 0.0), A.apply(torch.randn(3, P))
    loaded = pickle.loads(pickle.dumps(inverse))
    assert torch.equal(loaded.solve(B).x, inverse.solve(B).x)
    assert torch.equal(loaded.at(0.3).solve(B).x, inverse.at(0.3).solve(B).x)
    assert (loaded.positive_definite, loaded.approximate) == (inverse.positive_definite, inverse.approximate)


def test_a_loaded_inverse_still_says_what_it_does_not_solve(tmp_path):
    X = np.random.default_rng(0).standard_normal((3, 9)).astype(np.float32)
    inverter = HessianInverter(Arnoldi(rank=9), 1e-8, dtype=torch.float32).fit(X)
    inverter.save(tmp_path / "file")
    with pytest.warns(ConvergenceWarning, match="arnoldi did not converge") as said:
        inverter.inverse_.judged_by(None).solve(torch.ones(1, 9))
    with pytest.warns(ConvergenceWarning, match="arnoldi did not converge") as again:
        load(tmp_path / "file").inverse_.solve(torch.ones(1, 9))
    assert str(said[0].message) == str(again[0].message)


# -- bases, and preconditioners ----------------------------------------------------------------------------------------


def bases():
    """Return each kind of basis with its columns (p, r)."""
    U, V, W = (np.linalg.qr(np.random.default_rng(i).standard_normal((n, n)))[0] for i, n in enumerate((2, 3, 4)))
    tensor = torch.from_numpy
    order = np.random.default_rng(4).permutation(13)
    blocks = np.zeros((13, 12))
    blocks[order] = scipy.linalg.block_diag(np.kron(U, V), np.eye(3), W[:, :3])
    parts = [KroneckerBasis(tensor(U), tensor(V), 3), StandardBasis(3), Eigenvectors(tensor(W[:, :3].T.copy()))]
    groups = scipy.linalg.block_diag(np.kron(U, W), np.kron(U.T, W))
    places = [tensor(order[:6].reshape(2, 3)), tensor(order[6:9]), tensor(order[9:])]
    return {
        "dense": (Eigenvectors(tensor(W).mT), W),
        "thin": (Eigenvectors(tensor(W[:, :2].T.copy())), W[:, :2]),
        "kronecker": (KroneckerBasis(tensor(W), tensor(V), 3), np.kron(W, V)),
        "kronecker, diagonal": (KroneckerBasis(tensor(U), None, 5), np.kron(U, np.eye(5))),
        "kronecker, groups": (KroneckerBasis(tensor(np.stack([U, U.T])), tensor(np.stack([W, W])), 4), groups),
        "axes": (StandardBasis(4), np.eye(4)),
        "blocks": (BlockBasis(parts, places), blocks),
    }


@pytest.mark.parametrize("name", bases())
def test_a_basis_is_its_columns(name):
    basis, Q = bases()[name]
    p, r = Q.shape
    assert (basis.size, basis.rank) == (p, r)
    v, c, theta = (np.random.default_rng(0).standard_normal(shape) for shape in ((3, p), (3, r), r))
    np.testing.assert_allclose(basis.coordinates(torch.from_numpy(v)), v @ Q, atol=1e-12)
    np.testing.assert_allclose(basis.combination(torch.from_numpy(c)), c @ Q.T, atol=1e-12)
    assert basis.coordinates(torch.empty(0, p).double()).shape == (0, r)
    rest = 0.5 if r < p else 0.0
    matrix = (Q * theta) @ Q.T + rest * (np.eye(p) - Q @ Q.T)
    A = Spectral(basis, torch.from_numpy(theta), 0.5)
    np.testing.assert_allclose(A.to_dense(), matrix, atol=1e-12)
    np.testing.assert_allclose(A.diagonal(), np.diag(matrix), atol=1e-12)
    assert A.is_psd == bool((theta >= 0).all())
    assert pickle.loads(pickle.dumps(A)).apply(torch.from_numpy(v)).equal(A.apply(torch.from_numpy(v)))


@pytest.mark.parametrize("name", ["kronecker", "kronecker, groups", "kronecker blocks", "dense"])
def test_rows_a_few_at_a_time(name, monkeypatch):
    from skinvert.operators import bases as module

    if name == "kronecker blocks":
        (one, _), (other, _) = bases()["kronecker"], bases()["kronecker, diagonal"]
        order = torch.from_numpy(np.random.default_rng(1).permutation(one.size + other.size + 2))
        parts = [one, other, StandardBasis(2)]
        basis = BlockBasis(parts, order.split([part.size for part in parts]))
    else:
        basis = bases()[name][0]
    monkeypatch.setattr(module, "AT_ONCE", 1)
    assert bases()["blocks"][0].rows_at_once is None
    assert basis.rows_at_once == (None if name == "dense" else 8)
    theta = torch.arange(1.0, basis.rank + 1, dtype=torch.float64)
    inverse = SpectralInverse(basis, theta, 0.5, name="any")
    B = torch.from_numpy(np.random.default_rng(2).standard_normal((21, basis.size)))
    X = inverse.solve(B).x
    torch.testing.assert_close(Spectral(basis, theta + 0.5).apply(X), B, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(torch.cat([inverse.solve(b[None]).x for b in B]), X, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["thin", "blocks"])
def test_a_thin_basis_has_a_complement(name):
    basis, Q = bases()[name]
    p, r = Q.shape
    theta, b = np.arange(1.0, r + 1), np.random.default_rng(0).standard_normal((3, p))
    A = (Q * theta) @ Q.T + 0.25 * (np.eye(p) - Q @ Q.T)
    inverse = SpectralInverse(basis, torch.from_numpy(theta), 0.5, name="one", complement=0.25)
    np.testing.assert_allclose(inverse.solve(torch.from_numpy(b)).x, np.linalg.solve(A + 0.5 * np.eye(p), b.T).T)
    dropped = SpectralInverse(basis, torch.from_numpy(theta), 0.5, name="one")
    np.testing.assert_allclose(dropped.apply(torch.from_numpy(b)), (b @ Q / (theta + 0.5)) @ Q.T)
    with pytest.raises(ValueError, match=f"> 0.*The {p - r} eigenvalues that are not computed count as 0"):
        SpectralInverse(basis, torch.from_numpy(theta), 0.0, name="one", complement=0.0)


@pytest.mark.parametrize("name", ["direct", "arnoldi", "nystroem", "kfac", "ekfac", "diagonal"])
def test_a_preconditioner_puts_back_what_the_pseudo_inverse_leaves_out(name):
    A, Q, theta, _ = problem("singular", torch.float64, name == "diagonal")
    inverse = METHODS[name].invert(A, 0.0)
    assert inverse.preconditions and not inverse.positive_definite
    M = inverse.precondition(torch.eye(P).double()).numpy()
    inverted = np.divide(1.0, theta, out=np.zeros(P), where=theta > 0)
    np.testing.assert_allclose(M, (Q * (inverted + (theta == 0))) @ Q.T, atol=1e-8)
    # Nyström alone wants λ > 0 where it sketches.
    if name != "nystroem":
        b = np.random.default_rng(0).standard_normal((2, P)) * (theta > 0) @ Q.T
        x, info = CG(preconditioner=METHODS[name]).invert(A, 0.0).solve(torch.from_numpy(b))
        assert info["converged"].all() and info["n_iter"].max() <= 2
        np.testing.assert_allclose(x, (b @ Q * inverted) @ Q.T, atol=1e-8)


def test_the_diagonal_of_the_rest_counts_however_small():
    # As of `diagonal`: parameters of norms differ in scale by as many decades as the inputs do.
    A, _, _, _ = problem("definite", torch.float32, True)
    A.rest_diagonal = torch.tensor([1e6, 1.0, 1e-6, -1e-2])
    for method in (KFAC(), EKFAC()):
        inverse = method.invert(A, 0.0)
        np.testing.assert_allclose(inverse.inverted.inverse[6:], [1e-6, 1.0, 1e6, 0.0], rtol=1e-5)
        assert inverse.inverted.lost[6:].tolist() == [False, False, False, True]


def test_the_eigenpairs_of_a_factor_are_judged_by_the_factor():
    F = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inverse = Direct().invert(LowRank(F), 0.5).at(0.1)
    x, info = inverse.solve(torch.ones(1, 9).double())
    expected = np.linalg.solve((F.mT @ F).numpy() + 0.1 * np.eye(9), np.ones(9))
    np.testing.assert_allclose(x[0], expected, rtol=1e-10)
    assert not inverse.approximate and bool(info["converged"]) and inverse.all_eigenvalues is None
    assert "residual_of_approximation" not in info


@pytest.mark.parametrize("lam", [0.5, 0.0])
def test_rows_in_chunks_are_the_rows_at_once(lam, monkeypatch):
    module = "skinvert.methods.spectral_inverse"
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(9, 4, generator=generator, dtype=torch.float64))
    spectrum = torch.tensor([0.0, 1.0, 2.0, 5.0], dtype=torch.float64)
    inverse = SpectralInverse(Eigenvectors(basis.mT.contiguous()), spectrum, lam, name="thin")
    B = torch.randn(7, 9, generator=generator, dtype=torch.float64)
    found = []
    for step in (1, 100):
        monkeypatch.setattr(f"{module}.rows_within", lambda size, most=None, step=step: step)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found.append((inverse.solve(B), [str(one.message) for one in told]))
    (one, first), (all_, second) = found
    assert torch.allclose(one.x, all_.x, rtol=1e-12, atol=0)
    assert all(torch.equal(one.info[key], all_.info[key]) for key in ("converged", "reason"))
    # Once for all rows, not once a chunk.
    assert first == second
    assert len(first) == (lam == 0)
