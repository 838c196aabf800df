"""Rows in Dask arrays give what they give in memory, block by block, and what was fitted goes to each worker once."""

import os
import resource
import time
from collections import Counter

import cloudpickle
import dask
import dask.array as da
import numpy as np
import pytest
import sklearn
import torch
from dask.distributed import Client, LocalCluster
from sklearn.frozen import FrozenEstimator
from torch import nn

from skinvert import HessianInverter, HessianInverterCV, InfluenceFunction, PerSampleGradient

N, D, C, P = 60, 4, 3, 15
METHODS = ["direct", "cg", "ekfac"]


def data(n=N):
    rng = np.random.default_rng(0)
    return rng.standard_normal((n, D)), rng.integers(C, size=n)


def net():
    torch.manual_seed(0)
    return nn.Linear(D, C).double()


def inverter(method="direct"):
    return HessianInverter(method, 0.1, curvature="ggn", loss="cross_entropy")


def rows(k=10):
    return np.random.default_rng(1).standard_normal((k, P))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("of", ["transform", "inverse_transform"])
def test_right_hand_sides(method, of):
    fitted, b = inverter(method).fit(net(), data()), rows()
    lazy = getattr(fitted, of)(da.from_array(b, chunks=(3, 7)))
    assert isinstance(lazy, da.Array) and lazy.shape == b.shape and lazy.dtype == b.dtype
    assert lazy.chunks == ((3, 3, 3, 1), (P,))
    parts = [getattr(fitted, of)(b[start : start + 3]) for start in range(0, 10, 3)]
    np.testing.assert_array_equal(lazy.compute(), np.concatenate(parts))
    np.testing.assert_allclose(lazy.compute(), getattr(fitted, of)(b), rtol=1e-6)


def test_right_hand_sides_of_another_dtype_give_the_dtype_that_they_give_in_memory():
    fitted, b = inverter().fit(net(), data()), rows()
    for each in (b.astype(np.float32), b.round().astype(np.int64)):
        lazy = fitted.transform(da.from_array(each, chunks=4))
        assert lazy.dtype == lazy.compute().dtype == fitted.transform(each).dtype


def test_nothing_is_computed_before_it_is_asked_for():
    X, y = data()
    influence = InfluenceFunction(inverter()).fit(net(), (X, y))
    unknown = da.map_blocks(lambda block: 1 / 0, da.zeros((10, D)), dtype=float, meta=np.empty((0, D)))
    lazy = influence.transform((unknown, da.zeros(10, dtype=int)))
    with pytest.raises(ZeroDivisionError):
        lazy.compute()


@pytest.mark.parametrize("form", ["pair", "two arguments", "targets in memory"])
def test_gradients_and_scores(form):
    X, y = data()
    X_test, y_test = data(23)
    lazy_X, lazy_y = da.from_array(X_test, chunks=(7, 3)), da.from_array(y_test, chunks=11)
    given = {"pair": ((lazy_X, lazy_y),), "two arguments": (lazy_X, lazy_y), "targets in memory": (lazy_X, y_test)}
    for fitted, width in (
        (PerSampleGradient(net(), loss="cross_entropy").fit(X, y), P),
        (InfluenceFunction(inverter()).fit(net(), (X, y)), N),
        (InfluenceFunction(inverter(), removal="newton", measurement="margin").fit(net(), (X, y)), N),
        (InfluenceFunction(inverter()).fit([net(), net()], (X, y)), N),
    ):
        lazy = fitted.transform(*given[form])
        assert lazy.chunks == ((7, 7, 7, 2), (width,))
        expected = fitted.transform((X_test, y_test))
        assert lazy.dtype == expected.dtype
        np.testing.assert_allclose(lazy.compute(), expected, rtol=1e-9, atol=1e-12)


# -- what is fitted, and set, after the array was made --------------------------------------------------------------


def test_fits_that_follow_do_not_reach_what_is_lazy():
    G, b = np.random.default_rng(0).standard_normal((N, P)), rows()
    inverter, shifts, lazy = HessianInverter("direct"), [0.1, 1.0, 10.0], []
    for shift in shifts:
        inverter.set_params(hessian_perturbation=shift).fit(G)
        lazy.append(inverter.transform(da.from_array(b, chunks=(4, -1))))
    for shift, received in zip(shifts, dask.compute(*lazy), strict=True):
        expected = HessianInverter("direct", shift).fit(G).transform(b)
        np.testing.assert_allclose(received, expected, rtol=1e-12)


@pytest.mark.parametrize("of", ["the influence", "an ensemble", "a frozen inverter"])
def test_fits_and_settings_that_follow_do_not_reach_lazy_scores(of):
    X, y = data()
    test = (da.from_array(X, chunks=(20, -1)), y)
    own = inverter().fit(net(), (X, y))
    influence = InfluenceFunction(FrozenEstimator(own) if of == "a frozen inverter" else inverter())
    influence.fit([net(), net()] if of == "an ensemble" else net(), (X, y))
    expected, lazy = influence.transform((X, y)), influence.transform(test)
    own.set_params(hessian_perturbation=10.0).fit(net(), (X, y))
    for member in influence.members_ if of == "an ensemble" else [influence]:
        member.set_params(removal="newton", measurement="margin")
    if of == "the influence":
        influence.inverter_.set_params(hessian_perturbation=10.0).fit(net(), (X, y))
    np.testing.assert_allclose(lazy.compute(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("normed", [False, True])
def test_lazy_gradients_are_those_at_the_parameters_of_the_call(normed):
    X, y = data()
    model = nn.utils.parametrizations.weight_norm(net()) if normed else net()
    gradient = PerSampleGradient(model, loss="cross_entropy").fit(X, y)
    test = (da.from_array(X, chunks=(20, -1)), y)
    for _ in range(2):
        expected, lazy = gradient.transform(X, y), gradient.transform(test)
        with torch.no_grad():
            for tensor in model.parameters():
                tensor.mul_(2)
        assert np.abs(gradient.transform(X, y) - expected).max() > 0.01
        # As another process has it; torch pickles no module of a norm.
        elsewhere = lazy if normed else cloudpickle.loads(cloudpickle.dumps(lazy))
        for received in (lazy.compute(scheduler="sync"), lazy.compute(), elsewhere.compute()):
            np.testing.assert_allclose(received, expected, rtol=1e-12, atol=1e-15)


def test_frozen_parameters_too_large_to_copy_are_found_to_have_changed():
    X, y = data()
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, C)).double()
    model[0].requires_grad_(False)
    gradient = PerSampleGradient(model, loss="cross_entropy").fit(X, y)
    with sklearn.config_context(working_memory=0):
        lazy = gradient.transform((da.from_array(X, chunks=(20, -1)), y))
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(ValueError, match="frozen parameters must be those of fit"):
        lazy.compute(scheduler="sync")


@pytest.mark.parametrize("container", ["pandas", "polars"])
@pytest.mark.parametrize("where", ["set_output", "config"])
def test_lazy_output_stays_lazy_whatever_container_is_set(container, where):
    pytest.importorskip(container)
    X, y = data()
    unknown = da.map_blocks(lambda block: 1 / 0, da.zeros((10, P)), dtype=float, meta=np.empty((0, P)))
    test, G = (da.from_array(X, chunks=(20, -1)), da.from_array(y, chunks=20)), rows()
    fits = [
        (inverter().fit(net(), (X, y)), da.from_array(G, chunks=4)),
        (HessianInverterCV([0.1, 1.0], cv=2).fit(G), da.from_array(G, chunks=4)),
        (PerSampleGradient(net(), loss="cross_entropy").fit(X, y), test),
        (InfluenceFunction(inverter()).fit(net(), (X, y)), test),
    ]
    expected = [fitted.transform(lazy).compute() for fitted, lazy in fits]
    if where == "set_output":
        for fitted, _ in fits:
            fitted.set_output(transform=container)
    with sklearn.config_context(transform_output=container if where == "config" else "default"):
        for (fitted, lazy), values in zip(fits, expected, strict=True):
            received = fitted.transform(lazy)
            assert isinstance(received, da.Array)
            np.testing.assert_array_equal(received.compute(), values)
        for fitted, _ in fits[:2]:
            fitted.transform(unknown)
            assert type(fitted.transform(G)).__module__.startswith(container)
        assert isinstance(HessianInverter("direct", 0.1).fit_transform(da.from_array(G, chunks=4)), da.Array)
        assert isinstance(fits[2][0].fit_transform(*test), da.Array)
        assert type(fits[2][0].fit_transform(X, y)).__module__.startswith(container)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, C), nn.Linear(D, C)

    def forward(self, a, b):
        return self.a(a) + self.b(b)


def test_inputs_in_a_mapping():
    X, y = data()
    torch.manual_seed(0)
    model = TwoInputs().double()
    inputs = {"a": X[:, :2].copy(), "b": X}
    fitted = PerSampleGradient(model, loss="cross_entropy").fit(inputs, y)
    lazy = fitted.transform({key: da.from_array(part, chunks=13) for key, part in inputs.items()}, y)
    np.testing.assert_allclose(lazy.compute(), fitted.transform(inputs, y), rtol=1e-12)


def test_no_rows():
    fitted = inverter().fit(net(), data())
    lazy = fitted.transform(da.zeros((0, P)))
    assert lazy.compute().shape == (0, P)


def test_what_cannot_be_lazy_says_so():
    X, y = data()
    lazy_X, lazy_y = da.from_array(X, chunks=7), da.from_array(y, chunks=7)
    fitted, b = inverter().fit(net(), (X, y)), da.from_array(rows(), chunks=4)
    influence = InfluenceFunction(inverter()).fit(net(), (X, y))
    with pytest.raises(TypeError, match="must be in memory. Got a Dask array instead. Try `transform`"):
        fitted.solve(b)
    with pytest.raises(ValueError, match=r"of shape \(k, 15\). Got shape \(10, 5\)"):
        fitted.transform(b[:, :5])
    with pytest.raises(ValueError, match="known chunks of rows.*compute_chunk_sizes"):
        fitted.transform(b[b[:, 0] > 0])
    with pytest.raises(ValueError, match="of 60 rows. Got one of 5"):
        influence.transform((lazy_X, y[:5]))
    with pytest.raises(ValueError, match="out must be None for Dask arrays.*to_zarr"):
        influence.transform((lazy_X, lazy_y), out="scores.npy")
    whole = InfluenceFunction(inverter(), measurement=lambda outputs, targets: outputs.sum()).fit(net(), (X, y))
    with pytest.raises(ValueError, match="Each block of rows is scored alone"):
        whole.transform((lazy_X, lazy_y))
    outputs = PerSampleGradient(net(), loss="output").fit(X)
    with pytest.raises(TypeError, match="map_blocks"):
        outputs.transform(lazy_X)


@pytest.mark.parametrize("of", ["gradients", "scores"])
def test_what_no_block_could_be_raises_at_once_as_in_memory(of):
    X, y = data()
    fitted = (
        PerSampleGradient(net(), loss="cross_entropy").fit(X, y)
        if of == "gradients"
        else InfluenceFunction(inverter()).fit(net(), (X, y))
    )

    def lazy(part):
        if isinstance(part, dict):
            return {key: lazy(value) for key, value in part.items()}
        if isinstance(part, tuple):
            return tuple(map(lazy, part))
        return None if part is None else da.from_array(part, chunks=(7,) * part.ndim)

    for given in (X, (X,), (X, None), {"input": X}, ({"input": X}, None), (X, y, y)):
        with pytest.raises((TypeError, ValueError)) as expected:
            fitted.transform(given)
        with pytest.raises(expected.type) as received:
            fitted.transform(lazy(given))
        assert str(received.value).replace("y Array", "y ndarray") == str(expected.value)
    labelled = {"input": X, "labels": y}
    np.testing.assert_allclose(fitted.transform(lazy(labelled)), fitted.transform(labelled), rtol=1e-9, atol=1e-12)
    lazy_X, lazy_y = lazy((X, y))
    with pytest.raises(ValueError, match="known chunks of rows.*compute_chunk_sizes"):
        fitted.transform((lazy_X, lazy_y[lazy_y > 0]))
    with pytest.raises(ValueError, match="must be of rows. Got one number"):
        fitted.transform((lazy_X, lazy_y[0]))


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_what_a_client_was_sent_computes_without_it():
    # Before there is another client, of the tests below: Dask does not go back to it.
    fitted, b = inverter().fit(net(), data()), rows()
    with Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None):
        lazy = fitted.transform(da.from_array(b, chunks=(3, P)))
        expected = lazy.compute()
        np.testing.assert_array_equal(lazy.compute(scheduler="sync"), expected)
        np.testing.assert_array_equal(lazy.compute(scheduler="threads"), expected)
        # As other processes have it.
        elsewhere = cloudpickle.loads(cloudpickle.dumps(lazy))
        with pytest.raises(RuntimeError, match="must be on this worker. Got its name alone"):
            elsewhere.compute(scheduler="sync")
    np.testing.assert_array_equal(lazy.compute(scheduler="sync"), expected)
    np.testing.assert_array_equal(cloudpickle.loads(cloudpickle.dumps(lazy)).compute(scheduler="sync"), expected)


# -- a cluster of two processes ------------------------------------------------------------------------------------


class Counted(nn.Linear):
    """Writes down each process that unpickles it."""

    log = ""

    def __setstate__(self, state):
        super().__setstate__(state)
        with open(state["path"], "a", encoding="utf-8") as file:
            file.write(f"{os.getpid()}\n")


@pytest.fixture(scope="module")
def client():
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        with Client(cluster) as client:
            yield client


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_a_cluster_gives_what_memory_gives_and_gets_what_was_fitted_once(client, tmp_path):
    X, y = data()
    torch.manual_seed(0)
    model = Counted(D, C).double()
    model.path = str(tmp_path / "log")
    influence = InfluenceFunction(inverter()).fit(model, (X, y))
    lazy = influence.transform((da.from_array(X, chunks=(2, D)), da.from_array(y, chunks=2)))
    # On each worker before there is any work.
    assert 2 in [len(workers) for workers in client.who_has().values()]
    lazy.to_zarr(str(tmp_path / "scores.zarr"), compute=False).compute()
    np.testing.assert_allclose(da.from_zarr(str(tmp_path / "scores.zarr")).compute(), influence.transform((X, y)))
    workers = set(client.run(os.getpid).values())
    unpickled = {pid: n for pid, n in Counter(read(model.path)).items() if int(pid) in workers}
    # The model lies in it twice, as the user's and at θ, and a worker that hands it on may unpickle it again; with each
    # of the 30 blocks it would be 60 times.
    assert unpickled and max(unpickled.values()) <= 4

    fitted, b = inverter("cg").fit(net(), (X, y)), rows(12)
    solved = fitted.transform(da.from_array(b, chunks=(3, P))).compute()
    np.testing.assert_allclose(solved, fitted.transform(b), rtol=1e-6)


def read(path):
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().split()
    except FileNotFoundError:
        return []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_two_gigabytes_of_scores_go_to_zarr_with_less_in_each_worker(client, tmp_path):
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((5_000, 20)), rng.integers(10, size=5_000)
    torch.manual_seed(0)
    model = nn.Linear(20, 10).double()
    influence = InfluenceFunction(inverter()).fit(model, (X, y))
    test = da.random.default_rng(0).standard_normal((50_000, 20), chunks=(1_000, 20))
    targets = da.zeros(50_000, dtype=int, chunks=1_000)
    lazy = influence.transform((test, targets))
    assert lazy.nbytes == 2_000_000_000
    start = time.monotonic()
    lazy.to_zarr(str(tmp_path / "scores.zarr"), compute=False).compute()
    peaks = client.run(lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    print(f"{time.monotonic() - start:.0f} s, peaks {[f'{peak / 1e9:.2f} GB' for peak in peaks.values()]}")
    assert max(peaks.values()) < 1.5e9
    some = slice(20_000, 20_010)
    expected = influence.transform((test[some].compute(), targets[some].compute()))
    found = da.from_zarr(str(tmp_path / "scores.zarr"))[some].compute()
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-15)


def test_a_search_maps_blocks_too():
    X = np.random.default_rng(0).standard_normal((20, 4))
    search = HessianInverterCV([0.1, 1.0], cv=2).fit(X)
    lazy = da.from_array(X, chunks=(8, -1))
    for method in ("transform", "inverse_transform"):
        received = getattr(search, method)(lazy)
        assert isinstance(received, da.Array)
        np.testing.assert_allclose(received.compute(), getattr(search, method)(X), rtol=1e-12)
