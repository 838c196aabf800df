"""The GGN by random signs against all sign vectors, the exact GGN, and its own standard error."""

import itertools
import pickle

import numpy as np
import pytest
import sklearn
import torch
import torch.nn.functional as F
from facts import matrix_of as matrix
from oracles import matrix_error
from sklearn.base import clone
from torch import nn

from skinvert import HessianInverter, SampledFisher, SampledGGN, load

N, D = 11, 3


def own_loss(outputs, targets):
    return ((outputs - targets) ** 2).sum(1) + (outputs.sum(1) - 1).exp()


WEIGHT = torch.tensor([0.5, 2.0, 1.0, 1.5], dtype=torch.float64)
CASES = {
    "cross_entropy": ("cross_entropy", 4),
    "weighted": (nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=1), 4),
    "mse": ("mse", 3),
    "bce": ("bce_with_logits", 3),
    "poisson": ("poisson_nll", 1),
    "own": (own_loss, 3),
}


def problem(name):
    """A linear network: Jᵢ is known."""
    loss, c = CASES[name]
    torch.manual_seed(1)
    net = nn.Linear(D, c, bias=False).double()
    X = torch.randn(N, D, dtype=torch.float64)
    y = {
        "cross_entropy": torch.randint(c, (N,)),
        "weighted": torch.randint(c, (N,)),
        "bce": torch.randint(2, (N, c)).double(),
        "poisson": torch.randint(4, (N, c)).double(),
    }.get(name, torch.randn(N, c, dtype=torch.float64))
    return net, X, y, loss


def output_factor(name, f, y):
    """S (c, r) with SSᵀ the second derivative of one row's loss by its outputs, times what the row counts."""
    c = len(f)
    if name in ("cross_entropy", "weighted"):
        p = F.softmax(f, 0)
        weight = 1.0 if name == "cross_entropy" else float(WEIGHT[y]) * (int(y) != 1)
        return (np.sqrt(weight) * (torch.eye(c).double() - p[:, None]) * p.sqrt()).numpy()
    values = {
        "mse": torch.full((c,), 2 / c, dtype=torch.float64),
        "bce": f.sigmoid() * (1 - f.sigmoid()) / c,
        "poisson": f.exp(),
    }.get(name)
    if values is not None:
        return torch.diag(values.double().sqrt()).numpy()
    eigenvalues, vectors = torch.linalg.eigh(2 * torch.eye(c).double() + (f.sum() - 1).exp())
    return (vectors * eigenvalues.sqrt() @ vectors.mT).numpy()


def all_squares(name):
    """Per row the squares (JᵀSε)(JᵀSε)ᵀ of every sign vector, over the loss's denominator: (n, 2^r, p, p)."""
    net, X, y, _ = problem(name)
    masses = WEIGHT[y] * (y != 1) if name == "weighted" else torch.ones(N)
    found = []
    for x, target in zip(X, y, strict=True):
        S = output_factor(name, net(x).detach(), target)
        J = np.kron(np.eye(len(S)), x.numpy()[None])
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=S.shape[1])))
        columns = signs @ S.T @ J
        found.append(columns[:, :, None] * columns[:, None, :])
    return np.array(found) / float(masses.sum())


@pytest.mark.parametrize("name", CASES)
def test_draws_agree_with_the_ggn_to_their_standard_error(name):
    net, X, y, loss = problem(name)
    squares, draws, seeds = all_squares(name), 50, range(20)
    expected, _ = matrix(net, (X, y), loss, "ggn")
    np.testing.assert_allclose(squares.mean(1).sum(0), expected, atol=1e-12)
    variance = np.square(squares - squares.mean(1, keepdims=True)).sum((2, 3)).mean(1).sum() / draws
    found = [matrix(net, (X, y), loss, SampledGGN(draws, random_state=seed))[0] for seed in seeds]
    errors = [np.square(one - expected).sum() for one in found]
    # One output has one column, whose sign squares away.
    assert 0.6 * variance - 1e-20 <= np.mean(errors) <= 1.5 * variance + 1e-20
    assert np.square(np.mean(found, 0) - expected).sum() <= 3 * variance / len(seeds) + 1e-20


@pytest.mark.parametrize("name", CASES)
def test_one_draw_takes_each_row_by_one_of_its_sign_vectors(name):
    net, X, y, loss = problem(name)
    squares = all_squares(name)
    received, A = matrix(net, (X, y), loss, SampledGGN())
    rows = A.factor().numpy()
    assert rows.shape == (N, A.size)
    for row, own in zip(rows, squares, strict=True):
        assert np.abs(own - np.outer(row, row)).max((1, 2)).min() <= 1e-12
    np.testing.assert_allclose(received, rows.T @ rows, atol=1e-14)


@pytest.mark.parametrize("name", CASES)
def test_draws_make_one_operator(name):
    net, X, y, loss = problem(name)
    settings = SampledGGN(3, random_state=5)
    expected, A = matrix(net, (X, y), loss, settings, batch_size=4)
    other, B = matrix(net, (X, y), loss, settings, batch_size=1024)
    V = torch.eye(A.size, dtype=torch.float64)
    assert matrix_error(other, expected) <= 1e-12
    assert matrix_error(A.apply(V).numpy(), expected) <= 1e-12
    assert A.factor_shape == tuple(A.factor().shape) == (3 * N, A.size)
    parts = [B.minibatch(torch.tensor([i])).apply(V).numpy() for i in range(N)]
    assert matrix_error(np.mean(parts, 0), expected) <= 1e-12
    assert matrix_error(pickle.loads(pickle.dumps(A)).apply(V).numpy(), expected) <= 1e-12
    with sklearn.config_context(working_memory=1e-5):
        assert matrix_error(matrix(net, (X, y), loss, settings, batch_size=4)[0], expected) <= 1e-12


def test_a_row_of_many_columns_has_draws_that_no_batch_size_changes():
    torch.manual_seed(0)
    net, X, y = nn.Linear(2, 70).double(), torch.randn(9, 2).double(), torch.randint(70, (9,))
    expected, _ = matrix(net, (X, y), "cross_entropy", SampledGGN(3), batch_size=9)
    assert matrix_error(matrix(net, (X, y), "cross_entropy", SampledGGN(3), batch_size=2)[0], expected) <= 1e-12
    exact, _ = matrix(net, (X, y), "cross_entropy", "ggn")
    many, _ = matrix(net, (X, y), "cross_entropy", SampledGGN(3000))
    assert matrix_error(many, exact) <= 0.1 < matrix_error(expected, exact)


def test_second_derivatives_that_are_alike_have_draws_that_rounding_does_not_change():
    # A callable, so that the root is by eigenvectors: three positions whose eigenvalues are equal to nine digits.
    torch.manual_seed(0)
    net, X, y = nn.Linear(2, 6).double(), 1e-9 * torch.randn(8, 2).double(), torch.randint(2, (8, 3))
    nn.init.zeros_(net.bias)
    model = nn.Sequential(net, nn.Unflatten(1, (2, 3)))

    def loss(f, y):
        return F.cross_entropy(f, y)

    expected, _ = matrix(model, (X, y), loss, SampledGGN(1))
    for _ in range(5):
        other, _ = matrix(model, (X, y), loss, SampledGGN(1))
        assert matrix_error(other, expected) <= 1e-9
        with torch.no_grad():
            net.bias += 1e-12 * torch.randn(6)


class PerToken(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(5, 3), nn.Linear(3, 5)

    def forward(self, tokens):
        return self.out(self.embed(tokens).tanh()).mT


def test_positions_are_drawn_apart():
    torch.manual_seed(0)
    net = PerToken().double()
    tokens, targets = torch.randint(5, (6, 4)), torch.randint(5, (6, 4))
    exact, _ = matrix(net, (tokens, targets), "cross_entropy", "ggn")
    many, _ = matrix(net, (tokens, targets), "cross_entropy", SampledGGN(20_000))
    assert matrix_error(many, exact) <= 0.02


@pytest.mark.parametrize("method", ["kfac", "ekfac"])
def test_kronecker_factors_by_many_draws_are_those_of_the_ggn(method):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    X, y, b = torch.randn(40, D).double(), torch.randint(3, (40,)), torch.randn(2, 31).double()
    exact, drawn, labels = (
        HessianInverter(method, 1e-2, curvature=curvature, loss="cross_entropy").fit(net, (X, y)).transform(b)
        for curvature in ("ggn", SampledGGN(2000), SampledFisher(2000))
    )
    assert matrix_error(drawn.numpy(), exact.numpy()) <= 0.05
    assert matrix_error(labels.numpy(), exact.numpy()) <= 0.3


def test_of_a_model_sure_of_its_labels_signs_are_nearer_than_labels():
    torch.manual_seed(0)
    X = torch.randn(200, D).double()
    net = nn.Linear(D, 3).double()
    net.weight.data *= 20
    y = net(X).argmax(1)
    exact, _ = matrix(net, (X, y), "cross_entropy", "ggn")
    errors = {
        kind: np.mean([matrix_error(matrix(net, (X, y), "cross_entropy", one)[0], exact) for one in of])
        for kind, of in {
            "signs": [SampledGGN(random_state=seed) for seed in range(10)],
            "labels": [SampledFisher(random_state=seed) for seed in range(10)],
        }.items()
    }
    assert 2 * errors["signs"] < errors["labels"]


def test_what_the_ggn_refuses_is_refused():
    net, X, y, _ = problem("mse")
    with pytest.raises(ValueError, match="convex"):
        matrix(net, (X, y), lambda outputs, targets: -((outputs - targets) ** 2).sum(1).exp(), SampledGGN())
    with pytest.raises(ValueError, match="'n_samples' parameter of SampledGGN must be"):
        matrix(net, (X, y), "mse", SampledGGN(0))


def test_it_has_a_name_a_seed_and_a_file(tmp_path):
    net, X, y, loss = problem("cross_entropy")
    named, A = matrix(net, (X, y), loss, "sampled_ggn")
    assert matrix_error(named, matrix(net, (X, y), loss, SampledGGN())[0]) == 0
    seeded, _ = matrix(net, (X, y), loss, "sampled_ggn", random_state=1)
    assert matrix_error(seeded, matrix(net, (X, y), loss, SampledGGN(random_state=1))[0]) == 0
    assert matrix_error(seeded, named) > 1e-3
    own = SampledGGN(2, random_state=7)
    expected = matrix(net, (X, y), loss, own)[0]
    assert matrix_error(matrix(net, (X, y), loss, own, random_state=1)[0], expected) == 0
    inverter = HessianInverter("direct", 1.0, curvature=own, loss=loss)
    assert clone(inverter).set_params(curvature__n_samples=4).curvature.n_samples == 4
    inverter.fit(net, (X, y)).save(tmp_path / "inverter")
    loaded, b = load(tmp_path / "inverter"), torch.ones(1, A.size).double()
    torch.testing.assert_close(loaded.transform(b), inverter.transform(b))
    assert loaded.get_params()["curvature__random_state"] == 7
    assert inverter.curvature_name_ == "ggn" and np.isfinite(inverter.score((X, y)))


@pytest.mark.parametrize("settings", [SampledGGN(2), SampledFisher(2)])
def test_in_float64_the_draws_would_be_of_other_columns(settings):
    net, X, y, loss = problem("cross_entropy")
    _, A = matrix(net.float(), (X.float(), y), loss, settings)
    assert A.in_float64() is None
    _, B = matrix(net.double(), (X, y), loss, settings)
    assert B.in_float64() is B


@pytest.mark.parametrize("curvature", ["sampled_ggn", "sampled_fisher"])
def test_outputs_of_another_length_in_a_later_batch_are_refused(curvature):
    net = nn.Sequential(nn.Conv1d(2, 4, 1)).double()
    batches = [(torch.randn(3, 2, T, dtype=torch.float64), torch.randint(4, (3, T))) for T in (5, 2)]
    inverter = HessianInverter("direct", 0.1, curvature=curvature, loss="cross_entropy")
    with pytest.raises(ValueError, match="of one shape in all batches.*an exact curvature"):
        inverter.fit(net, batches)
