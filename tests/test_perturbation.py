"""λ as a share of the mean eigenvalue of H: against traces of dense float64 matrices, wherever λ is a setting."""

import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, KFold
from torch import nn

from skinvert import (
    HessianInverter,
    HessianInverterCV,
    InverseHvpResult,
    InversionRegistry,
    SampledFisher,
    TorchTwiceDifferentiable,
    load,
    solve_hvp,
)
from skinvert.operators import Dense, DiagonalMatrix, LinearOperator, trace


def problem(hidden=5, dtype=torch.float64):
    generator = torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, 3)).to(dtype)
    return net, (torch.randn(30, 4, generator=generator, dtype=dtype), torch.arange(30) % 3)


def rows(n=40, p=6):
    return np.random.default_rng(0).standard_normal((n, p)) * np.arange(1, p + 1)


class Products(LinearOperator):
    """A matrix that is known by its products alone."""

    def __init__(self, matrix):
        super().__init__(len(matrix), matrix.dtype, matrix.device)
        self.matrix, self.n_products = matrix, 0

    def apply(self, V):
        self.n_products += len(V)
        return V @ self.matrix


def spectral(values):
    p = len(values)
    Q = torch.linalg.qr(torch.randn(p, p, generator=torch.manual_seed(0), dtype=torch.float64)).Q
    return (Q * values) @ Q.mT


SPECTRA = {
    "flat": torch.ones(1300, dtype=torch.float64),
    "power": torch.arange(1, 1301, dtype=torch.float64) ** -1.0,
    "low rank": torch.cat([torch.ones(9), torch.zeros(1291)]).double(),
    # Eigenvalues beyond the sketch, of which the rest of the trace is made.
    "many outliers": torch.cat([torch.full((100,), 50.0), torch.full((1200,), 1e-3)]).double(),
    "indefinite": torch.cat([torch.arange(1, 1201) ** -0.5, -0.1 * torch.arange(1, 101) ** -1.0]).double(),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_estimated_trace_is_within_a_per_cent(name, dtype):
    matrix = spectral(SPECTRA[name])
    for seed in range(5):
        A = Products(matrix.to(dtype))
        assert trace(A, seed) == pytest.approx(float(SPECTRA[name].sum()), rel=0.012)
        assert A.n_products < 800


def test_its_seed_decides_it():
    A = Products(spectral(SPECTRA["power"]))
    a, b, c = (trace(A, seed) for seed in (0, 0, 1))
    assert a == b
    assert a != c


def test_a_trace_of_both_signs_is_refused():
    values = torch.cat([torch.ones(650), -torch.ones(650)]).double()
    with pytest.raises(ValueError, match="Its eigenvalues cancel"):
        trace(Products(spectral(values)))


def test_few_parameters_are_exact():
    matrix = spectral(SPECTRA["power"][:300])
    assert trace(Products(matrix)) == pytest.approx(float(matrix.trace()), rel=1e-12)


@pytest.mark.parametrize("kind", [Dense, lambda A: DiagonalMatrix(A.diagonal())])
def test_an_operator_that_has_its_diagonal_is_exact(kind):
    matrix = spectral(SPECTRA["power"])
    assert trace(kind(matrix)) == pytest.approx(float(matrix.trace()), rel=1e-12)


CURVATURES = ["hessian", "ggn", "fisher", "empirical_fisher", "sampled_fisher", "sampled_ggn", SampledFisher(3)]


@pytest.mark.parametrize("hidden", [5, 150])
@pytest.mark.parametrize("curvature", CURVATURES, ids=str)
@pytest.mark.parametrize("weight_decay", [0.0, {"0.weight": 0.3}], ids=str)
def test_every_curvature(curvature, hidden, weight_decay):
    # Of 150 hidden units p = 1,203: beyond what products with the identity serve.
    net, data = problem(hidden)
    settings = {"loss": "cross_entropy", "curvature": curvature, "weight_decay": weight_decay, "random_state": 0}
    inverter = HessianInverter("cg", "1e-1 rel", **settings).fit(net, data)
    H = inverter.curvature_.to_dense()
    exact = curvature != "hessian" or hidden == 5
    expected = 0.1 * float(H.trace()) / len(H)
    assert inverter.hessian_perturbation_ == pytest.approx(expected, rel=1e-10 if exact else 0.01)
    assert inverter.inverse_.hessian_perturbation == inverter.hessian_perturbation_


def test_a_factor_of_many_numbers_is_not_made(monkeypatch):
    monkeypatch.setattr("skinvert.operators.trace_estimate.MOST_NUMBERS", 1000)
    net, data = problem(150)
    inverter = HessianInverter("cg", "0.5 rel", loss="cross_entropy", curvature="ggn").fit(net, data)
    expected = 0.5 * float(inverter.curvature_.to_dense().trace()) / 1203
    assert inverter.hessian_perturbation_ != pytest.approx(expected, rel=1e-10)
    assert inverter.hessian_perturbation_ == pytest.approx(expected, rel=0.01)


def test_the_trace_of_a_module_is_that_of_its_dense_hessian():
    net, (X, y) = problem()
    flat = torch.cat([tensor.detach().flatten() for tensor in net.parameters()])

    def loss(theta):
        parts = torch.split(theta, [tensor.numel() for tensor in net.parameters()])
        named = {name: part.view_as(t) for (name, t), part in zip(net.named_parameters(), parts, strict=True)}
        return nn.functional.cross_entropy(torch.func.functional_call(net, named, (X,)), y)

    H = torch.autograd.functional.hessian(loss, flat) + 0.2 * torch.eye(len(flat), dtype=torch.float64)
    inverter = HessianInverter("direct", "2 rel", loss="cross_entropy", weight_decay=0.2).fit(net, (X, y))
    assert inverter.hessian_perturbation_ == pytest.approx(2 * float(H.trace()) / len(H), rel=1e-10)
    b = torch.ones(1, len(flat), dtype=torch.float64)
    expected = torch.linalg.solve(H + inverter.hessian_perturbation_ * torch.eye(len(H), dtype=torch.float64), b.mT).mT
    torch.testing.assert_close(inverter.transform(b), expected)


def test_plain_rows():
    X = rows()
    inverter = HessianInverter("direct", "1e-2 rel").fit(X)
    assert inverter.hessian_perturbation_ == pytest.approx(1e-2 * (X**2).sum() / X.size, rel=1e-12)
    assert inverter.hessian_perturbation == "1e-2 rel"


@pytest.mark.parametrize("method", ["direct", "cg", "arnoldi", "nystroem", "kfac", "ekfac", "harmonic_mean", "lissa"])
def test_one_setting_is_one_lambda_for_every_method_of_a_curvature(method):
    net, data = problem()
    inverter = HessianInverter(method, "1 rel", loss="cross_entropy", curvature="empirical_fisher", random_state=0)
    expected = HessianInverter("direct", "1 rel", loss="cross_entropy", curvature="empirical_fisher").fit(net, data)
    assert inverter.fit(net, data).hessian_perturbation_ == expected.hessian_perturbation_


def test_blocks_have_the_lambda_of_the_whole():
    net, data = problem()
    whole, parts = (
        HessianInverter("direct", "1 rel", loss="cross_entropy", curvature="ggn", blocks=blocks).fit(net, data)
        for blocks in (None, "layer")
    )
    assert parts.hessian_perturbation_ == whole.hessian_perturbation_


def test_a_registered_function_is_given_the_number():
    net, data = problem()

    @InversionRegistry.register(TorchTwiceDifferentiable, "of_a_number")
    def of_a_number(model, training_data, b, hessian_perturbation=0.0):
        return InverseHvpResult(b * hessian_perturbation, {})

    try:
        inverter = HessianInverter("of_a_number", "1 rel", loss="cross_entropy").fit(net, data)
        b = torch.ones(1, inverter.n_features_in_, dtype=torch.float64)
        torch.testing.assert_close(inverter.transform(b), b * inverter.hessian_perturbation_)
        model = TorchTwiceDifferentiable(net, "cross_entropy")
        with pytest.raises(TypeError, match="for a function must be a number"):
            solve_hvp("of_a_number", model, data, b, hessian_perturbation="1 rel")
    finally:
        del InversionRegistry.registry[TorchTwiceDifferentiable, "of_a_number"]


def test_solve_hvp():
    net, data = problem()
    inverter = HessianInverter("direct", "0.5 rel", loss="cross_entropy", curvature="ggn").fit(net, data)
    b = torch.ones(2, inverter.n_features_in_, dtype=torch.float64)
    settings = {"hessian_perturbation": "0.5 rel", "loss": "cross_entropy", "curvature": "ggn"}
    assert torch.equal(solve_hvp("direct", net, data, b, **settings).x, inverter.transform(b))


def test_a_search_over_both_kinds():
    X = rows()
    grid = {"hessian_perturbation": ["1e-3 rel", 0.1, "1 rel", 100.0]}
    search = GridSearchCV(HessianInverter("direct"), grid, cv=4).fit(X)
    scores = []
    for k, (train, test) in enumerate(KFold(4).split(X)):
        mean = (X[train] ** 2).sum() / X[train].size
        shifts = [1e-3 * mean, 0.1, mean, 100.0]
        scores.append([HessianInverter("direct", shift).fit(X[train]).score(X[test]) for shift in shifts])
        received = [search.cv_results_[f"split{k}_test_score"][i] for i in range(4)]
        np.testing.assert_allclose(received, scores[-1])
    cv = HessianInverterCV(grid["hessian_perturbation"], cv=4, method="direct").fit(X)
    np.testing.assert_allclose(cv.cv_results_["mean_test_score"], np.mean(scores, 0))
    assert cv.cv_results_["params"] == [{"hessian_perturbation": value} for value in grid["hessian_perturbation"]]
    assert list(cv.cv_results_["param_hessian_perturbation"]) == grid["hessian_perturbation"]
    assert cv.inverter_.hessian_perturbation == search.best_params_["hessian_perturbation"]
    assert cv.hessian_perturbation_ == search.best_estimator_.hessian_perturbation_


@pytest.mark.parametrize(
    "grid",
    [["1e-3 rel", "1e-1 rel", "10 rel"], ["0 rel", "1 rel"], [0.0, "1e-2 rel"], ["1e-2 rel"]],
    ids=str,
)
def test_cross_validation_over_shares(grid):
    X = rows()
    cv = HessianInverterCV(grid, cv=4, method="direct").fit(X)
    search = GridSearchCV(HessianInverter("direct"), {"hessian_perturbation": grid}, cv=4).fit(X)
    np.testing.assert_allclose(cv.cv_results_["mean_test_score"], search.cv_results_["mean_test_score"])
    assert cv.hessian_perturbation_ == search.best_estimator_.hessian_perturbation_


def test_cross_validation_of_a_scikit_learn_model():
    X, y = load_digits(return_X_y=True)
    X, y = X[:200] / 16, y[:200] % 2
    model = LogisticRegression().fit(X, y)
    cv = HessianInverterCV(["1e-2 rel", "1 rel"], cv=3, method="cg").fit(model, (X, y))
    expected = HessianInverter("cg", cv.inverter_.hessian_perturbation).fit(model, (X, y))
    assert cv.hessian_perturbation_ == expected.hessian_perturbation_


@pytest.mark.parametrize("form", ["pickle", "file"])
@pytest.mark.parametrize(
    "estimator",
    [HessianInverter("direct", "1e-2 rel"), HessianInverterCV(["1e-2 rel", 0.5, "1 rel"], cv=3, method="direct")],
    ids=["one", "cv"],
)
def test_saved_and_loaded(tmp_path, form, estimator):
    X = rows()
    fitted = clone(estimator).fit(X)
    if form == "pickle":
        other = pickle.loads(pickle.dumps(fitted))
    else:
        fitted.save(tmp_path / "file")
        other = load(tmp_path / "file")
    assert other.hessian_perturbation_ == fitted.hessian_perturbation_
    assert other.get_params() == fitted.get_params()
    np.testing.assert_array_equal(other.transform(X), fitted.transform(X))
    if isinstance(other, HessianInverterCV):
        received, expected = (list(e.cv_results_["param_hessian_perturbation"]) for e in (other, fitted))
        assert received == expected == ["1e-2 rel", 0.5, "1 rel"]
    # Fitted again, it finds λ anew.
    np.testing.assert_allclose(clone(other).fit(2 * X).hessian_perturbation_, 4 * fitted.hessian_perturbation_)


@pytest.mark.parametrize("value", ["rel", "-1 rel", "nan rel", "inf rel", "1e-2 relative", "1 2 rel", "one rel"])
def test_other_strings_are_refused(value):
    for estimator in (HessianInverter("direct", value), HessianInverterCV([value])):
        with pytest.raises(ValueError, match='such as "1e-2 rel"'):
            estimator.fit(rows())


@pytest.mark.parametrize("value", ["1e-2", ""])
def test_a_string_that_is_no_share_is_no_number(value):
    with pytest.raises(TypeError, match="must be a float"):
        HessianInverter("direct", value).fit(rows())


def test_a_trace_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="The mean eigenvalue of H for a relative λ must be > 0. Got 0 instead"):
        HessianInverter("direct", "1e-2 rel").fit(np.zeros((4, 3)))

    class Concave(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, dtype=torch.float64))

        def forward(self, x):
            return -((x * self.weight) ** 2).sum(1)

    data = (torch.ones(4, 2, dtype=torch.float64), torch.zeros(4, dtype=torch.float64))

    def own(output, target):
        return (output + target).mean()

    with pytest.raises(ValueError, match='Got -2 instead.*curvature="ggn"'):
        HessianInverter("cg", "1e-2 rel", loss=own).fit(Concave(), data)


def test_a_generator_makes_it_repeatable():
    net, data = problem(150)
    a, b = (
        HessianInverter("cg", "1 rel", loss="cross_entropy", random_state=np.random.RandomState(seed)).fit(net, data)
        for seed in (3, 3)
    )
    assert a.hessian_perturbation_ == b.hessian_perturbation_


def test_the_trace_needs_no_gradient_mode():
    A = Products(spectral(SPECTRA["power"]))
    with torch.inference_mode():
        inside = trace(A)
    assert inside == trace(A)
