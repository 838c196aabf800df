"""One model that ends in logits, in log-probabilities or in probabilities: the same answers."""

import numpy as np
import pytest
import torch
from skorch import NeuralNetClassifier
from torch import nn

from skinvert import HessianInverter, InfluenceFunction
from skinvert.methods import CG

N, D, C, SHIFT = 40, 3, 4, 0.05
ENDS = ["log_softmax", "softmax", "sigmoid"]


def problem(end):
    """Return a model, its loss, data, and by hand for each row J (c, p), ∇²_f ℓ (c, c) and ∇_f ℓ (c,) at the logits."""
    torch.manual_seed(0)
    c = 1 if end == "sigmoid" else C
    X, linear = torch.randn(N, D, dtype=torch.float64), nn.Linear(D, c).double()
    f, inputs = linear(X).detach().numpy(), np.c_[X.numpy(), np.ones(N)]
    # Columns of the weight, row by row, then the bias.
    J = np.stack([np.hstack([np.kron(np.eye(c), a[None, :D]), np.eye(c)]) for a in inputs])
    if end == "sigmoid":
        y = torch.randint(2, (N, 1)).double()
        p = 1 / (1 + np.exp(-f))
        hessians, slopes = (p * (1 - p))[:, :, None], p - y.numpy()
        return nn.Sequential(linear, nn.Sigmoid()), nn.BCELoss(), (X, y), J, hessians, slopes
    y = torch.randint(c, (N,))
    p = np.exp(f) / np.exp(f).sum(1, keepdims=True)
    hessians = np.einsum("nc,cd->ncd", p, np.eye(c)) - np.einsum("nc,nd->ncd", p, p)
    slopes = p - np.eye(c)[y.numpy()]
    if end == "log_softmax":
        return nn.Sequential(linear, nn.LogSoftmax(1)), nn.NLLLoss(), (X, y), J, hessians, slopes
    module = nn.Sequential(linear, nn.Softmax(1))
    net = NeuralNetClassifier(module, train_split=None).initialize()
    return net, None, (X, y), J, hessians, slopes


def rows(p, k=3):
    return np.random.default_rng(1).standard_normal((k, p))


@pytest.mark.parametrize("method", ["kfac", "ekfac"])
@pytest.mark.parametrize("end", ENDS)
def test_kronecker_factors_are_those_of_logits(end, method):
    model, loss, data, J, hessians, _ = problem(end)
    inverter = HessianInverter(method, SHIFT, loss=loss, check_residual=False).fit(model, data)
    assert inverter.curvature_name_ == "fisher"
    if method == "ekfac":
        # What EKFAC approximates: by the same eigenvectors, with eigenvalues of the matrix itself.
        return _check_ekfac(inverter, data, J, hessians)
    inputs = np.c_[data[0].numpy(), np.ones(N)]
    A = np.kron(hessians.mean(0), inputs.T @ inputs / N)
    c = hessians.shape[1]
    # From (c, D + 1) to the weight and then the bias.
    order = np.r_[[o * (D + 1) + i for o in range(c) for i in range(D)], [o * (D + 1) + D for o in range(c)]]
    A = A[np.ix_(order, order)]
    b = rows(len(A))
    expected = np.linalg.solve(A + SHIFT * np.eye(len(A)), b.T).T
    np.testing.assert_allclose(inverter.transform(b), expected, rtol=1e-8)
    return None


def _check_ekfac(inverter, data, J, hessians):
    inputs, c = np.c_[data[0].numpy(), np.ones(N)], hessians.shape[1]
    _, U = np.linalg.eigh(inputs.T @ inputs / N)
    _, V = np.linalg.eigh(hessians.mean(0))
    order = np.r_[[o * (D + 1) + i for o in range(c) for i in range(D)], [o * (D + 1) + D for o in range(c)]]
    Q = np.kron(V, U)[order]
    G = np.einsum("ncp,ncd,ndq->pq", J, hessians, J) / N
    values = np.einsum("pi,pq,qi->i", Q, G, Q)
    b = rows(len(G))
    np.testing.assert_allclose(inverter.transform(b), (b @ Q / (values + SHIFT)) @ Q.T, rtol=1e-8)


@pytest.mark.parametrize("end", ENDS)
def test_rows_that_are_removed_take_their_curvature_with_them(end):
    model, loss, data, J, hessians, slopes = problem(end)
    influence = InfluenceFunction(HessianInverter("direct", SHIFT, loss=loss), removal="newton").fit(model, data)
    own = np.einsum("ncp,ncd,ndq->npq", J, hessians, J) / N
    A = own.sum(0) + SHIFT * np.eye(J.shape[2])
    expected = np.linalg.solve(A - own[5], J[5].T @ slopes[5] / N)
    found = influence.removed_parameters([5])
    theta = (model.module_ if loss is None else model)[0]
    step = np.concatenate([(found[name] - t.detach()).numpy().ravel() for name, t in _named(found, theta)])
    np.testing.assert_allclose(step, expected, rtol=1e-7)
    np.testing.assert_allclose(influence.leverage(), np.einsum("nij,ji->n", own, np.linalg.inv(A)), rtol=1e-8)


def _named(found, linear):
    return zip(found, (linear.weight, linear.bias), strict=True)


@pytest.mark.parametrize("end", ENDS)
def test_held_out_rows_and_preconditioners_have_the_curvature_of_logits(end):
    model, loss, data, J, hessians, slopes = problem(end)
    inverter = HessianInverter("direct", SHIFT, loss=loss).fit(model, data)
    same = nn.BCEWithLogitsLoss() if end == "sigmoid" else nn.CrossEntropyLoss()
    logits = (model.module_ if loss is None else model)[0]
    expected = HessianInverter("direct", SHIFT, loss=same).fit(logits, data).score(data)
    assert inverter.score(data) == pytest.approx(expected, rel=1e-8)
    b = rows(J.shape[2])
    steps = HessianInverter(CG(preconditioner="ekfac"), SHIFT, loss=loss).fit(model, data).solve(b).info["n_iter"]
    plain = HessianInverter(CG(preconditioner="ekfac"), SHIFT, loss=same).fit(logits, data).solve(b).info["n_iter"]
    np.testing.assert_array_equal(steps, plain)


@pytest.mark.parametrize("curvature", ["ggn", "sampled_ggn"])
@pytest.mark.parametrize("end, kind", [("log_softmax", "zero"), ("softmax", "the empirical Fisher")])
def test_the_ggn_at_probabilities_is_told_what_it_is(end, kind, curvature):
    model, loss, data, J, _, slopes = problem(end)
    with pytest.warns(UserWarning, match=f"is {kind}.*Try curvature='fisher'"):
        inverter = HessianInverter("direct", SHIFT, curvature=curvature, loss=loss).fit(model, data)
    g = np.einsum("ncp,nc->np", J, slopes)
    found = inverter.curvature_.to_dense()
    np.testing.assert_allclose(found, g.T @ g / N if end == "softmax" else np.zeros_like(found), atol=1e-12)


def test_logits_are_told_nothing(recwarn):
    X, y = torch.randn(N, D, dtype=torch.float64), torch.randint(C, (N,))
    inverter = HessianInverter("kfac", SHIFT, curvature="ggn", loss="cross_entropy", check_residual=False)
    inverter.fit(nn.Linear(D, C).double(), (X, y))
    assert not [warning for warning in recwarn if "probabilities" in str(warning.message)]
