"""Bars of long work: each with a total and an estimate, closed whatever ends it, and one over all passes of scores."""

import re

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from tqdm import tqdm

from skinvert import HessianInverter, HessianInverterCV, InfluenceFunction, PerSampleGradient
from skinvert._progress import progress, progress_by
from skinvert.influence.output import Destination
from skinvert.methods import CG, Arnoldi, LiSSA, Nystroem
from skinvert.metrics import leave_one_out


@pytest.fixture
def bars(monkeypatch):
    """Every bar that is made, by its description, with how far it came and whether it was closed."""
    made = []

    class Bar(tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "mininterval": 0})
            self.closed = False
            made.append(self)

        def close(self):
            self.closed = True
            super().close()

    monkeypatch.setattr("skinvert._progress.tqdm", Bar)
    return made


def of(bars, name):
    return [(bar.n, bar.total) for bar in bars if bar.desc == name]


def problem(n=30):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    return net, torch.randn(n, 3), torch.randint(0, 2, (n,))


def inverter(method="direct", **settings):
    given = {"hessian_perturbation": 0.5, "curvature": "ggn", "loss": "cross_entropy", "batch_size": 10, **settings}
    return HessianInverter(method, verbose=1, **given)


def fitted(method="direct", **settings):
    net, X, y = problem()
    return inverter(method, **settings).fit(net, (X, y))


def influence(removal="first_order", **settings):
    net, X, y = problem()
    quiet = inverter().set_params(verbose=0)
    return InfluenceFunction(quiet, removal=removal, verbose=1, **settings).fit(net, (X, y)), (X, y)


# -- every long work has a bar with a total ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "settings", "name", "total"),
    [
        ("direct", {"curvature": "hessian"}, "layers", 3),
        ("ekfac", {}, "layers", 3),
        ("kfac", {}, "layers", 3),
        ("harmonic_mean", {"curvature": "auto"}, "per-sample gradients", 3),
        (Arnoldi(rank=5, krylov_dimension=10), {}, "Lanczos", None),
        (Nystroem(rank=5), {}, "sketch of rank 5", None),
    ],
)
def test_fits(bars, capfd, method, settings, name, total):
    net, X, y = problem()
    inverter(method, **settings).fit(net, (X, y))
    assert of(bars, "loss and gradient")[0] == (3, 3)
    ((done, of_all),) = of(bars, name)
    assert 0 < done <= of_all
    assert total in (None, of_all)
    assert all(bar.closed for bar in bars)


@pytest.mark.parametrize(
    ("method", "name"),
    [("cg", "conjugate gradients"), ("minres", "minimal residuals"), (LiSSA(maxiter=2000), "lissa")],
)
def test_solves_and_paths(bars, capfd, method, name):
    found = fitted(method)
    b = torch.randn(2, 26)
    found.solve(b)
    assert all(total for _, total in of(bars, name))
    assert of(bars, name)
    if name != "conjugate gradients":  # whose path is one run
        found.path(b, [0.5, 1.0, 2.0])
        assert of(bars, "path") == [(3, 3)]


def test_a_preconditioned_path(bars, capfd):
    fitted(CG(preconditioner="jacobi")).path(torch.randn(2, 26), [0.5, 1.0])
    assert of(bars, "path") == [(2, 2)]


def test_a_hessian_of_other_layers(bars, capfd):
    _, X, y = problem()
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.PReLU(), torch.nn.Linear(4, 2))
    inverter(curvature="hessian").fit(net, (X, y))
    ((done, total),) = of(bars, "products with the identity")
    assert done == total > 0


def test_the_rest(bars, capfd, monkeypatch):
    net, X, y = problem()
    PerSampleGradient(net, loss="cross_entropy", batch_size=10, verbose=1).fit_transform(X, y)
    assert of(bars, "per-sample gradients") == [(3, 3)]
    HessianInverterCV([0.1, 1.0], cv=3, verbose=1).fit(X.numpy())
    assert of(bars, "folds") == [(3, 3)]
    monkeypatch.setattr("skinvert.solvers.extremes.EXACT_SIZE", 5)
    fitted("cg").spectrum(n_probes=4, steps=5)
    assert of(bars, "spectral density") == [(4, 4)]
    fitted("cg").quadratic(torch.randn(3, 26))
    assert of(bars, "quadratic forms") == [(3, 3)]
    model = LogisticRegression().fit(X.numpy(), y.numpy())
    leave_one_out(model, X.numpy(), y.numpy(), X.numpy(), y.numpy(), rows=[0, 1, 2], verbose=1)
    assert of(bars, "retraining") == [(3, 3)]


# -- one bar over all the passes of scores -------------------------------------------------------------------------


@pytest.mark.parametrize("removal", ["first_order", "newton"])
def test_one_bar_counts_the_scores_of_every_chunk(bars, capfd, removal):
    found, (X, y) = influence(removal, memory=1)  # a row at a time: as many passes as rows
    found.transform((X[:4], y[:4]))
    assert of(bars, "scores") == [(4 * 30, 4 * 30)]
    found.top((X[:4], y[:4]), k=2)
    assert of(bars, "scores") == 2 * [(4 * 30, 4 * 30)]


def test_it_begins_where_an_interrupted_file_ended(bars, capfd, tmp_path, monkeypatch):
    found, (X, y) = influence(memory=1)
    write, written = Destination.write, []

    def interrupted(self, *block):
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(block)
        write(self, *block)

    monkeypatch.setattr(Destination, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        found.transform((X[:4], y[:4]), out=tmp_path / "scores.npy")
    monkeypatch.setattr(Destination, "write", write)
    entries = sum(block[2].numel() for block in written)
    found.transform((X[:4], y[:4]), out=tmp_path / "scores.npy")
    bar = [bar for bar in bars if bar.desc == "scores"][-1]
    assert bar.initial == entries
    assert bar.total == 120


def test_rows_are_counted_one_by_one(bars, capfd):
    found, _ = influence()
    found.self_influence()
    assert of(bars, "rows") == [(30, 30)]
    found.leverage()
    assert of(bars, "rows")[1:] == [(30, 30)]


def test_a_bar_says_how_long_it_will_take(bars, capfd):
    bar = progress(range(4), "counting", 1)
    list(bar)
    # "2/4 [00:00<00:00, ...it/s]": done, all, so far, still.
    assert re.search(r"counting.*\d/4 \[\d\d:\d\d<\d\d:\d\d", capfd.readouterr().err)


# -- what ends it early --------------------------------------------------------------------------------------------


def stop(*_, **__):
    raise KeyboardInterrupt


def in_a_fit(patch):
    net, X, y = problem()
    patch("skinvert.curvature.objective.check_rows_alone", stop)
    return lambda: inverter().fit(net, (X, y))


def in_a_solve(patch):
    ready = fitted("cg")
    patch("skinvert.solvers.row_cg.RowRun.step", stop)
    return lambda: ready.solve(torch.randn(2, 26))


def in_scores(patch):
    ready, data = influence()
    patch("skinvert.influence.output.Destination.write", stop)
    return lambda: ready.transform(data)


def in_retraining(patch):
    _, X, y = problem()
    X, y = X.numpy(), y.numpy()
    model = LogisticRegression().fit(X, y)
    patch("skinvert.metrics.trainers._outcome", stop)
    return lambda: leave_one_out(model, X, y, X, y, verbose=1)


@pytest.mark.parametrize("where", [in_a_fit, in_a_solve, in_scores, in_retraining])
def test_ctrl_c_closes_the_bars(bars, capfd, monkeypatch, where):
    work = where(monkeypatch.setattr)
    del bars[:]
    # The traceback is kept, as an interactive session keeps it, and with it every frame and its loop.
    with pytest.raises(KeyboardInterrupt) as kept:
        work()
    assert kept.traceback
    assert bars
    assert all(bar.closed for bar in bars)


def test_an_outer_bar_stays_where_an_inner_error_is_caught(bars, capfd):
    ready = fitted("cg")
    del bars[:]
    for _ in progress(range(2), "outer", 1):
        with pytest.raises(ValueError, match="finite"):
            ready.solve(torch.full((1, 26), torch.nan))
        assert not bars[0].closed
    assert bars[0].closed


def test_without_verbose_nothing_is_between():
    steps = [1, 2]
    assert type(progress(steps, "none", 0)) is type(iter(steps))
    assert type(progress_by(steps, int, "none", 0, 3)) is type(iter(steps))
    assert list(progress(np.arange(2), "none", 0)) == [0, 1]
