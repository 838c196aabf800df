"""Covariances of parameters and outputs, and the evidence, against closed forms and statsmodels."""

import math
import pickle

import numpy as np
import pytest
import torch
from oracles import Oracle
from problems import problem
from sklearn.linear_model import LinearRegression, LogisticRegression, PoissonRegressor, Ridge
from torch import nn

from skinvert import HessianInverter, TwiceDifferentiable
from skinvert.curvature import SampledFisher
from skinvert.methods import CG, Direct

N, P = 150, 3


def design():
    generator = np.random.default_rng(0)
    X = generator.standard_normal((N, P))
    signal = X @ [0.5, 1.0, -0.5] + 0.3
    return X, {
        "linear": signal + generator.standard_normal(N) * (0.5 + np.abs(X[:, 0])),
        "logistic": (signal + generator.logistic(size=N) > 0).astype(np.int64),
        "poisson": generator.poisson(np.exp(signal)).astype(np.float64),
    }


MODELS = {
    "linear": LinearRegression(),
    "logistic": LogisticRegression(C=np.inf, tol=1e-10, max_iter=10_000, solver="newton-cholesky"),
    "poisson": PoissonRegressor(alpha=0, tol=1e-12, max_iter=10_000, solver="newton-cholesky"),
}
LOSSES = {"linear": "mse", "logistic": "bce_with_logits", "poisson": "poisson_nll"}


def fitted(kind, method="direct", **settings):
    X, targets = design()
    model = MODELS[kind].fit(X, targets[kind])
    return HessianInverter(method, **settings).fit(model, (X, targets[kind])), X, targets[kind]


def twin(kind):
    """The same model as a torch module, its targets as a column."""
    inverter, X, y = fitted(kind)
    theta = torch.cat([t.detach().reshape(-1) for t in inverter._model.theta])
    net = nn.Linear(P, 1).double()
    with torch.no_grad():
        net.weight.copy_(theta[None, :P])
        net.bias.copy_(theta[P:])
    data = torch.from_numpy(X), torch.from_numpy(y)[:, None].double()
    return HessianInverter("direct", loss=LOSSES[kind], batch_size=40).fit(net, data)


def outputs_and_their_derivatives(kind, inverter, X, y):
    """Residuals and weights of the linear predictor, of the negative log-likelihood: no code of skinvert's."""
    Z = np.c_[X, np.ones(N)]
    theta = np.concatenate([t.detach().numpy().reshape(-1) for t in inverter._model.theta])
    eta = Z @ theta
    mean = {"linear": eta, "logistic": 1 / (1 + np.exp(-eta)), "poisson": np.exp(eta)}[kind]
    variance = {"linear": np.ones(N), "logistic": mean * (1 - mean), "poisson": mean}[kind]
    return Z, mean - y, variance


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("torch_twin", [False, True])
def test_covariances_are_their_closed_forms(kind, torch_twin):
    inverter, X, y = fitted(kind)
    Z, residuals, variance = outputs_and_their_derivatives(kind, inverter, X, y)
    inverter = twin(kind) if torch_twin else inverter
    bread = np.linalg.inv((Z * variance[:, None]).T @ Z)
    scores = Z * residuals[:, None]
    np.testing.assert_allclose(inverter.covariance("sandwich"), bread @ (scores.T @ scores) @ bread, rtol=1e-8)
    # torch's mse has no half.
    half = 2.0 if torch_twin and kind == "linear" else 1.0
    np.testing.assert_allclose(inverter.covariance(dispersion=half * 0.7), 0.7 * bread, rtol=1e-8)
    J = np.random.default_rng(1).standard_normal((7, P))
    Zn = np.c_[J, np.ones(7)]
    given = torch.from_numpy(J) if torch_twin else J
    received = inverter.predictive_variance(given, dispersion=half)
    assert type(received) is type(given)
    np.testing.assert_allclose(received, ((Zn @ bread) * Zn).sum(1)[:, None], rtol=1e-8)


@pytest.mark.parametrize("torch_twin", [False, True])
def test_the_dispersion_is_estimated_from_residuals(torch_twin):
    inverter, X, y = fitted("linear")
    Z, residuals, _ = outputs_and_their_derivatives("linear", inverter, X, y)
    expected = np.linalg.inv(Z.T @ Z) * (residuals @ residuals) / (N - P - 1)
    inverter = twin("linear") if torch_twin else inverter
    np.testing.assert_allclose(inverter.covariance(dispersion="residual"), expected, rtol=1e-8)
    J = np.random.default_rng(1).standard_normal((7, P))
    Zn = np.c_[J, np.ones(7)]
    received = inverter.predictive_variance(torch.from_numpy(J) if torch_twin else J, dispersion="residual")
    np.testing.assert_allclose(received, ((Zn @ expected) * Zn).sum(1)[:, None], rtol=1e-8)


def test_the_dispersion_of_other_losses_is_a_number():
    inverter, _, _ = fitted("logistic")
    for wrong, error in (("residual", ValueError), ("pearson", ValueError), (0.0, ValueError), (True, TypeError)):
        with pytest.raises(error, match="dispersion"):
            inverter.covariance(dispersion=wrong)
        with pytest.raises(error, match="dispersion"):
            inverter.predictive_variance(np.zeros((1, P)), dispersion=wrong)
    with pytest.raises(ValueError, match="dispersion must be a number for log_evidence"):
        fitted("linear")[0].log_evidence(dispersion="residual")
    X = np.eye(3)
    few = HessianInverter("direct", 1.0).fit(LinearRegression().fit(X, np.arange(3.0)), (X, np.arange(3.0)))
    with pytest.raises(ValueError, match="more than the 4 parameters"):
        few.covariance(dispersion="residual")
    with pytest.raises(ValueError, match="kind must be one of 'hessian', 'sandwich'"):
        inverter.covariance("hc0")


@pytest.mark.parametrize("curvature", ["hessian", "ggn", "empirical_fisher"])
def test_the_sandwich_of_a_network_is_that_of_its_gradients(curvature):
    case = problem("mlp", "cross_entropy", 0.05, True)
    inverter = HessianInverter("direct", 5.0, curvature=curvature, **case.settings())
    inverter.fit(case.module, case.data, case.sample_weight)
    oracle = Oracle(case)
    bread = np.linalg.inv(oracle.curvature(curvature) + 5.0 * np.eye(case.p))
    # The oracle repeats rows: a row of weight w stands w times, and counts w² here.
    weights = np.repeat(case.counts, case.counts) / case.counts.sum()
    rows = oracle.gradient_rows()
    meat = (rows * (weights / oracle.n)[:, None]).T @ rows
    np.testing.assert_allclose(inverter.covariance("sandwich"), bread @ meat @ bread, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("method", [Direct(), CG(rtol=1e-10), "ekfac", "diagonal"], ids=str)
@pytest.mark.parametrize("outputs", ["each", "joint"])
def test_the_variance_of_outputs_is_that_of_their_jacobian(method, outputs):
    case = problem("mlp", "cross_entropy", 0.05, True)
    inverter = HessianInverter(method, 0.5, curvature="ggn", **case.settings())
    inverter.fit(case.module, case.data, case.sample_weight)
    oracle = Oracle(case)
    X = case.X[:5]
    J = torch.autograd.functional.jacobian(lambda t: oracle.outputs(t, X), oracle.theta).numpy()
    A = inverter.inverse_transform(torch.eye(case.p, dtype=torch.float64)).numpy()
    expected = np.einsum("mcp,pq,mdq->mcd", J, np.linalg.inv(A), J) * 2.0 / (0.5 * case.counts.sum())
    received = inverter.predictive_variance(X, outputs=outputs, dispersion=2.0).numpy()
    expected = expected if outputs == "joint" else np.diagonal(expected, axis1=1, axis2=2)
    np.testing.assert_allclose(received, expected, rtol=1e-6)


def softmax_fits():
    """Rows of x, their labels, what each weighs in the sum of the negative log-likelihood, and a fit of its mean."""
    generator, c = np.random.default_rng(0), np.array([3.0, 0.5, 1.0])
    X, y, w = generator.standard_normal((20, 4)), generator.integers(0, 3, 20), generator.integers(1, 4, 20) * 1.0
    ignored = np.where(np.arange(20) % 3 == 0, -100, y)
    tokens = torch.from_numpy(X).reshape(4, 5, 4), torch.from_numpy(ignored).reshape(4, 5)
    settings = {"hessian_perturbation": 0.1}

    def fitted(data, loss, net=None, **fit):
        torch.manual_seed(0)
        net = net or nn.Linear(4, 3, bias=False).double()
        return HessianInverter("direct", loss=loss, batch_size=7, **settings).fit(net, data, **fit)

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3, bias=False).double()

        def forward(self, x):
            return self.linear(x).mT  # classes on axis 1

    torch.manual_seed(0)
    weighted = nn.CrossEntropyLoss(weight=torch.from_numpy(c))
    yield "class weights", X, y, c[y], fitted((X, y), weighted)
    yield "ignored labels", X, y, (ignored >= 0) * 1.0, fitted((X, ignored), "cross_entropy")
    yield "all weights", X, y, w * c[y] * (ignored >= 0), fitted((X, ignored), weighted, sample_weight=w)
    yield "tokens", X, y, c[y] * (ignored >= 0), fitted(tokens, weighted, Tokens())
    model = LogisticRegression(fit_intercept=False, class_weight=dict(enumerate(c)), tol=1e-10).fit(X, y, w)
    inverter = HessianInverter("direct", **settings).fit(model, (X, y), sample_weight=w)
    yield "LogisticRegression", X, y, w * c[y], inverter


SOFTMAX = {name: rest for name, *rest in softmax_fits()}


@pytest.mark.parametrize("name", SOFTMAX)
def test_weights_of_labels_count_as_those_of_rows(name):
    """Of N times the mean loss and a prior, in NumPy: N is Σ weights, whoever gave them, and −log p the sum's."""
    X, y, weights, inverter = SOFTMAX[name]
    theta = torch.cat([t.detach().reshape(-1) for t in inverter._model.theta]).numpy()
    logits = X @ theta.reshape(3, 4).T
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    middle = np.einsum("n,ncd->ncd", weights, np.einsum("nc,cd->ncd", p, np.eye(3)) - p[:, :, None] * p[:, None])
    delta = 0.1 * weights.sum() + (1.0 if name == "LogisticRegression" else 0.0)  # λ N, and 1/C
    P = np.einsum("ncd,ni,nj->cidj", middle, X, X).reshape(12, 12) + delta * np.eye(12)
    np.testing.assert_allclose(inverter.covariance(), np.linalg.inv(P), rtol=1e-7, atol=1e-12)
    if name != "tokens":
        J = np.einsum("cd,ni->ncdi", np.eye(3), X[:5]).reshape(5, 3, 12)
        expected = J @ np.linalg.inv(P) @ J.transpose(0, 2, 1)
        np.testing.assert_allclose(inverter.predictive_variance(X[:5], outputs="joint"), expected, rtol=1e-7)
    fit = weights @ np.log(p[np.arange(20), y]) - 0.5 * delta * theta @ theta
    expected = fit + 6 * math.log(delta) - 0.5 * np.linalg.slogdet(P)[1]
    assert inverter.log_evidence() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.CrossEntropyLoss(reduction="sum"), nn.BCEWithLogitsLoss()])
def test_a_mean_over_outputs_has_their_number_in_its_dispersion(loss):
    """φ is 2σ²/c, 1 and 1/c: then N (H + λI) is the sum over rows and outputs, and Nλ."""
    generator = np.random.default_rng(0)
    X, net = generator.standard_normal((15, 4)), nn.Linear(4, 3, bias=False).double()
    labels = isinstance(loss, nn.CrossEntropyLoss)
    y = generator.integers(0, 3, 15) if labels else generator.integers(0, 2, (15, 3)) * 1.0
    logits = X @ net.weight.detach().numpy().T
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    q = 1 / (1 + np.exp(-logits))
    softmax = np.einsum("nc,cd->ncd", p, np.eye(3)) - p[:, :, None] * p[:, None]
    sigmoid = np.einsum("nc,cd->ncd", q * (1 - q), np.eye(3))
    squares = np.tile(np.eye(3), (15, 1, 1)) / 0.7**2
    middle, phi = {
        "MSELoss": (squares, 2 * 0.7**2 / 3),
        "CrossEntropyLoss": (softmax, 1.0),
        "BCEWithLogitsLoss": (sigmoid, 1 / 3),
    }[type(loss).__name__]
    P = np.einsum("ncd,ni,nj->cidj", middle, X, X).reshape(12, 12) + 0.1 * 15 / phi * np.eye(12)
    received = HessianInverter("direct", 0.1, loss=loss).fit(net, (X, y)).covariance(dispersion=phi)
    np.testing.assert_allclose(received, np.linalg.inv(P), rtol=1e-7, atol=1e-12)


def test_targets_do_not_count():
    case = problem("mlp", "cross_entropy", 0.05)
    data = [(case.X[:7], case.y[:7]), (case.X[7:], case.y[7:])]
    inverter = HessianInverter("direct", 0.5, curvature="ggn", **case.settings()).fit(case.module, data)
    with pytest.raises(ValueError, match="y must be given"):
        inverter.predictive_variance(case.X)
    expected = inverter.predictive_variance(case.X, case.y)
    torch.testing.assert_close(inverter.predictive_variance(case.X, 0 * case.y), expected)
    torch.testing.assert_close(inverter.predictive_variance(data), expected)
    names = LogisticRegression().fit(case.X.numpy(), np.array(["a", "b"] * 6))
    inverter = HessianInverter("direct").fit(names, (case.X.numpy(), np.array(["a", "b"] * 6)))
    assert inverter.predictive_variance(case.X.numpy()).shape == (12, 1)


# -- the evidence -----------------------------------------------------------------------------------------------------


def test_the_evidence_of_a_linear_model_is_exact():
    """Of a Gaussian Laplace's approximation is the marginal likelihood, a Gaussian density of the targets."""
    generator, sigma, delta = np.random.default_rng(0), 0.7, 2.5
    X, y = generator.standard_normal((30, 4)), generator.standard_normal(30)
    model = Ridge(alpha=delta * sigma**2, fit_intercept=False, tol=1e-12).fit(X, y)
    C = X @ X.T / delta + sigma**2 * np.eye(30)
    expected = -0.5 * (y @ np.linalg.solve(C, y) + np.linalg.slogdet(C)[1] + 30 * math.log(2 * math.pi))
    received = HessianInverter("direct").fit(model, (X, y)).log_evidence(dispersion=sigma**2)
    assert received - 15 * math.log(2 * math.pi * sigma**2) == pytest.approx(expected, rel=1e-12)
    # The same by torch's mean squared error, whose φ is 2σ²/c, and with λ in place of the penalty.
    net = nn.Linear(4, 1, bias=False).double()
    net.weight.data = torch.from_numpy(model.coef_)[None]
    data = torch.from_numpy(X), torch.from_numpy(y)[:, None]
    for decay in (0.0, delta / 30 * 2 * sigma**2):
        shift = delta / 30 * 2 * sigma**2 - decay
        inverter = HessianInverter("direct", shift, loss="mse", weight_decay=decay).fit(net, data)
        assert inverter.log_evidence(dispersion=2 * sigma**2) == pytest.approx(received, rel=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_evidence_of_a_classifier_is_its_formula(weighted):
    case = problem("mlp", "cross_entropy", 0.05, weighted)
    inverter = HessianInverter("direct", 0.01, curvature="ggn", **case.settings())
    inverter.fit(case.module, case.data, case.sample_weight)
    oracle = Oracle(case)
    n = oracle.n * (0.5 if weighted else 1.0)
    losses = float(oracle.summed(oracle.outputs(oracle.theta, oracle.X), oracle.y)) * n / oracle.n
    delta = n * (0.05 + 0.01)
    posterior = n * oracle.ggn() + n * 0.01 * np.eye(case.p)
    prior = -0.5 * delta * float(oracle.theta @ oracle.theta) + 0.5 * case.p * math.log(delta)
    assert inverter.log_evidence() == pytest.approx(-losses + prior - 0.5 * np.linalg.slogdet(posterior)[1], rel=1e-10)


def test_a_flat_prior_has_no_evidence():
    inverter, _, _ = fitted("logistic")
    with pytest.raises(ValueError, match="Got 0 for 4.*Their prior is flat"):
        inverter.log_evidence()
    with pytest.raises(TypeError, match="one of"):
        fitted("logistic", CG(), hessian_perturbation=0.1)[0].log_evidence()


# -- what is not at hand ----------------------------------------------------------------------------------------------


class OnlyDerivatives(TwiceDifferentiable):
    """½ mean (xᵀθ − y)², by its formulas."""

    num_params, parameters = 2, [torch.zeros(2, dtype=torch.float64)]

    def grad(self, x, y, create_graph=False):
        return x.mT @ (x @ self.parameters[0] - y) / len(x)

    def hessian(self, x, y):
        return x.mT @ x / len(x)

    def mvp(self, grad_xy, v, backprop_on, *, progress=False):
        raise NotImplementedError

    @classmethod
    def tensor_type(cls):
        return torch.Tensor


def test_plain_rows_and_loaded_inverters_say_what_they_lack():
    rows = HessianInverter("direct", 0.1).fit(np.eye(3))
    np.testing.assert_allclose(rows.covariance(), np.eye(3) / (1 / 3 + 0.1) / 3)
    for call in (lambda: rows.covariance("sandwich"), rows.log_evidence):
        with pytest.raises(TypeError, match="must be that of a model. Got Gram"):
            call()
    with pytest.raises(ValueError, match="at hand"):
        rows.predictive_variance(np.eye(3))
    loaded = pickle.loads(pickle.dumps(fitted("logistic")[0]))
    for call in (loaded.covariance, loaded.log_evidence, lambda: loaded.predictive_variance(np.eye(3))):
        with pytest.raises(ValueError, match="at hand.*call `fit` again"):
            call()


def test_sampled_labels_are_no_part_of_the_gradients():
    case = problem("softmax", "cross_entropy", 0.1)
    exact, sampled = (
        HessianInverter("diagonal", 1e6, curvature=curvature, **case.settings()).fit(case.module, case.data)
        for curvature in ("ggn", SampledFisher(3))
    )
    np.testing.assert_allclose(sampled.covariance("sandwich"), exact.covariance("sandwich"), rtol=1e-5)
    assert sampled.log_evidence() == pytest.approx(exact.log_evidence(), rel=1e-5)
