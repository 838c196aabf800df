"""LiSSA against its recursion in NumPy, to its standard error, and on networks on digits."""

import pickle

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from torch import nn
from torch.nn import functional as F

from skinvert import HessianInverter, TwiceDifferentiable
from skinvert.curvature import Gram
from skinvert.methods import LiSSA


def plain_rows(n=40, p=6, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, p)), rng.integers(1, 4, n).astype(float), rng.standard_normal((3, p))


def gram(X, w=None, dtype=torch.float64):
    return Gram(torch.as_tensor(X, dtype=dtype), None if w is None else torch.as_tensor(w, dtype=dtype))


class Watched(Gram):
    """A Gram matrix that records which rows are drawn, and counts its products with all of them."""

    looks = 0

    def apply(self, V):
        self.looks += 1
        return super().apply(V)

    def minibatch(self, rows):
        self.__dict__.setdefault("drawn", []).append(rows.numpy().copy())
        return super().minibatch(rows)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize(("scale", "size", "maxiter"), [(30.0, 8, 400), (120.0, 8, 400), (4.0, 2, 200)])
def test_is_the_recursion_of_the_paper(scale, size, maxiter):
    """Replayed row by row over the minibatches that were drawn: averages by windows, corrections, the best of all."""
    X, w, b = plain_rows()
    A = Watched(torch.as_tensor(X), torch.as_tensor(w))
    # An epoch costs 40 / size steps, and a look as much.
    method = LiSSA(rtol=0.0, maxiter=maxiter, scale=scale, batch_size=size)
    received = method.invert(A, 0.3).solve(torch.as_tensor(b))
    estimates = [40 / size * (X[i] * w[i, None]).T @ X[i] / w.sum() + 0.3 * np.eye(6) for i in A.drawn]
    exact = shifted_gram(X, w)
    replays = [replay(row, estimates, exact, scale, 40 // size) for row in b]
    assert len(A.drawn) == maxiter // 2 and all(len(set(rows)) == size for rows in A.drawn)
    assert all(anchors > 0 for _, anchors in replays)
    np.testing.assert_allclose(received.x, [x for x, _ in replays], rtol=1e-9, atol=1e-12)
    gap = np.linalg.norm(received.x.numpy() @ exact - b, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(received.info["residual"], gap, rtol=1e-8)
    assert received.info["n_iter"].tolist() == [maxiter // 2] * 3


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize(("repetitions", "looks"), [(1, 3), (2, 7)])
def test_all_the_data_are_looked_at_once_an_epoch(repetitions, looks):
    """A mean of several runs was not looked at by any of them."""
    X, w, b = plain_rows()
    b[1] = 0
    A = Watched(torch.as_tensor(X), torch.as_tensor(w))
    method = LiSSA(rtol=0.0, maxiter=30, scale=30.0, batch_size=8, repetitions=repetitions)
    x, info = method.invert(A, 0.3).solve(torch.as_tensor(b))
    assert A.looks == looks and len(A.drawn) == 15 * repetitions
    gap, size = np.linalg.norm(x.numpy() @ shifted_gram(X, w) - b, axis=1), np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(info["residual"], gap / np.where(size > 0, size, 1), rtol=1e-9)


def replay(b, estimates, exact, scale, m):
    """d ← R/s + (I − (A_t + λI)/s) d for A d = R = b − A x, m steps an epoch; windows from epochs 1, 2, 4, 8, …"""
    x, R, d, iterates, anchors = np.zeros(6), b, np.zeros(6), [], 0
    best, least = x, np.linalg.norm(b)
    for epoch in range(len(estimates) // m):
        for A_t in estimates[m * epoch : m * epoch + m]:
            d = R / scale + (np.eye(6) - A_t / scale) @ d
            iterates.append(d)
        epochs = len(iterates) // m
        first = 0 if epochs == 1 else 2 ** int(np.log2(epochs - 1))
        average = x + np.mean(iterates[m * first :], axis=0)
        r = b - exact @ average
        if np.linalg.norm(r) < least:
            best, least = average, np.linalg.norm(r)
        if np.linalg.norm(r) <= np.linalg.norm(R) / 2:
            x, R, d, iterates, anchors = average, r, np.zeros(6), [], anchors + 1
    return best, anchors


def shifted_gram(X, w, shift=0.3):
    return (X * w[:, None]).T @ X / w.sum() + shift * np.eye(X.shape[1])


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_mean_over_minibatches_is_the_deterministic_series():
    """The recursion is linear in independent unbiased estimates: E x_t is the iterate of A itself."""
    X, w, b = plain_rows()
    A, x, iterates = shifted_gram(X, w), np.zeros_like(b), []
    for _ in range(5):
        x = b / 60.0 + x @ (np.eye(6) - A / 60.0)
        iterates.append(x)
    expected, deviations = np.mean(iterates, axis=0), []
    for repetitions, seeds in ((1, 200), (25, 40)):
        settings = {"maxiter": 1, "scale": 60.0, "batch_size": 8, "repetitions": repetitions}
        runs = [first_epoch(X, w, b, LiSSA(**settings, random_state=seed)) for seed in range(seeds)]
        deviation = np.std(runs, axis=0, ddof=1)
        # 18 entries: 4 standard errors for the worst.
        assert np.abs((np.mean(runs, axis=0) - expected) / deviation).max() <= 4.0 / np.sqrt(seeds)
        deviations.append(deviation)
    # 25 repetitions have a fifth of the deviation; 40 runs know a deviation to 11 %, a mean of 18 to less.
    assert np.mean(deviations[0] / deviations[1]) == pytest.approx(5.0, rel=0.25)


def first_epoch(X, w, b, method):
    x, info = method.invert(gram(X, w), 0.3).solve(torch.as_tensor(b))
    assert info["n_iter"].tolist() == [5 * method.repetitions] * 3
    return x.numpy()


def test_corrections_take_the_noise_away():
    """Averages alone would need 10¹² steps for this."""
    X, w, b = plain_rows()
    expected = np.linalg.solve(shifted_gram(X, w), b.T).T
    x, info = LiSSA(rtol=1e-9, batch_size=8).invert(gram(X, w), 0.3).solve(torch.as_tensor(b))
    assert info["converged"].all() and info["n_iter"].max() < 5000
    np.testing.assert_allclose(x, expected, rtol=1e-6)


@pytest.mark.parametrize("repetitions", [1, 3])
def test_solves_are_pure_seeded_and_row_by_row(repetitions):
    X, w, b = plain_rows()
    b = np.concatenate([b, 1e3 * b])
    inverse = LiSSA(batch_size=8, repetitions=repetitions).invert(gram(X, w), 0.3)
    first, again = inverse.solve(torch.as_tensor(b)).x, inverse.solve(torch.as_tensor(b)).x
    alone = torch.cat([inverse.solve(torch.as_tensor(row[None])).x for row in b])
    other = LiSSA(batch_size=8, random_state=1).invert(gram(X, w), 0.3).solve(torch.as_tensor(b)).x
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.testing.assert_close(alone, first, rtol=1e-10, atol=1e-12)
    assert torch.equal(pickle.loads(pickle.dumps(inverse)).solve(torch.as_tensor(b)).x, first)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_all_the_data_in_one_batch_is_a_plain_neumann_series(dtype, rtol):
    X, w, b = plain_rows()
    expected = np.linalg.solve((X * w[:, None]).T @ X / w.sum() + 0.3 * np.eye(6), b.T).T
    x, info = LiSSA(rtol=rtol, batch_size=40).invert(gram(X, w, dtype), 0.3).solve(torch.as_tensor(b, dtype=dtype))
    assert info["converged"].all() and info["scale"] == pytest.approx(
        2 * (np.linalg.eigvalsh((X * w[:, None]).T @ X / w.sum())[-1] + 0.3), rel=1e-5
    )
    np.testing.assert_allclose(x, expected, rtol=100 * rtol, atol=100 * rtol)


def test_starts_at_h0_and_another_perturbation():
    X, w, b = plain_rows()
    x0 = np.linalg.solve((X * w[:, None]).T @ X / w.sum() + 0.3 * np.eye(6), b.T).T
    inverse = LiSSA(h0=x0, batch_size=8, rtol=1e-6).invert(gram(X, w), 2.0).at(0.3)
    x, info = inverse.solve(torch.as_tensor(b))
    assert info["n_iter"].tolist() == [0, 0, 0] and np.array_equal(x, x0)
    with pytest.raises(ValueError, match="h0 must be of shape"):
        inverse.solve(torch.as_tensor(b[:2]))


def test_zero_and_no_right_hand_sides_and_one_parameter():
    inverse = LiSSA(batch_size=2, rtol=1e-3).invert(gram([[1.0], [2.0], [3.0]]), 1.0)
    assert inverse.solve(torch.zeros(0, 1).double()).x.shape == (0, 1)
    x, info = inverse.solve(torch.tensor([[0.0], [17 / 3]], dtype=torch.float64))
    assert info["converged"].all() and info["residual"][0] == 0 == x[0]
    assert float(x[1]) == pytest.approx(1.0, rel=1e-3)


# -- what does not converge ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [8, 40])
def test_a_scale_too_small_raises_and_names_one_that_works(batch_size):
    X, w, b = plain_rows()
    with pytest.raises(ValueError, match=r"scale for lissa here must be .* diverged in step \d+.* Try scale=") as error:
        LiSSA(scale=0.1, batch_size=batch_size).invert(gram(X, w), 0.3).solve(torch.as_tensor(b))
    named = float(str(error.value).split("Try scale=")[1].split(",")[0])
    x, info = LiSSA(scale=named, batch_size=batch_size, rtol=0.05).invert(gram(X, w), 0.3).solve(torch.as_tensor(b))
    assert info["converged"].all()


def test_an_indefinite_hessian_is_named():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    X, y = 3 * torch.randn(60, 6, dtype=torch.float64), torch.randint(3, (60,))
    H = HessianInverter("direct", 1.0, loss="cross_entropy").fit(net, (X, y)).inverse_transform(np.eye(83)) - np.eye(83)
    lowest = np.linalg.eigvalsh(H)[0]
    assert lowest < -0.01
    b = np.random.default_rng(0).standard_normal((2, 83))
    inverter = HessianInverter(LiSSA(batch_size=20), 1e-3, loss="cross_entropy").fit(net, (X, y))
    with pytest.raises(ValueError, match=r"hessian_perturbation must be > .* for lissa here.*ggn") as error:
        inverter.solve(b)
    named = float(str(error.value).split("Try hessian_perturbation=")[1].split(". ")[0])
    assert named > -lowest
    short = HessianInverter(LiSSA(batch_size=20, maxiter=20), 1e-3, loss="cross_entropy").fit(net, (X, y))
    with pytest.warns(ConvergenceWarning, match="must be > .* for lissa here"):
        x, info = short.solve(b)
    assert np.isfinite(x).all() and not info["converged"].any()


def test_too_few_steps_warn():
    X, w, b = plain_rows()
    with pytest.warns(ConvergenceWarning, match=r"lissa did not converge on 3 of 3.*larger `maxiter`"):
        x, info = LiSSA(maxiter=1, batch_size=8).invert(gram(X, w), 0.3).solve(torch.as_tensor(b))
    assert not info["converged"].any() and info["n_iter"].tolist() == [5, 5, 5] and torch.isfinite(x).all()


@pytest.mark.parametrize("p", [2, 40])
def test_a_curvature_of_zero(p):
    A, b = gram(np.zeros((3, p))), torch.ones(1, p).double()
    with pytest.warns(ConvergenceWarning):
        x, info = LiSSA().invert(A, 0.0).solve(b)
    assert torch.isfinite(x).all() and not info["converged"].any()
    x, info = LiSSA().invert(A, 0.5).solve(b)
    torch.testing.assert_close(x, torch.full_like(x, 2.0), rtol=2e-2, atol=0.0)


@pytest.mark.parametrize("setting", ["rtol", "maxiter", "scale", "batch_size", "repetitions", "random_state"])
def test_bad_settings(setting):
    with pytest.raises(ValueError, match=f"'{setting}' parameter of LiSSA"):
        LiSSA(**{setting: -1}).invert(gram(np.eye(2)), 1.0)


def test_a_model_of_grad_and_mvp_alone():
    """L = ½ mean (θᵀx)²: H = XᵀX / n."""

    class Quadratic(TwiceDifferentiable):
        num_params, parameters = 2, [torch.zeros(2, dtype=torch.float64)]

        def grad(self, x, y, create_graph=False):
            return x.mT @ x @ self.parameters[0] / len(x) if not create_graph else x

        def hessian(self, x, y):
            return x.mT @ x / len(x)

        @staticmethod
        def mvp(grad_xy, v, backprop_on, *, progress=False):
            return v @ grad_xy.mT @ grad_xy / len(grad_xy)

        @classmethod
        def tensor_type(cls):
            return torch.Tensor

    X = torch.from_numpy(np.random.default_rng(0).standard_normal((40, 2)))
    b = np.array([[1.0, -2.0]])
    method = LiSSA(rtol=1e-4, maxiter=100_000, batch_size=8, random_state=0)
    received = HessianInverter(method, 1.0).fit(Quadratic(), (X, torch.zeros(40))).transform(b)
    expected = np.linalg.solve(X.numpy().T @ X.numpy() / 40 + np.eye(2), b.T).T
    np.testing.assert_allclose(received, expected, rtol=1e-3)


# -- networks ------------------------------------------------------------------------------------------------------

NETWORKS = {
    "softmax": lambda: nn.Linear(64, 10),
    "mlp": lambda: nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)),
    "cnn": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 4, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 10)
    ),
}
DECAY = 1e-3


def trained(name):
    """A network on digits at a minimum of its loss with weight decay, and the data; float64."""
    torch.manual_seed(0)
    X, y = load_digits(return_X_y=True)
    X, y, net = torch.as_tensor(X / 16.0), torch.as_tensor(y), NETWORKS[name]().double()
    step = torch.optim.LBFGS(net.parameters(), max_iter=100, history_size=20, line_search_fn="strong_wolfe")

    def loss():
        step.zero_grad()
        value = F.cross_entropy(net(X), y) + DECAY / 2 * sum(part.square().sum() for part in net.parameters())
        value.backward()
        return value

    step.step(loss)
    return net, X, y


@pytest.mark.parametrize("name", ["softmax", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mlp", "cnn"))])
def test_defaults_solve_gradients_on_digits(name):
    net, X, y = trained(name)
    theta = list(net.parameters())
    b = torch.stack(
        [flat(torch.autograd.grad(F.cross_entropy(net(X[i : i + 1]), y[i : i + 1]), theta)) for i in (0, 8)]
    )
    settings = {"hessian_perturbation": 1e-2, "loss": "cross_entropy", "weight_decay": DECAY}
    expected = HessianInverter("direct", **settings).fit(net, (X, y)).transform(b)
    x, info = HessianInverter("lissa", **settings).fit(net, (X, y)).solve(b)
    assert ((x - expected).norm(dim=1) / expected.norm(dim=1)).max() <= 0.05
    # 8 minibatches an epoch, and a look that costs as much; the scale took at most 12 products on each of 8.
    assert 2 * int(info["n_iter"].max()) + 96 <= 10_000 and info["converged"].all()


def flat(parts):
    return torch.cat([part.reshape(-1) for part in parts])
