"""Extreme eigenvalues, the Lanczos density and ``HessianInverter.spectrum`` against dense eigenvalues."""

import pickle

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

from skinvert import HessianInverter
from skinvert.methods import CG, MINRES, Arnoldi
from skinvert.operators import Dense, DiagonalMatrix
from skinvert.solvers.extremes import extreme_eigenvalues, lanczos_density, smallest_eigenvalue

SPECTRA = {
    "decaying": 10.0 * np.arange(1, 301) ** -1.5,
    "both_signs": np.linspace(-2, 5, 300) ** 3,
    "repeated": np.repeat([-1.0, 0.0, 4.0], 100),
    "flat": np.linspace(1, 2, 300),
    "zero": np.zeros(300),
}


def rotated(eigenvalues, dtype=torch.float64):
    p = len(eigenvalues)
    vectors = np.linalg.qr(np.random.default_rng(0).standard_normal((p, p)))[0]
    matrix = (vectors * eigenvalues) @ vectors.T
    return torch.from_numpy((matrix + matrix.T) / 2).to(dtype)


class Counted(Dense):
    products = 0

    def apply(self, V):
        self.products += len(V)
        return super().apply(V)

    def to_dense(self, verbose=0):
        raise AssertionError("no dense matrix is wanted here")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SPECTRA)
def test_extremes_lie_within_their_errors(name, dtype):
    values = SPECTRA[name]
    A = Counted(rotated(values, dtype))
    (least, low), (most, high) = extreme_eigenvalues(A)
    size = max(np.abs(values).max(), 1e-300)
    rounding = 100 * torch.finfo(dtype).eps * size
    assert low <= 1e-4 * size
    assert high <= 1e-4 * size
    assert -rounding <= least - values.min() <= low + rounding
    assert -rounding <= values.max() - most <= high + rounding
    assert A.products <= 60 + 20 * 40


def test_error_is_the_residual_where_the_run_is_cut_short():
    # An unconverged Ritz value: its error bound is honest, and not small.
    values = np.linspace(0, 1, 2000) ** 0.5
    A = DiagonalMatrix(torch.from_numpy(values))
    (least, low), (most, high) = extreme_eigenvalues(A, tol=1e-12, maxiter=1)
    assert low > 1e-6
    assert np.abs(values - least).min() <= low
    assert np.abs(values - most).min() <= high


@pytest.mark.parametrize("p", [1, 2, 5])
def test_extremes_of_few_parameters(p):
    values = torch.linspace(-1, 3, p, dtype=torch.float64)
    (least, low), (most, high) = extreme_eigenvalues(DiagonalMatrix(values))
    assert (least, low, high) == (-1.0, 0.0, 0.0)
    assert most == values.max()


@pytest.mark.parametrize("name", SPECTRA)
def test_density_is_exact_where_the_run_is_complete(name):
    # A probe's quadrature of m steps is exact for vᵀ A^q v, q < 2m; at m = p for every function.
    values = SPECTRA[name]
    nodes, weights = lanczos_density(Dense(rotated(values)), n_probes=3, steps=300)
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-12)
    assert (weights >= 0).all()
    heavy = nodes[weights > 1e-8].numpy()
    assert np.abs(heavy[:, None] - values).min(1).max() <= 1e-8 * max(np.abs(values).max(), 1)


@pytest.mark.parametrize("function", [np.exp, np.square, lambda t: 1 / (t + 0.5)])
def test_density_gives_traces_to_their_standard_error(function):
    values = SPECTRA["decaying"] / 3
    # Many probes: the standard error of a mean of uᵀ f(A) u over unit vectors u, exactly.
    n_probes, f = 200, function(values)
    p = len(values)
    standard_error = np.sqrt(2 / (p + 2) * (np.mean(f**2) - np.mean(f) ** 2) / n_probes)
    nodes, weights = lanczos_density(Dense(rotated(values)), n_probes=n_probes, steps=30, random_state=1)
    received = float(np.sum(weights.numpy() * function(nodes.numpy())))
    assert abs(received - f.mean()) <= 4 * standard_error
    assert standard_error < 0.02 * f.mean() + 0.05


def test_density_draws_by_its_seed_and_in_chunks():
    A = Dense(rotated(SPECTRA["decaying"]))
    one, two, other = (lanczos_density(A, 4, 20, seed)[0] for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    from sklearn import config_context

    with config_context(working_memory=0.1):
        torch.testing.assert_close(lanczos_density(A, 4, 20, 1)[0], one)


@pytest.mark.parametrize("method", ["direct", "cg", Arnoldi(rank=5)])
def test_inverter_of_few_parameters(method):
    X = np.random.default_rng(0).standard_normal((50, 8))
    expected = np.linalg.eigvalsh(X.T @ X / 50)
    spectrum = HessianInverter(method, 0.3).fit(X).spectrum()
    assert spectrum.exact
    np.testing.assert_allclose(spectrum.eigenvalues, expected, rtol=1e-10)
    np.testing.assert_allclose(spectrum.weights, 1 / 8)
    assert spectrum.smallest == pytest.approx((expected[0], 0.0))
    assert spectrum.largest == pytest.approx((expected[-1], 0.0))


def test_inverter_of_few_rows():
    X = np.random.default_rng(0).standard_normal((20, 1500))
    spectrum = HessianInverter("cg", 0.3).fit(X).spectrum()
    expected = np.linalg.eigvalsh(X @ X.T / 20)
    assert spectrum.exact
    np.testing.assert_allclose(spectrum.eigenvalues[-20:], expected, rtol=1e-8)
    assert spectrum.eigenvalues[0] == 0.0
    assert spectrum.weights[0] == pytest.approx(1480 / 1500)
    assert spectrum.weights.sum() == pytest.approx(1.0)


def test_inverter_of_many_parameters():
    X = np.random.default_rng(0).standard_normal((1100, 1050)) * np.linspace(0.1, 2, 1050)
    expected = np.linalg.eigvalsh(X.T @ X / 1100)
    inverter = HessianInverter(CG(), 0.3, random_state=3).fit(X)
    spectrum = inverter.spectrum(n_probes=20, steps=40)
    assert not spectrum.exact
    for found, value in ((spectrum.smallest, expected[0]), (spectrum.largest, expected[-1])):
        assert abs(found[0] - value) <= found[1] + 1e-12
    f = np.log(expected + 0.3)
    standard_error = np.sqrt(2 / 1052 * np.var(f) / 20)
    received = np.sum(spectrum.weights * np.log(spectrum.eigenvalues + 0.3))
    assert abs(received - f.mean()) <= 4 * standard_error
    assert np.array_equal(spectrum.eigenvalues, inverter.spectrum(n_probes=20, steps=40).eigenvalues)


def test_inverter_that_was_loaded():
    X = np.random.default_rng(0).standard_normal((50, 8))
    full = HessianInverter(Arnoldi(), 0.3).fit(X)
    loaded = pickle.loads(pickle.dumps(full))
    np.testing.assert_allclose(loaded.spectrum().eigenvalues, full.spectrum().eigenvalues)
    part = pickle.loads(pickle.dumps(HessianInverter(Arnoldi(rank=2), 0.3).fit(X)))
    with pytest.raises(ValueError, match="call `fit` again"):
        part.spectrum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e12, 1e30])
def test_the_scale_of_A_divides_out(size, dtype):
    values = np.concatenate([[-0.3], np.logspace(-3, 1, 119)])
    A = Dense((rotated(values) * size).to(dtype))
    smallest, largest = extreme_eigenvalues(A)
    assert abs(smallest[0] / size + 0.3) <= 3e-3 and smallest[1] <= 2e-3 * size
    assert abs(largest[0] / size - 10) <= 1e-3
    value, error = smallest_eigenvalue(A)
    assert abs(value / size + 0.3) <= 1e-2 and error <= 0.1 * size
    nodes, weights = lanczos_density(A, 20, 30)
    own_nodes, own_weights = lanczos_density(Dense(rotated(values).to(dtype)), 20, 30)
    for moment in (1, 2):
        own = float((own_nodes**moment * own_weights).sum())
        assert float(((nodes / size) ** moment * weights).sum()) == pytest.approx(own, rel=1e-4)


@pytest.mark.parametrize("size", [3, 40, 400])
def test_an_operator_that_is_zero_has_eigenvalue_zero(size):
    A = DiagonalMatrix(torch.zeros(size, dtype=torch.float64))
    assert smallest_eigenvalue(A) == (0.0, 0.0)
    assert extreme_eigenvalues(A) == ((0.0, 0.0), (0.0, 0.0))
    for method in (CG(), MINRES(), MINRES(block=True)):
        with pytest.warns(ConvergenceWarning):
            x, info = method.invert(A, 0.0).solve(torch.ones(2, size, dtype=torch.float64))
        assert not info["converged"].any() and torch.isfinite(x).all()
