"""KFAC and EKFAC against dense Kronecker products, and against the exact GGN where theory says they meet."""

import copy
import pickle
from functools import cache

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV
from torch import nn

from skinvert import HessianInverter, TorchTwiceDifferentiable, solve_hvp
from skinvert.methods import EKFAC, KFAC
from skinvert.operators import BlockDiagonal, Dense, DiagonalMatrix, Kronecker, KroneckerBasis, Spectral

# What is tested here is what an approximate method is by definition; tests/methods/test_truth.py holds what it says.
pytestmark = pytest.mark.filterwarnings("ignore:.* is worse than x = 0:sklearn.exceptions.ConvergenceWarning")

METHODS = {"kfac": KFAC, "ekfac": EKFAC}
SHIFT = 1e-2


@cache
def digits():
    """A trained softmax layer with bias, its data, and random right-hand sides."""
    X, y = load_digits(return_X_y=True)
    X, y = torch.from_numpy(X / 16), torch.from_numpy(y)
    torch.manual_seed(0)
    net = nn.Linear(64, 10).double()
    optimiser = torch.optim.LBFGS(net.parameters(), max_iter=30)

    def closure():
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(net(X), y)
        loss.backward()
        return loss

    optimiser.step(closure)
    return net, X, y, torch.randn(7, 650, dtype=torch.float64).numpy()


@cache
def digits_oracle():
    """The dense GGN, KFAC and EKFAC of the softmax layer, in the flat order: weights (10, 64), then biases."""
    net, X, _, _ = digits()
    P = torch.softmax(net(X), 1).detach().numpy()
    a = np.hstack([X.numpy(), np.ones((len(X), 1))])
    n = len(a)
    H = np.array([np.diag(p) - np.outer(p, p) for p in P])
    ggn = np.einsum("ncd,ni,nj->cidj", H, a, a, optimize=True).reshape(650, 650) / n
    G, A = H.mean(0), a.T @ a / n
    Q = np.kron(np.linalg.eigh(G)[1], np.linalg.eigh(A)[1])
    ekfac = Q @ np.diag(np.diag(Q.T @ ggn @ Q)) @ Q.T
    order = np.concatenate([np.arange(650).reshape(10, 65)[:, :64].ravel(), np.arange(10) * 65 + 64])
    return {name: M[np.ix_(order, order)] for name, M in (("ggn", ggn), ("kfac", np.kron(G, A)), ("ekfac", ekfac))}


def relative(received, expected):
    return (np.linalg.norm(received - expected, axis=-1) / np.linalg.norm(expected, axis=-1)).max()


def solution(M, shift, b):
    return np.linalg.solve(M + shift * np.eye(len(M)), b.T).T


@pytest.mark.parametrize("curvature", ["ggn", "fisher"])
@pytest.mark.parametrize("batch_size", [100, 1797])
@pytest.mark.parametrize("method", METHODS)
def test_the_dense_definition_on_digits(method, batch_size, curvature):
    net, X, y, b = digits()
    inverter = HessianInverter(method, SHIFT, curvature=curvature, loss="cross_entropy", batch_size=batch_size)
    expected = solution(digits_oracle()[method], SHIFT, b)
    received, info = inverter.fit(net, (X, y)).solve(b)
    assert relative(received, expected) <= 1e-8
    assert relative(received, solution(digits_oracle()["ggn"], SHIFT, b)) <= 0.08
    assert info["approximate"] and info["residual_of_approximation"].max() <= 1e-10
    np.testing.assert_allclose(info["residual"], inverter.residual(b, received), rtol=1e-8)
    assert 1e-4 <= info["residual"].min() and not info["converged"].any()
    assert inverter.inverse_.positive_definite


def test_ekfac_is_the_nearer_one():
    oracle = digits_oracle()
    error = {name: np.linalg.norm(oracle[name] - oracle["ggn"]) for name in METHODS}
    assert error["ekfac"] < error["kfac"]


@pytest.mark.parametrize("method", METHODS)
def test_one_sample_is_the_exact_block_diagonal(method):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    check_block_diagonal(net, torch.randn(1, 4, dtype=torch.float64), torch.tensor([1]), "cross_entropy", method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weights", [None, np.arange(9)])
def test_a_deep_linear_network_is_the_exact_block_diagonal(method, weights):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2), nn.Linear(2, 3, bias=False)).double()
    X, y = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)
    check_block_diagonal(net, X, y, "mse", method, weights)


def check_block_diagonal(net, X, y, loss, method, weights=None):
    expected = (
        HessianInverter("direct", 1.0, curvature="ggn", loss=loss).fit(net, (X, y), weights).curvature_.to_dense()
    )
    inverter = HessianInverter(method, 1.0, loss=loss).fit(net, (X, y), weights)
    layer = np.array([name.split(".")[0] for name in inverter.get_feature_names_out()])
    expected = expected.numpy() * (layer[:, None] == layer)
    received = inverter.inverse_.operator.to_dense().numpy() - np.eye(len(expected))
    assert np.linalg.norm(received - expected) <= 1e-8 * np.linalg.norm(expected)


def small(dtype=torch.float64):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3)).to(dtype)
    return net, torch.randn(12, 2, 4, dtype=dtype), torch.randint(3, (12,))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("k", [0, 1, 7, 50])
def test_solves_what_its_operator_multiplies(method, k):
    net, X, y = small()
    inverter = HessianInverter(method, 0.01, loss="cross_entropy", weight_decay=0.02).fit(net, (X, y))
    expected = torch.randn(k, inverter.n_features_in_, dtype=torch.float64)
    b = inverter.inverse_transform(expected)
    received, info = inverter.solve(b)
    torch.testing.assert_close(received, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(expected @ inverter.inverse_.operator.to_dense(), b, rtol=0, atol=1e-12)
    assert info["residual"].shape == info["converged"].shape == (k,)


@pytest.mark.parametrize("method", METHODS)
def test_single_precision(method):
    net, X, y = small()
    b = np.random.default_rng(0).standard_normal((7, 45))
    expected = HessianInverter(method, 0.01, loss="cross_entropy").fit(net, (X, y)).transform(b)
    single = HessianInverter(method, 0.01, loss="cross_entropy").fit(copy.deepcopy(net).float(), (X.float(), y))
    received, info = single.solve(b.astype(np.float32))
    assert received.dtype == np.float32 and info["residual_of_approximation"].max() <= 1e-5
    assert relative(received, expected) <= 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_another_perturbation_reuses_the_eigenbases(method, monkeypatch):
    net, X, y = small()
    b = np.random.default_rng(0).standard_normal((3, 45))
    expected = HessianInverter(method, 0.5, loss="cross_entropy").fit(net, (X, y)).transform(b)
    inverse = HessianInverter(method, 0.01, loss="cross_entropy").fit(net, (X, y)).inverse_
    monkeypatch.setattr(torch.linalg, "eigh", None)
    np.testing.assert_allclose(inverse.at(0.5).solve(torch.from_numpy(b)).x, expected, rtol=1e-12)
    assert inverse.hessian_perturbation == 0.01


@pytest.mark.parametrize("method", METHODS)
def test_apply_takes_no_residual(method, monkeypatch):
    net, X, y = small()
    inverse = HessianInverter(method, 0.01, loss="cross_entropy").fit(net, (X, y)).inverse_
    b = torch.randn(3, 45, dtype=torch.float64)
    expected = inverse.solve(b).x
    monkeypatch.setattr(type(inverse), "operator", None)
    assert torch.equal(inverse.apply(b), expected)


class Unpenalised(TorchTwiceDifferentiable):
    """An objective that penalises weights alone, as scikit-learn's linear models do."""

    def penalty_diagonal(self):
        penalty = torch.full((self.num_params,), 0.3, dtype=self.dtype)
        penalty[self.layout.slices["bias"]] = 0.0
        return penalty


@pytest.mark.parametrize("method", METHODS)
def test_a_penalty_of_some_parameters_enters_by_its_diagonal_in_the_eigenbasis(method):
    torch.manual_seed(0)
    X, y = torch.randn(9, 2, dtype=torch.float64), torch.randint(3, (9,))
    net = nn.Linear(2, 3).double()
    model = Unpenalised(net, "cross_entropy")
    P = torch.softmax(net(X), 1).detach().numpy()
    a = np.hstack([X.numpy(), np.ones((9, 1))])
    H = np.array([np.diag(p) - np.outer(p, p) for p in P])
    ggn = np.einsum("ncd,ni,nj->cidj", H, a, a).reshape(9, 9) / 9
    Q = np.kron(np.linalg.eigh(H.mean(0))[1], np.linalg.eigh(a.T @ a / 9)[1])
    values = np.kron(np.linalg.eigvalsh(H.mean(0)), np.linalg.eigvalsh(a.T @ a / 9))
    values = values if method == "kfac" else np.diag(Q.T @ ggn @ Q)
    R = np.diag(np.tile([0.3, 0.3, 0.0], 3))
    order = np.array([0, 1, 3, 4, 6, 7, 2, 5, 8])
    expected = (Q @ np.diag(values + np.diag(Q.T @ R @ Q) + 0.1) @ Q.T)[np.ix_(order, order)]
    inverter = HessianInverter(method, 0.1).fit(model, (X, y))
    b = np.random.default_rng(0).standard_normal((4, 9))
    np.testing.assert_allclose(inverter.transform(b), np.linalg.solve(expected, b.T).T, rtol=1e-8)
    np.testing.assert_allclose(inverter.inverse_.operator.to_dense(), expected, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_a_singular_approximation_is_pseudo_inverted_with_a_warning(method):
    net, X, y, b = digits()
    inverter = HessianInverter(method, loss="cross_entropy").fit(net, (X, y))
    assert not inverter.inverse_.positive_definite
    with pytest.warns(scipy.linalg.LinAlgWarning, match="7 of 7 right-hand sides .* Try hessian_perturbation > 0"):
        x, info = inverter.solve(b)
    assert np.isfinite(x).all() and not info["converged"].any()
    inside = inverter.inverse_transform(b)
    assert inverter.solve(inside).info["residual_of_approximation"].max() <= 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_one_parameter(method):
    X, y = torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)
    inverter = HessianInverter(method, 1.0, loss="mse").fit(nn.Linear(1, 1, bias=False), (X, y))
    # H = 2 mean x² = 5.
    np.testing.assert_allclose(inverter.transform(np.array([[6.0]], dtype=np.float32)), [[1.0]], rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_pickles_without_model_and_data(method):
    net, X, y = small()
    inverter = HessianInverter(method, 0.1, loss="cross_entropy").fit(net, (X, y))
    b = np.random.default_rng(0).standard_normal((3, 45))
    state = pickle.dumps(inverter.inverse_)
    assert b"_rebuild_tensor" not in state
    loaded = pickle.loads(state)
    np.testing.assert_array_equal(loaded.solve(torch.from_numpy(b)).x, inverter.transform(b))
    assert not inverter.inverse_.keeps_operator


@pytest.mark.parametrize("method", METHODS)
def test_solve_hvp_and_grids(method):
    net, X, y = small()
    b = torch.randn(2, 45, dtype=torch.float64)
    expected = (
        HessianInverter(METHODS[method](approx="reduce"), 0.1, loss="cross_entropy").fit(net, (X, y)).transform(b)
    )
    model = TorchTwiceDifferentiable(net, "cross_entropy")
    x, info = solve_hvp(method, model, (X, y), b, hessian_perturbation=0.1, approx="reduce")
    assert torch.equal(x, expected) and info["approximate"]
    search = GridSearchCV(
        HessianInverter(METHODS[method](), 0.1, model=net, loss="cross_entropy"),
        {"method__approx": ["expand", "reduce"], "hessian_perturbation": [0.1, 1.0]},
        cv=2,
    )
    assert np.isfinite(search.fit(X.numpy(), y.numpy()).cv_results_["mean_test_score"]).all()


@pytest.mark.parametrize("method", METHODS)
def test_settings_are_checked(method):
    net, X, y = small()
    for settings in ({"approx": "mean"}, {"unsupported": "skip"}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            HessianInverter(METHODS[method](**settings), 0.1, loss="cross_entropy").fit(net, (X, y))


@pytest.mark.parametrize("method", METHODS)
def test_plain_rows_have_no_layers(method):
    with pytest.raises(ValueError, match="one with `kronecker_factors`.*'ggn', 'fisher', 'empirical_fisher'"):
        HessianInverter(method).fit(np.eye(3))


def spd(size, seed):
    M = np.random.default_rng(seed).standard_normal((size, size))
    return torch.from_numpy(M @ M.T)


@pytest.mark.parametrize("diagonal", [False, True])
def test_operators_are_their_matrices(diagonal):
    G, A = spd(3, 0), spd(4, 1)
    A = A.diagonal() if diagonal else A
    full = torch.diag(A) if diagonal else A
    values = torch.rand(3, 4, dtype=torch.float64)
    U, V = torch.linalg.eigh(G)[1], None if diagonal else torch.linalg.eigh(A)[1]
    Q = np.kron(U.numpy(), np.eye(4) if diagonal else V.numpy())
    index = [torch.tensor([5, 0, 13]), torch.tensor([i for i in range(15) if i not in (5, 0, 13)])]
    expected = {
        Kronecker(G, A): np.kron(G.numpy(), full.numpy()),
        Spectral(KroneckerBasis(U, V, 4), values.flatten()): Q @ np.diag(values.numpy().ravel()) @ Q.T,
    }
    for operator, matrix in expected.items():
        check_operator(operator, matrix)
        blocks = BlockDiagonal([DiagonalMatrix(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)), operator], index)
        check_operator(blocks, _placed([np.diag([1.0, 2.0, 3.0]), matrix], index))
    check_operator(BlockDiagonal([Dense(G), Dense(full)]), scipy.linalg.block_diag(G.numpy(), full.numpy()))


@pytest.mark.parametrize("diagonal", [False, True])
def test_a_diagonal_in_the_eigenbasis(diagonal):
    U, V = torch.linalg.eigh(spd(3, 0))[1], None if diagonal else torch.linalg.eigh(spd(4, 1))[1]
    R = torch.rand(3, 4, dtype=torch.float64)
    Q = np.kron(U.numpy(), np.eye(4) if diagonal else V.numpy())
    expected = np.diag(Q.T @ np.diag(R.numpy().ravel()) @ Q)
    np.testing.assert_allclose(KroneckerBasis(U, V, 4).quadratic(R).numpy(), expected, rtol=1e-12)


def _placed(blocks, index):
    matrix = np.zeros((15, 15))
    for block, where in zip(blocks, index, strict=True):
        matrix[np.ix_(where, where)] = block
    return matrix


def check_operator(operator, matrix):
    V = np.random.default_rng(2).standard_normal((5, len(matrix)))
    np.testing.assert_allclose(operator.apply(torch.from_numpy(V)).numpy(), V @ matrix, atol=1e-10)
    np.testing.assert_allclose(operator.to_dense().numpy(), matrix, atol=1e-10)
    np.testing.assert_allclose(operator.diagonal().numpy(), np.diag(matrix), atol=1e-10)
    loaded = pickle.loads(pickle.dumps(operator))
    np.testing.assert_array_equal(loaded.apply(torch.from_numpy(V)), operator.apply(torch.from_numpy(V)))


def test_blocks_hold_every_entry_once():
    with pytest.raises(ValueError, match="each of 0, ..., 1 once"):
        BlockDiagonal([DiagonalMatrix(torch.ones(2))], [torch.tensor([0, 0])])


@pytest.mark.cuda
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("curvature", ["ggn", "fisher", "empirical_fisher"])
def test_on_a_gpu(method, curvature):
    net, X, y = small()
    b = torch.randn(7, 45, dtype=torch.float64)
    settings = {"curvature": curvature, "loss": "cross_entropy"}
    expected = HessianInverter(method, 0.1, **settings).fit(net, (X, y)).transform(b)
    inverter = HessianInverter(method, 0.1, device="cuda", **settings).fit(net, (X, y))
    received = inverter.transform(b.cuda())
    assert received.is_cuda
    torch.testing.assert_close(received.cpu(), expected, rtol=1e-8, atol=1e-10)
    loaded = pickle.loads(pickle.dumps(inverter.inverse_))
    torch.testing.assert_close(loaded.solve(b).x, expected, rtol=1e-8, atol=1e-10)


def test_a_residual_that_is_not_asked_for_is_not_computed():
    net, b = nn.Linear(3, 2), torch.ones(2, 8)
    data = (torch.eye(3), torch.tensor([0, 1, 1]))
    asked, not_asked = (
        HessianInverter("ekfac", 1.0, loss="cross_entropy", check_residual=check).fit(net, data).solve(b)
        for check in (True, False)
    )
    assert torch.equal(asked.x, not_asked.x)
    assert bool((asked.info["residual_of_approximation"] < 1e-5).all())
    assert bool(not_asked.info["residual_of_approximation"].isnan().all())
