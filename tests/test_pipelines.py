"""Pipelines from gradients to their inverse, each against its formula in NumPy; and TRAK's margin."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LinearRegression, LogisticRegression, SGDClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.random_projection import SparseRandomProjection
from skorch import NeuralNetBinaryClassifier, NeuralNetClassifier
from torch import nn

from skinvert import HessianInverter, PerSampleGradient, SharedModel


def digits(n=60):
    X, y = load_digits(n_class=3, return_X_y=True)
    return X[:n, 10:30] / 16, y[:n]


def trained():
    """A network after a few steps: no gradient is zero, no probability one."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    X, y = map(torch.from_numpy, digits())
    optimiser = torch.optim.Adam(net.parameters(), 0.05)
    for _ in range(30):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(X), y).backward()
        optimiser.step()
    return net


def gradients_of(net, X, y, value):
    """Return one row per sample, by one backward pass each."""
    rows = []
    for x, k in zip(torch.from_numpy(X), torch.from_numpy(y), strict=True):
        parts = torch.autograd.grad(value(net(x[None])[0], k), list(net.parameters()))
        rows.append(torch.cat([part.reshape(-1) for part in parts]).numpy())
    return np.stack(rows)


def cross_entropy(f, k):
    return -f.log_softmax(0)[k]


def margin(f, k):
    p = f.softmax(0)[k]
    return (p / (1 - p)).log()


# -- the empirical Fisher ----------------------------------------------------------------------------------------------


def test_empirical_fisher_inverse():
    net, (X, y) = trained(), digits()
    pipe = make_pipeline(PerSampleGradient(net, loss="cross_entropy"), HessianInverter("direct", 0.01))
    G = gradients_of(net, X, y, cross_entropy)
    expected = np.linalg.solve(G.T @ G / len(G) + 0.01 * np.eye(G.shape[1]), G.T).T
    received = pipe.fit(X, y).transform((X, y))
    np.testing.assert_allclose(received, expected, rtol=1e-8, atol=1e-10)


def test_empirical_fisher_inverse_is_that_of_the_model():
    net, (X, y) = trained(), digits()
    pipe = make_pipeline(PerSampleGradient(net, loss="cross_entropy"), HessianInverter("direct", 0.01)).fit(X, y)
    model = HessianInverter("direct", 0.01, curvature="empirical_fisher", loss="cross_entropy").fit(net, (X, y))
    b = np.random.default_rng(0).standard_normal((4, 99))
    np.testing.assert_allclose(pipe[-1].transform(b), model.transform(b), rtol=1e-8)


def test_projected_empirical_fisher_inverse():
    net, (X, y) = trained(), digits()
    projection = SparseRandomProjection(16, random_state=0)
    pipe = make_pipeline(PerSampleGradient(net, loss="cross_entropy"), projection, HessianInverter("direct", 0.01))
    received = pipe.fit(X[:50], y[:50]).transform((X[50:], y[50:]))
    P = pipe[1].components_.toarray()
    G, T = (gradients_of(net, X[part], y[part], cross_entropy) @ P.T for part in (slice(50), slice(50, None)))
    expected = np.linalg.solve(G.T @ G / 50 + 0.01 * np.eye(16), T.T).T
    np.testing.assert_allclose(received, expected, rtol=1e-8, atol=1e-10)


# -- TRAK --------------------------------------------------------------------------------------------------------------


def test_trak():
    net, (X, y) = trained(), digits()
    train, test = slice(50), slice(50, None)
    projection = SparseRandomProjection(16, random_state=0)
    pipe = make_pipeline(PerSampleGradient(net, loss="margin"), projection, HessianInverter("direct"))
    # φ(z)ᵀ (ΦᵀΦ)⁻¹ Φᵀ Q for each test row z, with Q = diag(1 − pᵢ): H is ΦᵀΦ / n.
    solved = pipe.fit(X[train], y[train]).transform((X[test], y[test]))
    phi = pipe[:-1].transform((X[train], y[train]))
    p = net(torch.from_numpy(X[train])).softmax(1)[torch.arange(50), torch.from_numpy(y[train])].detach().numpy()
    received = solved @ phi.T / 50 * (1 - p)

    P = pipe[1].components_.toarray()
    Phi = gradients_of(net, X[train], y[train], margin) @ P.T
    tested = gradients_of(net, X[test], y[test], margin) @ P.T
    expected = tested @ np.linalg.inv(Phi.T @ Phi) @ Phi.T @ np.diag(1 - p)
    np.testing.assert_allclose(received, expected, rtol=1e-6, atol=1e-9)


# -- the margin of each kind of classifier -----------------------------------------------------------------------------


def probability_of(model, X, y):
    p = model.predict_proba(X)
    return p[np.arange(len(y)), np.searchsorted(model.classes_, y)]


def fitted_classifiers():
    X, y = digits()
    two = y < 2
    words = np.array(["nought", "one", "two"])[y]
    yield "softmax", LogisticRegression(C=0.1), X, words
    yield "one logit", LogisticRegression(C=0.1), X[two], words[two]
    yield "sgd", SGDClassifier(loss="log_loss", alpha=0.1, random_state=0), X[two], y[two]
    yield "mlp", MLPClassifier((3,), solver="lbfgs", alpha=5.0, random_state=0), X, y
    yield "mlp, one logit", MLPClassifier((3,), solver="lbfgs", alpha=5.0, random_state=0), X[two], words[two]
    settings = {"max_epochs": 2, "verbose": 0, "train_split": None}
    torch.manual_seed(0)
    logits = nn.Linear(20, 3).double()
    yield "skorch, probabilities", NeuralNetClassifier(nn.Sequential(logits, nn.Softmax(1)), **settings), X, y
    yield "skorch, logits", NeuralNetClassifier(logits, criterion=nn.CrossEntropyLoss, **settings), X, y
    one = nn.Sequential(nn.Linear(20, 1), nn.Flatten(0)).double()
    yield "skorch, one logit", NeuralNetBinaryClassifier(one, **settings), X[two], y[two].astype(float)


CLASSIFIERS = {name: rest for name, *rest in fitted_classifiers()}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_loss_s_gradient_is_one_minus_p_times_the_margin_s(name):
    model, X, y = CLASSIFIERS[name]
    model.fit(X, y)
    losses = PerSampleGradient(model).fit_transform(X, y)
    margins = PerSampleGradient(model, loss="margin").fit_transform(X, y)
    p = model.predict_proba(X)[:, 1] if name == "skorch, one logit" else probability_of(model, X, y)
    p = np.where(y == 0, 1 - p, p) if name == "skorch, one logit" else p
    np.testing.assert_allclose(losses, -(1 - p)[:, None] * margins, rtol=1e-5, atol=1e-9)


def test_the_margin_of_a_module_is_that_of_its_logits():
    net, (X, y) = trained(), digits()
    expected = gradients_of(net, X, y, margin)
    for model in (net, SharedModel(net)):
        received = PerSampleGradient(model, loss="margin").fit_transform(X, y)
        np.testing.assert_allclose(received, expected, rtol=1e-9, atol=1e-12)


def test_the_margin_is_exact_where_p_is_nearly_one():
    net = nn.Linear(1, 2, bias=False).double()
    with torch.no_grad():
        net.weight[:] = torch.tensor([[60.0], [-60.0]])
    received = PerSampleGradient(net, loss="margin").fit_transform(np.ones((1, 1)), np.array([0]))
    # f₀ − f₁, whose gradient is (1, −1), where 1 − p is 1e-52.
    np.testing.assert_array_equal(received, [[1.0, -1.0]])


@pytest.mark.parametrize(
    ("model", "y", "match"),
    [
        (nn.Linear(20, 3).double(), np.arange(60) % 4, r"in the range \[0, 3\)"),
        (nn.Linear(20, 3).double(), np.zeros((60, 3)), "integer class indices"),
        (nn.Linear(20, 1).double(), np.arange(60.0)[:, None], "0 or 1"),
    ],
)
def test_targets_without_a_margin_are_refused(model, y, match):
    with pytest.raises(ValueError, match=match):
        PerSampleGradient(model, loss="margin").fit(digits()[0], y)


def test_models_without_a_margin_are_refused():
    X, y = digits()
    with pytest.raises(TypeError, match="must be a classifier. Got LinearRegression"):
        PerSampleGradient(LinearRegression().fit(X, y), loss="margin").fit(X, y)
    against_the_rest = SGDClassifier(loss="log_loss").fit(X, y)
    with pytest.raises(ValueError, match="integer class indices"):
        PerSampleGradient(against_the_rest, loss="margin").fit(X, y)
    with pytest.raises(ValueError, match="loss must be one of"):
        HessianInverter(loss="margin").fit(nn.Linear(20, 3).double(), (X, y))
