"""Ctrl-C, or an error of the loader, at any moment: the estimator is what it was, and nothing of the user's changes."""

import numpy as np
import pytest
import sklearn
import torch
from facts import EVERY, SEMIDEFINITE, TIGHT
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from torch import nn
from torch.utils.data import DataLoader, Dataset

from skinvert import HessianInverter, HessianInverterCV, InfluenceFunction

N, BATCH = 24, 4


class Rows(Dataset):
    """Rows that raise when so many of them have been read."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.X = torch.randn(N, 4, generator=generator, dtype=torch.float64)
        self.y = torch.randint(3, (N,), generator=generator)
        self.read, self.last, self.error = 0, None, KeyboardInterrupt

    def __len__(self):
        return N

    def __getitem__(self, index):
        self.read += 1
        if self.last is not None and self.read > self.last:
            raise self.error
        return self.X[index], self.y[index]

    def stop_after(self, last, error=KeyboardInterrupt):
        self.read, self.last, self.error = 0, last, error
        return DataLoader(self, BATCH, shuffle=True)


def network():
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    net[0].weight.grad = torch.ones_like(net[0].weight)
    return net.train()


def scene(net):
    """Return all that a fit must leave as it is, bit by bit."""
    tensors = [*net.named_parameters(), *net.named_buffers()]
    return [
        [(name, id(t), t._version, t.requires_grad, t.detach().numpy().tobytes()) for name, t in tensors],
        [None if t.grad is None else t.grad.numpy().tobytes() for t in net.parameters()],
        [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in net.modules()],
        torch.get_rng_state().numpy().tobytes(),
        [np.random.get_state()[k].tobytes() if k == 1 else np.random.get_state()[k] for k in range(5)],
        (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_num_threads()),
    ]


def inverter(name, **settings):
    settings = {"curvature": SEMIDEFINITE[name], "loss": "cross_entropy", **settings}
    return HessianInverter(clone(TIGHT[name]), 1.0, **settings)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_an_interrupt_at_any_batch_leaves_all_as_it_was(name, streamed):
    if streamed and name == "lissa":
        # It draws samples, and so holds the data in memory.
        streamed = False
    data, net = Rows(), network()
    b = np.random.default_rng(0).standard_normal((2, sum(t.numel() for t in net.parameters())))
    with sklearn.config_context(working_memory=0.0005 if streamed else 64):
        fitted = inverter(name).fit(net, data.stop_after(None))
        reads, expected, before = data.read, fitted.transform(b), scene(net)
        # In the first batch, within and at the end of the first pass, in later passes, and at the last row of all.
        for last in sorted({0, N // 2, N - 1, reads // 3, reads // 2, reads - 1}):
            fresh = inverter(name)
            with pytest.raises(KeyboardInterrupt):
                fresh.fit(net, data.stop_after(last))
            with pytest.raises(NotFittedError):
                fresh.transform(b)
            assert vars(fresh).keys() == vars(inverter(name)).keys()
            with pytest.raises(KeyboardInterrupt):
                fitted.fit(net, data.stop_after(last))
            assert scene(net) == before
            data.stop_after(None)
            np.testing.assert_array_equal(fitted.transform(b), expected)
        np.testing.assert_array_equal(fresh.fit(net, data.stop_after(None)).transform(b), expected)


@pytest.mark.parametrize(
    "build",
    [
        lambda: HessianInverterCV([0.1, 1.0], cv=2, method="direct", curvature="ggn", loss="cross_entropy"),
        lambda: InfluenceFunction(HessianInverter("ekfac", 0.1, loss="cross_entropy")),
    ],
    ids=["search", "influence"],
)
def test_what_fits_inverters_is_as_it_was_too(build):
    data, net = Rows(), network()
    fitted = build().fit(net, data.stop_after(None))
    reads, before, names = data.read, scene(net), {name: id(value) for name, value in vars(fitted).items()}
    for last in (0, N // 2, reads // 2, reads - 1):
        with pytest.raises(KeyboardInterrupt):
            fitted.fit(net, data.stop_after(last))
        assert {name: id(value) for name, value in vars(fitted).items()} == names
        assert scene(net) == before


ITERATING = ["cg", "minres", "lissa"]


@pytest.mark.parametrize("name", [*ITERATING, "ekfac"])
def test_an_interrupt_in_a_solve_leaves_the_inverter_working(name, monkeypatch):
    data, net = Rows(), network()
    b = np.random.default_rng(0).standard_normal((2, sum(t.numel() for t in net.parameters())))
    fitted = inverter(name, batch_size=BATCH).fit(net, data.stop_after(None))
    expected, before = fitted.transform(b), scene(net)
    kind = type(fitted.curvature_)
    original, calls = kind._shares, []

    def interrupted(self, *args):
        calls.append(1)
        for count, share in enumerate(original(self, *args)):
            if len(calls) == interrupted.last and count == 1:
                raise KeyboardInterrupt
            yield share

    # In the first product, before anything is kept of the curvature, and later.
    for last in (1, 2):
        with monkeypatch.context() as patch:
            interrupted.last = last
            calls.clear()
            again = inverter(name, batch_size=BATCH).fit(net, data.stop_after(None))
            patch.setattr(kind, "_shares", interrupted)
            for one in (fitted, again):
                calls.clear()
                try:
                    one.solve(b)
                except KeyboardInterrupt:
                    pass
                else:
                    # A factorisation asks for one product alone, to judge.
                    assert last > len(calls)
        for one in (fitted, again):
            np.testing.assert_array_equal(one.transform(b), expected)
        assert scene(net) == before


@pytest.mark.parametrize("name", ["arnoldi", "nystroem", "direct", "diagonal"])
def test_an_interrupt_in_the_products_of_a_fit(name, monkeypatch):
    data, net = Rows(), network()
    b = np.random.default_rng(0).standard_normal((2, sum(t.numel() for t in net.parameters())))
    fitted = inverter(name).fit(net, data.stop_after(None))
    expected, before = fitted.transform(b), scene(net)
    for target in ("eigh", "qr", "cholesky_ex"):
        with monkeypatch.context() as patch:
            patch.setattr(torch.linalg, target, lambda *args, **kwargs: (_ for _ in ()).throw(KeyboardInterrupt))
            try:
                fitted.fit(net, data.stop_after(None))
            except KeyboardInterrupt:
                pass
        np.testing.assert_array_equal(fitted.transform(b), expected)
        assert scene(net) == before


def test_an_interrupted_checkpoint_stays_for_the_next_fit(tmp_path):
    data, net, path = Rows(), network(), tmp_path / "fit"
    with sklearn.config_context(working_memory=0.0005):
        fitted = inverter("ekfac").fit(net, data.stop_after(None))
        with pytest.raises(KeyboardInterrupt):
            inverter("ekfac", checkpoint=path).fit(net, data.stop_after(data.read - 1))
        assert path.exists()
        again = inverter("ekfac", checkpoint=path).fit(net, data.stop_after(None))
        assert not path.exists()
        b = np.ones((1, fitted.n_features_in_))
        np.testing.assert_array_equal(again.transform(b), fitted.transform(b))
