"""log_det, draws and the spectrum of what is inverted, against dense float64 matrices."""

import numpy as np
import pytest
import torch
from facts import KINDS, ON_ROWS, SEMIDEFINITE, TIGHT
from oracles import oracle_matrix
from problems import problem

from skinvert import HessianInverter
from skinvert.methods import CG, Arnoldi, Direct

DECAY = 0.05
GAUSSIAN = [name for name, kind in KINDS.items() if kind.gaussian]
NONE = [name for name, kind in KINDS.items() if not kind.gaussian and kind.choose is CG.choose]
DTYPES = (torch.float64, torch.float32)


def fitted(method, shift=0.1, model="mlp", curvature="ggn", **settings):
    case = problem(model, "cross_entropy", DECAY, True)
    inverter = HessianInverter(method, shift, curvature=curvature, **case.settings(**settings))
    return inverter.fit(case.module, case.data, case.sample_weight)


def covariance_of(inverter):
    """Of the map from noise to draws, with the identity as noise."""
    inverse = inverter.inverse_
    S = inverse.root(torch.eye(inverse.noise_size, dtype=inverse.dtype)).double().numpy()
    return S.T @ S


def matrix_of(inverter):
    """What is inverted, by its own products."""
    return inverter.inverse_transform(torch.eye(inverter.n_features_in_, dtype=torch.float64)).numpy()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocks", [None, "layer"])
@pytest.mark.parametrize("name", GAUSSIAN)
def test_log_det_and_draws_are_of_what_is_inverted(name, blocks, dtype):
    inverter = fitted(KINDS[name](), curvature=SEMIDEFINITE[name], blocks=blocks, dtype=dtype)
    matrix, rtol = matrix_of(inverter), 1e-9 if dtype == torch.float64 else 1e-4
    assert inverter.log_det() == pytest.approx(np.linalg.slogdet(matrix)[1], rel=rtol)
    np.testing.assert_allclose(covariance_of(inverter), np.linalg.inv(matrix), atol=20 * rtol)


@pytest.mark.parametrize("name", [name for name in GAUSSIAN if SEMIDEFINITE[name] == "ggn" and name in ON_ROWS])
def test_an_exact_method_has_the_determinant_of_the_oracle(name):
    inverter = fitted(TIGHT[name])
    if inverter.inverse_.approximate:
        pytest.skip("it inverts another matrix")
    case = problem("mlp", "cross_entropy", DECAY, True)
    A = oracle_matrix(case, "ggn") + 0.1 * np.eye(case.p)
    assert inverter.log_det() == pytest.approx(np.linalg.slogdet(A)[1], rel=1e-10)
    np.testing.assert_allclose(covariance_of(inverter), np.linalg.inv(A), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("shift", [0.3, 1e-12])
def test_in_sample_space(shift):
    """A large λ has a Cholesky factor of n rows, a small one singular vectors."""
    X = np.random.default_rng(0).standard_normal((5, 20))
    inverter = HessianInverter("direct", shift).fit(X)
    assert (inverter.inverse_.cholesky is None) == (shift < 1e-6)
    _, sizes, V = np.linalg.svd(X)
    values = np.concatenate([sizes**2 / 5, np.zeros(15)]) + shift
    assert inverter.log_det() == pytest.approx(np.log(values).sum(), rel=1e-10)
    np.testing.assert_allclose(covariance_of(inverter), (V.T / values) @ V, atol=1e-9 / shift)


@pytest.mark.parametrize("name", NONE)
def test_a_method_without_a_root_names_those_with_one(name):
    inverter = fitted(KINDS[name](), 1.0, curvature=SEMIDEFINITE[name])
    for call in (inverter.log_det, inverter.sample):
        with pytest.raises(TypeError, match=rf"one of \['arnoldi', 'diagonal', 'direct'.*Got {KINDS[name].__name__}\("):
            call()


def test_blocks_without_a_root_have_none():
    with pytest.raises(TypeError, match="one of"):
        fitted(CG(), blocks="layer").log_det()


def test_what_is_not_definite_is_told():
    X = np.random.default_rng(0).standard_normal((3, 6))
    with pytest.raises(ValueError, match="3 eigenvalues that count as zero.*Try a larger"):
        HessianInverter("direct").fit(X).log_det()
    case = problem("mlp", "cross_entropy")
    with pytest.warns(match="indefinite"):
        inverter = HessianInverter("direct", 1e-3, **case.settings()).fit(case.module, case.data)
    for call in (inverter.log_det, inverter.sample):
        with pytest.raises(ValueError, match="Got a smallest eigenvalue of -"):
            call()
    with pytest.raises(ValueError, match="complement is left out"):
        fitted(Arnoldi(rank=4, complement="drop")).log_det()


@pytest.mark.parametrize("name", ["direct", "ekfac", "nystroem"])
def test_draws(name):
    inverter = fitted(KINDS[name](), dtype=torch.float32)
    draws = inverter.sample(20_000, random_state=0)
    assert draws.dtype == np.float32
    np.testing.assert_array_equal(draws[:7], inverter.sample(7, random_state=0))
    C = np.linalg.inv(matrix_of(inverter))
    gap = np.abs(draws.T.astype(np.float64) @ draws / len(draws) - C)
    # The standard error of an entry.
    assert (gap <= 5.5 * np.sqrt((C**2 + np.outer(*[np.diag(C)] * 2)) / len(draws))).all()
    assert np.abs(draws.mean(0) / np.sqrt(np.diag(C) / len(draws))).max() < 5
    with pytest.raises(ValueError, match="n_samples"):
        inverter.sample(0)


def test_draws_in_chunks_are_the_same(monkeypatch):
    inverter = fitted(Direct())
    whole = inverter.sample(10, random_state=0)
    monkeypatch.setattr("skinvert.posterior.rows_within", lambda size, most: 3)
    np.testing.assert_allclose(inverter.sample(10, random_state=0), whole, rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "blocks"),
    [(name, blocks) for name in GAUSSIAN for blocks in (None, "layer") if blocks or name != "direct"],
)
def test_the_spectrum_of_the_inverse_is_that_of_what_is_inverted(name, blocks):
    inverter = fitted(KINDS[name](), curvature=SEMIDEFINITE[name], blocks=blocks)
    found = inverter.spectrum(of="inverse")
    assert found.exact
    np.testing.assert_allclose(found.eigenvalues + 0.1, np.linalg.eigvalsh(matrix_of(inverter)), rtol=1e-8)
    logs = len(found.eigenvalues) * np.sum(found.weights * np.log(found.eigenvalues + 0.1))
    assert inverter.log_det() == pytest.approx(logs, rel=1e-9)


def test_the_spectrum_of_what_knows_none():
    with pytest.raises(TypeError, match='Try of="curvature"'):
        fitted(KINDS["harmonic_mean"](), curvature="empirical_fisher").spectrum(of="inverse")
    inverter = fitted(KINDS["kfac"]())
    assert abs(inverter.spectrum().largest[0] - inverter.spectrum(of="inverse").largest[0]) > 1e-3
    with pytest.raises(ValueError, match="of must be"):
        inverter.spectrum(of="both")
