"""arnoldi against truncated eigendecompositions made with numpy."""

import pickle

import numpy as np
import pytest
import torch
from scipy.linalg import LinAlgWarning
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV

from skinvert import HessianInverter
from skinvert.methods import Arnoldi
from skinvert.operators import Dense, LowRank

# What is tested here is what an approximate method is by definition; tests/methods/test_truth.py holds what it says.
pytestmark = pytest.mark.filterwarnings("ignore:.* is worse than x = 0:sklearn.exceptions.ConvergenceWarning")

SPECTRA = {
    "decaying": 10.0 * np.arange(1, 121) ** -1.5,
    "double": 10.0 * np.repeat(np.arange(1, 61) ** -1.5, 2),
    "tenfold": 10.0 * np.repeat(np.arange(1, 13) ** -1.5, 10),
    "flat": np.linspace(1.0, 2.0, 120),
    "both_signs": np.linspace(-5.0, 5.0, 120) ** 3,
}


def symmetric(eigenvalues, seed=0):
    vectors = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(eigenvalues),) * 2))[0]
    matrix = (vectors * eigenvalues) @ vectors.T
    return (matrix + matrix.T) / 2


def rows(k, p, seed=1):
    return np.random.default_rng(seed).standard_normal((k, p))


def operator(matrix, dtype=torch.float64):
    return Dense(torch.from_numpy(matrix).to(dtype))


def truncated(matrix, r, shift, b, complement="shift"):
    """The r eigenpairs of largest magnitude, and one value for the others."""
    values, vectors = np.linalg.eigh(matrix)
    kept = np.argsort(-np.abs(values))[:r]
    theta, U = values[kept], vectors[:, kept]
    x = (b @ U / (theta + shift)) @ U.T
    if complement == "drop":
        return x
    tau = 0.0 if complement == "shift" else (np.trace(matrix) - theta.sum()) / (len(matrix) - r)
    return x + (b - b @ U @ U.T) / (tau + shift)


def error(x, matrix, shift, b):
    exact = np.linalg.solve(matrix + shift * np.eye(len(matrix)), b.T).T
    return np.linalg.norm(x - exact) / np.linalg.norm(exact)


class Counted(Dense):
    products = 0

    def apply(self, V):
        self.products += len(V)
        return super().apply(V)

    def to_dense(self, verbose=0):
        raise AssertionError("a Krylov method needs no dense matrix")


@pytest.mark.filterwarnings("ignore:A = H:scipy.linalg.LinAlgWarning")
@pytest.mark.parametrize("complement", ["shift", "trace", "drop"])
@pytest.mark.parametrize("name", SPECTRA)
def test_error_is_that_of_the_best_truncation(name, complement):
    matrix, shift, b = symmetric(SPECTRA[name]), 0.1, rows(7, 120)
    expected = error(truncated(matrix, 15, shift, b, complement), matrix, shift, b)
    A = Counted(torch.from_numpy(matrix))
    inverse = Arnoldi(rank=15, complement=complement).invert(A, shift)
    received = error(inverse.solve(torch.from_numpy(b)).x.numpy(), matrix, shift, b)
    assert received == pytest.approx(expected, rel=0.1)
    U = inverse.basis.rows.numpy()
    assert np.abs(U @ U.T - np.eye(15)).max() <= 1e-13
    # The tolerance of the pairs, and the rounding of a product.
    values = inverse.eigenvalues.numpy()
    assert (np.linalg.norm(U @ matrix - values[:, None] * U, axis=1) <= 2e-8 * np.abs(values)).all()
    assert A.products < 120 * 6


@pytest.mark.parametrize("complement", ["shift", "trace", "drop"])
@pytest.mark.parametrize("gap", [1e-2, 1e-6])
def test_is_the_truncation_where_there_is_a_gap(complement, gap):
    matrix = symmetric(np.concatenate([np.linspace(1, 3, 12), gap * np.linspace(0, 1, 88)]))
    b = rows(7, 100)
    expected = truncated(matrix, 12, 0.01, b, complement)
    inverse = Arnoldi(rank=12, complement=complement).invert(Counted(torch.from_numpy(matrix)), 0.01)
    received = inverse.solve(torch.from_numpy(b)).x.numpy()
    assert np.abs(received - expected).max() <= 1e-8 * np.abs(expected).max()


@pytest.mark.parametrize("copies", [2, 3, 10, 17])
def test_finds_every_copy_of_a_repeated_eigenvalue(copies):
    # More copies than the block has rows: a Krylov space of it never holds them all.
    eigenvalues = np.repeat([5.0, 3.0, 2.0, 1.0], copies)
    eigenvalues = np.concatenate([eigenvalues, np.linspace(0, 0.5, 200 - len(eigenvalues))])
    rank = 2 * copies + 1
    inverse = Arnoldi(rank=rank).invert(Counted(torch.from_numpy(symmetric(eigenvalues))), 0.1)
    expected = np.sort(np.sort(eigenvalues)[::-1][:rank])
    np.testing.assert_allclose(inverse.eigenvalues.numpy(), expected, rtol=1e-10)


def test_copies_that_converge_unseen_are_found():
    # Well apart: the first eight of a Krylov space of four rows converge at once, before rounding brings in the other
    # copies, and they are not the largest eight.
    eigenvalues = np.concatenate([np.full(10, 5.0), [4.0, 3.5, 3.0, 2.5], np.linspace(0, 1e-3, 86)])
    A = Counted(torch.from_numpy(symmetric(eigenvalues)))
    values = Arnoldi(rank=8, krylov_dimension=12, tol=1e-2).invert(A, 0.1).eigenvalues
    np.testing.assert_allclose(values.numpy(), np.full(8, 5.0), rtol=1e-3)


def test_a_space_that_closes_goes_on():
    # Two distinct eigenvalues: a block of rows is exhausted after two products.
    matrix = symmetric(np.repeat([2.0, 1.0], [30, 90]))
    inverse = Arnoldi(rank=40).invert(Counted(torch.from_numpy(matrix)), 0.1)
    expected = np.repeat([1.0, 2.0], [10, 30])
    np.testing.assert_allclose(inverse.eigenvalues.numpy(), expected, rtol=1e-10)


def two_outputs():
    net = torch.nn.Linear(4, 2).double()
    X, y = torch.from_numpy(rows(30, 4, 3)), torch.from_numpy(rows(30, 2, 4))
    Z = np.hstack([X.numpy(), np.ones((30, 1))])
    # mse divides by n c; parameters are the weight (2, 4) row-major, then the bias (2,).
    G = 2 * Z.T @ Z / (30 * 2)
    place = [0, 1, 2, 3, 8, 4, 5, 6, 7, 9]
    matrix = np.zeros((10, 10))
    matrix[np.ix_(place, place)] = np.kron(np.eye(2), G)
    return net, (X, y), matrix


@pytest.mark.parametrize("rank", [10, 500])
def test_rank_p_is_exact_where_every_eigenvalue_is_double(rank):
    net, data, matrix = two_outputs()
    b = rows(15, 10)
    inverter = HessianInverter(Arnoldi(rank=rank), 1e-3, loss="mse").fit(net, data)
    x, info = inverter.solve(b)
    assert error(x, matrix, 1e-3, b) <= 1e-10
    assert info["converged"].all()
    assert not info["approximate"]
    np.testing.assert_allclose(inverter.eigenvalues_, np.linalg.eigvalsh(matrix), rtol=1e-10)


def test_names_of_the_registry_and_the_functional_face():
    net, data, matrix = two_outputs()
    from skinvert import TorchTwiceDifferentiable, solve_hvp

    b = rows(3, 10)
    expected = truncated(matrix, 4, 0.1, b, "trace")
    model = TorchTwiceDifferentiable(net, "mse")
    received = solve_hvp("arnoldi", model, data, b, hessian_perturbation=0.1, rank=4, complement="trace").x
    np.testing.assert_allclose(received, expected, rtol=1e-8)
    by_name = HessianInverter("arnoldi", 0.1, loss="mse").fit(net, data).transform(b)
    assert error(by_name, matrix, 0.1, b) <= 1e-10


@pytest.mark.parametrize("p", [1, 2, 40, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sizes_and_dtypes(p, dtype):
    matrix = symmetric(1 / np.arange(1.0, p + 1))
    inverse = Arnoldi(rank=5).invert(operator(matrix, dtype), 0.1)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    for k in (1, 7, p + 5):
        b = rows(k, p)
        expected = truncated(matrix, min(5, p), 0.1, b)
        x, info = inverse.solve(torch.from_numpy(b).to(dtype))
        assert x.dtype == dtype
        assert np.abs(x.numpy() - expected).max() <= tolerance * np.abs(expected).max()
        assert info["residual"].shape == info["converged"].shape == (k,)
        assert info["residual_of_approximation"].max() <= tolerance
        assert info["converged"].all() or p > 5
        assert info["approximate"] is (p > 5)


def test_operator_is_what_it_inverts():
    matrix, b = symmetric(SPECTRA["decaying"]), rows(3, 120)
    for complement in ("shift", "trace"):
        inverse = Arnoldi(rank=10, complement=complement).invert(operator(matrix), 0.01)
        x = inverse.solve(torch.from_numpy(b)).x
        np.testing.assert_allclose(inverse.operator.apply(x).numpy(), b, atol=1e-10)
        dense = inverse.operator.to_dense()
        np.testing.assert_allclose(inverse.operator.diagonal(), dense.diagonal(), atol=1e-12)
        assert inverse.positive_definite


def test_residual_is_small_inside_the_span():
    # 1/λ magnifies what rounding leaves of b across the eigenvectors, and θ magnifies it again in the residual.
    matrix = symmetric(np.concatenate([np.full(5, 1e4), np.zeros(95)]))
    inverse = Arnoldi(rank=5).invert(operator(matrix), 1e-6)
    b = torch.from_numpy(rows(3, 5)) @ inverse.basis.rows
    assert inverse.solve(b).info["residual"].max() <= 1e-10


def test_drop_reports_what_it_leaves_out():
    matrix, b = symmetric(SPECTRA["decaying"]), rows(3, 120)
    values, vectors = np.linalg.eigh(matrix)
    U = vectors[:, np.argsort(-values)[:10]]
    expected = np.linalg.norm(b - b @ U @ U.T, axis=1) / np.linalg.norm(b, axis=1)
    info = Arnoldi(rank=10, complement="drop").invert(operator(matrix), 0.0).solve(torch.from_numpy(b)).info
    np.testing.assert_allclose(info["residual_of_approximation"], expected, rtol=1e-8)
    assert not info["converged"].any()


def test_one_decomposition_serves_every_shift():
    matrix, b = symmetric(SPECTRA["decaying"]), torch.from_numpy(rows(3, 120))
    A = Counted(torch.from_numpy(matrix))
    inverse = Arnoldi(rank=10).invert(A, 0.1).unjudged()
    before, shifts = A.products, [1e-3, 0.5, 0.1]
    path = inverse.path(b, shifts)
    for shift, x in zip(shifts, path, strict=True):
        torch.testing.assert_close(inverse.at(shift).solve(b).x, x, rtol=1e-12, atol=0)
        expected = truncated(matrix, 10, shift, b.numpy())
        np.testing.assert_allclose(x.numpy(), expected, atol=1e-8 * np.abs(expected).max())
    assert A.products == before


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_takes_a_decomposition(kind):
    matrix, b = symmetric(SPECTRA["both_signs"]), rows(3, 120)
    values, vectors = np.linalg.eigh(matrix)
    order = np.argsort(-np.abs(values))[:20]
    given = (kind(values[order]), kind(np.ascontiguousarray(vectors.T[order])))
    A = Counted(torch.from_numpy(matrix))
    with pytest.warns(LinAlgWarning, match="indefinite"):
        inverse = clone(Arnoldi(rank=8, decomposition=given)).invert(A, 0.1)
    expected = truncated(matrix, 8, 0.1, b)
    np.testing.assert_allclose(inverse.apply(torch.from_numpy(b)), expected, rtol=1e-10)
    assert A.products == 0


@pytest.mark.parametrize(
    ("given", "kind", "match"),
    [
        ((np.ones(2), np.eye(3)[:1]), ValueError, "Eigenvectors are rows"),
        ((np.ones(2), np.ones((2, 3))), ValueError, "orthonormal"),
        ((np.array([np.nan]), np.eye(3)[:1]), ValueError, "finite"),
        (3, TypeError, "a pair of"),
    ],
)
def test_refuses_a_wrong_decomposition(given, kind, match):
    with pytest.raises(kind, match=match):
        Arnoldi(decomposition=given).invert(operator(np.eye(3)), 0.1)


@pytest.mark.parametrize("settings", [{"rank": 0}, {"krylov_dimension": 5}, {"complement": "mean"}, {"tol": -1.0}])
def test_refuses_wrong_settings(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        Arnoldi(**{"rank": 5, **settings}).invert(operator(np.eye(80)), 0.1)


def test_needs_a_shift_for_the_complement():
    A = operator(symmetric(SPECTRA["decaying"]))
    with pytest.raises(ValueError, match="hessian_perturbation.*must be > 0"):
        Arnoldi(rank=5).invert(A, 0.0)
    inverse = Arnoldi(rank=5, complement="trace").invert(A, 0.0)
    assert inverse.positive_definite
    with pytest.raises(ValueError, match="hessian_perturbation"):
        Arnoldi(rank=5).invert(A, 0.1).at(0.0)


def test_singular_with_all_eigenvalues_is_the_pseudo_inverse():
    F = rows(3, 6)
    A = LowRank(torch.from_numpy(F))
    inverse = Arnoldi().invert(A, 0.0)
    inside = rows(4, 3, 5) @ F
    expected = inside @ np.linalg.pinv(F.T @ F)
    x, info = inverse.solve(torch.from_numpy(inside))
    np.testing.assert_allclose(x, expected, atol=1e-10)
    assert info["converged"].all()
    assert not inverse.positive_definite
    with pytest.warns(LinAlgWarning, match="singular"):
        info = inverse.solve(torch.from_numpy(rows(4, 6, 9))).info
    assert not info["converged"].any()


def test_warns_of_an_indefinite_curvature():
    matrix = symmetric(SPECTRA["both_signs"])
    with pytest.warns(LinAlgWarning, match="-125"):
        inverse = Arnoldi(rank=5).invert(operator(matrix), 0.1)
    assert inverse.positive_definite is False


def test_warns_where_it_does_not_converge():
    with pytest.warns(ConvergenceWarning, match="krylov_dimension"):
        Arnoldi(rank=20, krylov_dimension=24, maxiter=2).invert(operator(symmetric(SPECTRA["flat"])), 0.1)


def test_is_deterministic_and_survives_pickling():
    A, b = operator(symmetric(SPECTRA["flat"])), torch.from_numpy(rows(3, 120))
    inverse = Arnoldi(rank=10).invert(A, 0.1)
    other = Arnoldi(rank=10, random_state=0).invert(A, 0.1)
    assert torch.equal(inverse.basis.rows, other.basis.rows)
    loaded = pickle.loads(pickle.dumps(inverse))
    assert torch.equal(loaded.at(0.5).solve(b).x, inverse.at(0.5).solve(b).x)


def test_a_small_shift_is_no_rounding():
    # λ far below p·eps·θ: with θ ≥ 0 the sum θ + λ is as good as λ is.
    A = LowRank(torch.tensor([[1e4, 0.0, 0.0]]))
    x, info = Arnoldi().invert(A, 1e-6).solve(torch.tensor([[0.0, 1.0, 2.0]]))
    np.testing.assert_allclose(x, [[0.0, 1e6, 2e6]], rtol=1e-5)
    assert info["converged"].all()


def test_zero_curvature():
    x = Arnoldi(rank=2).invert(operator(np.zeros((90, 90))), 0.5).solve(torch.ones(1, 90).double()).x
    np.testing.assert_allclose(x, 2 * np.ones((1, 90)))


def test_refuses_nan():
    with pytest.raises(ValueError, match="finite"):
        Arnoldi(rank=2).invert(operator(np.full((90, 90), np.nan)), 0.5)


def test_rank_in_a_grid():
    X = rows(40, 20)
    search = GridSearchCV(HessianInverter(Arnoldi(), 0.1), {"method__rank": [2, 5, 20]}, cv=3).fit(X)
    assert search.best_estimator_.method_.rank in (2, 5, 20)


@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_eigenvalues_of_any_scale_have_the_digits_asked_for(size):
    values = size * 0.98 ** np.arange(400)
    A = operator(symmetric(values))
    inverse = Arnoldi(rank=5, krylov_dimension=20, tol=1e-9).invert(A, size)
    np.testing.assert_allclose(inverse.eigenvalues.numpy(), values[:5][::-1], rtol=1e-12)
    U = inverse.basis.rows
    errors = (A.apply(U) - inverse.eigenvalues[:, None] * U).norm(dim=1)
    assert bool((errors <= 2e-9 * inverse.eigenvalues).all())


def test_the_complement_has_the_mean_of_an_uneven_penalty():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    X, y = torch.randn(30, 4, dtype=torch.float64), torch.arange(30) % 3
    settings = {"curvature": "ggn", "loss": "cross_entropy", "weight_decay": {"*weight": 0.3}}
    fitted = HessianInverter(Arnoldi(rank=4), 0.1, **settings).fit(net, (X, y))
    H = fitted.curvature_.to_dense().numpy()
    R = np.concatenate([np.full(t.numel(), 0.3 if t.ndim == 2 else 0.0) for t in net.parameters()])
    values, vectors = np.linalg.eigh(H)
    rest = vectors[:, :-4]
    tau = np.trace(rest.T @ (R[:, None] * rest)) / rest.shape[1]
    stands = (vectors[:, -4:] * values[-4:]) @ vectors[:, -4:].T + tau * rest @ rest.T
    b = np.random.default_rng(0).standard_normal((3, len(H)))
    expected = np.linalg.solve(stands + 0.1 * np.eye(len(H)), b.T).T
    np.testing.assert_allclose(fitted.transform(b), expected, rtol=1e-6)
