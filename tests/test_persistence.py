"""Files: every method in every format, loaded where the model's class is not; damage, interruptions, other files."""

import copy
import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import joblib
import numpy as np
import pytest
import safetensors.numpy
import skops.io
import torch
from facts import EVERY, ITERATIVE, ON_ROWS
from joblib import Parallel, delayed
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV

import skinvert
from skinvert import HessianInverter
from skinvert.methods import CG, Arnoldi, Direct, Nystroem
from skinvert.methods.dense import CholeskyInverse
from skinvert.operators import Dense
from skinvert.persistence import _checksum, load_state

# -- the table: every method × fit × format, loaded in another process -------------------------------------------------

FORMATS = ["pickle", "joblib", "joblib mmap", "skops", "safetensors"]
CASES = [
    (name, fit, form)
    for name in EVERY
    for fit in ("rows", "model")
    for form in FORMATS
    if fit == "model" or name in ON_ROWS
]

FOREIGN = """
import torch

class ForeignNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(12, 4).double()

    def forward(self, x):
        return self.fc(x)

def foreign_loss(output, target):
    return torch.nn.functional.cross_entropy(output, target)
"""

ELSEWHERE = """
import importlib.util, json, pickle, sys
import joblib, numpy as np, skops.io, torch
import skinvert

def from_skops(path):
    unknown = skops.io.get_untrusted_types(file=path)
    return skops.io.load(path, trusted=[name for name in unknown if name.startswith("skinvert.")])

LOADERS = {
    "pickle": lambda path: pickle.load(open(path, "rb")),
    "joblib": joblib.load,
    "joblib mmap": lambda path: joblib.load(path, mmap_mode="r"),
    "skops": from_skops,
    "safetensors": skinvert.load,
}

def outcome(path, form, expected):
    try:
        loaded = LOADERS[form](path)
        received = loaded.transform(expected["b"]), loaded.inverse_transform(expected["b"])
        names = loaded.get_feature_names_out()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    same = [np.array_equal(a, expected[key]) for a, key in zip(received, ("x", "image"))]
    return "identical" if all(same) and list(names) == list(expected["names"]) else f"different {same} {names}"

folder, threads, entries = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
torch.set_num_threads(threads)
assert importlib.util.find_spec("foreign_model") is None
found = {}
for where in ("elsewhere", "at home"):
    for file, form, expected in entries:
        with np.load(f"{folder}/{expected}") as arrays:
            found[f"{where}: {file}"] = outcome(f"{folder}/{file}", form, arrays)
    sys.path.append(f"{folder}/home")
print(json.dumps(found))
"""


def write(inverter, path, form):
    if form == "pickle":
        path.write_bytes(pickle.dumps(inverter))
    elif form == "skops":
        skops.io.dump(inverter, path)
    elif form == "safetensors":
        inverter.save(path)
    else:
        joblib.dump(inverter, path)


def fitted(name, fit, module):
    """Return a fitted inverter; λ is large, so that every method serves and none warns."""
    generator = np.random.default_rng(0)
    X, y = generator.standard_normal((30, 12)), generator.integers(0, 4, 30)
    if fit == "rows":
        return HessianInverter(name, 100.0).fit(X)
    torch.manual_seed(0)
    inverter = HessianInverter(name, 100.0, model=module.ForeignNet(), loss=module.foreign_loss)
    return inverter.fit(X, y)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What became of every case, elsewhere and at home, or the error of its save."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "home").mkdir()
    (folder / "home" / "foreign_model.py").write_text(FOREIGN)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder / "home")
        import foreign_model

        inverters = {(name, fit): fitted(name, fit, foreign_model) for name, fit, _ in CASES}
        found, entries = _written(inverters, folder)
    del sys.modules["foreign_model"]
    command = [sys.executable, "-c", ELSEWHERE, str(folder), str(torch.get_num_threads()), json.dumps(entries)]
    environment = {**os.environ, "PYTHONPATH": str(Path(skinvert.__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return {**found, **json.loads(done.stdout)}


def _written(inverters, folder):
    found, entries = {}, []
    for (name, fit), inverter in inverters.items():
        b = np.random.default_rng(1).standard_normal((7, inverter.n_features_in_))
        expected = f"{name}-{fit}.npz"
        names = np.asarray(inverter.get_feature_names_out(), dtype=str)
        x, image = inverter.transform(b), inverter.inverse_transform(b)
        np.savez(folder / expected, b=b, x=x, image=image, names=names)
        for form in FORMATS:
            file = f"{name}-{fit}.{form}"
            try:
                write(inverter, folder / file, form)
                entries.append([file, form, expected])
            except ValueError as error:
                found[f"elsewhere: {file}"] = found[f"at home: {file}"] = f"{type(error).__name__}: {error}"
    return found, entries


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("name", "fit", "form"), CASES, ids=[" ".join(case) for case in CASES])
def test_a_loaded_inverter_transforms_bit_identically(outcomes, name, fit, form):
    elsewhere, at_home = (outcomes[f"{where}: {name}-{fit}.{form}"] for where in ("elsewhere", "at home"))
    if name not in ITERATIVE:
        assert (elsewhere, at_home) == ("identical", "identical")
    elif form == "safetensors":
        assert "one that factorises" in elsewhere
        assert "Try pickle or joblib" in elsewhere
    elif fit == "rows":
        assert (elsewhere, at_home) == ("identical", "identical")
    elif form == "skops":
        assert "What skops writes must be without torch models" in elsewhere
    else:
        assert "No module named 'foreign_model'" in elsewhere
        assert at_home == "identical"


# -- what a file holds -------------------------------------------------------------------------------------------------


def on_rows(method="direct", **settings):
    X = np.random.default_rng(0).standard_normal((20, 3))
    return HessianInverter(method, 0.1, **settings).fit(X)


def on_model(model=None, method="direct", **settings):
    """Return an inverter, fitted, and its data."""
    torch.manual_seed(0)
    model = model or torch.nn.Linear(3, 2).double()
    generator = np.random.default_rng(0)
    X, y = generator.standard_normal((20, 3)), generator.integers(0, 2, 20)
    inverter = HessianInverter(method, 0.1, model=model, loss=torch.nn.CrossEntropyLoss(), **settings)
    return inverter.fit(X, y), X, y


def reloaded(inverter, tmp_path, form="safetensors"):
    write(inverter, tmp_path / "file", form)
    if form == "skops":
        return skops.io.load(tmp_path / "file", trusted=skops.io.get_untrusted_types(file=tmp_path / "file"))
    if form == "safetensors":
        return skinvert.load(tmp_path / "file")
    return joblib.load(tmp_path / "file")


SETTINGS = [
    {"dtype": torch.float32, "device": torch.device("cpu")},
    {"dtype": np.dtype("float32"), "device": "cpu"},
    {"dtype": "float64", "params": ["*bias*", "*weight*"], "batch_size": 5, "weight_decay": 0.5},
    {"curvature": "ggn", "random_state": 3, "method": Direct(rtol=1e-3)},
]


@pytest.mark.parametrize("form", ["pickle", "skops", "safetensors"])
@pytest.mark.parametrize("settings", SETTINGS, ids=["torch", "numpy", "plain", "method"])
def test_settings_and_what_was_fitted_come_back(settings, form, tmp_path):
    inverter, _, _ = on_model(**settings)
    loaded = reloaded(inverter, tmp_path, form)
    shared = {name: value for name, value in settings.items() if name != "method"}
    assert {name: loaded.get_params()[name] for name in shared} == shared
    assert repr(loaded.method) == repr(inverter.method)
    for name in ("gradient_norm_", "n_samples_", "parameter_names_", "curvature_name_", "hessian_perturbation_"):
        assert getattr(loaded, name) == getattr(inverter, name)
    b = torch.randn(2, 8, dtype=torch.float64)
    assert all(torch.equal(part, inverter.unflatten(b)[name]) for name, part in loaded.unflatten(b).items())


NUMPY = [
    {"hessian_perturbation": np.float64(0.1)},
    {"hessian_perturbation": np.int64(1), "batch_size": np.int64(5), "verbose": np.int64(0)},
    {"method": Direct(rtol=np.float32(1e-3)), "weight_decay": {"weight": np.float64(0.1)}},
    {"method": Arnoldi(rank=np.int64(3)), "random_state": np.int64(0)},
    {"method": Nystroem(rank=np.int32(3), random_state=np.int64(0)), "curvature": "ggn"},
]


@pytest.mark.parametrize("settings", NUMPY, ids=["float", "int", "direct", "arnoldi", "nystroem"])
def test_scalars_of_numpy_are_written_as_python_s(settings, tmp_path):
    # As a grid of `np.logspace` or `np.arange` sets them.
    inverter, X, y = on_model()
    inverter = clone(inverter).set_params(**settings).fit(X, y)
    loaded = reloaded(inverter, tmp_path)
    b = np.random.default_rng(1).standard_normal((2, 8))
    np.testing.assert_array_equal(loaded.transform(b), inverter.transform(b))
    given, received = inverter.get_params(), loaded.get_params()
    for name in {*settings, *(name for name in given if name.startswith("method__"))} - {"method"}:
        assert received[name] == given[name]
        assert type(received[name]).__module__ != "numpy"


def test_the_best_of_a_search_over_ranges_of_numpy_is_saved(tmp_path):
    X = np.random.default_rng(0).standard_normal((30, 4))
    grid = {"hessian_perturbation": np.logspace(-2, 0, 3), "method__rank": np.arange(2, 4)}
    best = GridSearchCV(HessianInverter(Arnoldi()), grid, cv=3).fit(X).best_estimator_
    np.testing.assert_array_equal(reloaded(best, tmp_path).transform(X), best.transform(X))


@pytest.mark.parametrize("form", ["skops", "safetensors"])
def test_names_of_columns_and_output_container_come_back(form, tmp_path):
    pandas = pytest.importorskip("pandas")
    X = pandas.DataFrame(np.random.default_rng(0).standard_normal((9, 2)), columns=["a", "b"])
    inverter = HessianInverter("direct", 0.1).set_output(transform="pandas").fit(X)
    pandas.testing.assert_frame_equal(reloaded(inverter, tmp_path, form).transform(X), inverter.transform(X))


@pytest.mark.parametrize("form", ["pickle", "skops", "safetensors"])
def test_a_spectrum_comes_back(form, tmp_path):
    X = np.ones((4, 3))
    inverter = HessianInverter("direct").fit(X)
    loaded = reloaded(inverter, tmp_path, form)
    np.testing.assert_array_equal(loaded.eigenvalues_, inverter.eigenvalues_)
    np.testing.assert_array_equal(loaded.transform(X), inverter.transform(X))


@pytest.mark.parametrize("form", ["skops", "safetensors"])
def test_only_our_own_classes_are_named(form, tmp_path):
    inverter, _, _ = on_model(dtype=np.dtype("float64"), device=torch.device("cpu"))
    write(inverter, tmp_path / "file", form)
    if form == "skops":
        named = skops.io.get_untrusted_types(file=tmp_path / "file")
    else:
        state = json.loads(header_of(tmp_path / "file")["state"])
        named = [f"skinvert.{name}" for name, _ in state["objects"]]
    assert named
    assert all(name.startswith("skinvert.") for name in named)


def test_a_tensor_keeps_its_order_in_memory(tmp_path):
    inverter = on_rows()
    factor = inverter.inverse_.cholesky
    assert not factor.is_contiguous()
    for form in ("pickle", "skops", "safetensors"):
        assert reloaded(inverter, tmp_path, form).inverse_.cholesky.stride() == factor.stride()


def test_a_map_of_a_file_is_not_written_to(tmp_path):
    write(on_rows(), tmp_path / "file", "joblib")
    expected = (tmp_path / "file").read_bytes()
    loaded = joblib.load(tmp_path / "file", mmap_mode="r")
    loaded.inverse_.curvature.matrix.zero_()
    assert (tmp_path / "file").read_bytes() == expected


def test_an_object_met_twice_is_one_object(tmp_path):
    inverter = on_rows()
    inverter.method = inverter.method_
    # The identity is its own basis of eigenvectors.
    A = torch.eye(3, dtype=torch.float64)
    inverter.inverse_ = CholeskyInverse(Dense(A), A, 0.1, 1e-6).at(0.1)
    inverter.inverse_.basis.rows = A
    loaded = reloaded(inverter, tmp_path)
    assert loaded.method is loaded.method_
    assert loaded.inverse_.basis.rows.data_ptr() == loaded.inverse_.source.matrix.data_ptr()
    # The matrix, its eigenvalues, and the answer.
    assert len(list(safetensors.safe_open(tmp_path / "file", framework="numpy").keys())) == 3


# -- model, loss and data stay behind ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["pickle", "safetensors"])
def test_a_later_fit_asks_for_what_was_left_out(form, tmp_path):
    inverter, X, y = on_model()
    loaded = reloaded(inverter, tmp_path, form)
    with pytest.raises(ValueError, match=r"model of a loaded inverter must be given again.*<Linear, left out"):
        loaded.fit(X, y)
    with pytest.raises(ValueError, match="loss of a loaded inverter must be given again"):
        clone(loaded).fit(inverter.model, (X, y))
    again = loaded.set_params(model=inverter.model, loss="cross_entropy").fit(X, y)
    np.testing.assert_array_equal(again.transform(np.eye(8)), inverter.transform(np.eye(8)))


def test_a_loaded_inverter_is_saved_again(tmp_path):
    inverter, _, _ = on_model()
    once = reloaded(inverter, tmp_path)
    twice = reloaded(once, tmp_path)
    assert repr(twice) == repr(once)
    np.testing.assert_array_equal(twice.transform(np.eye(8)), inverter.transform(np.eye(8)))


def test_an_unfitted_inverter_keeps_its_model():
    inverter, X, y = on_model()
    loaded = pickle.loads(pickle.dumps(clone(inverter)))
    expected = inverter.transform(np.eye(8))
    np.testing.assert_array_equal(loaded.fit(X, y).transform(np.eye(8)), expected)


def test_a_fitted_inverter_is_searched_by_two_processes():
    inverter, X, y = on_model(curvature="ggn")
    search = GridSearchCV(inverter, {"hessian_perturbation": [0.1, 1.0]}, cv=2, n_jobs=2).fit(X, y)
    alone = GridSearchCV(inverter, {"hessian_perturbation": [0.1, 1.0]}, cv=2).fit(X, y)
    np.testing.assert_array_equal(search.cv_results_["mean_test_score"], alone.cv_results_["mean_test_score"])
    assert search.best_estimator_.model is inverter.model


def test_a_copy_within_the_process_shares_the_tensors():
    inverse = on_rows().inverse_
    assert copy.copy(inverse).curvature is inverse.curvature


def test_a_fitted_inverter_transforms_in_a_worker():
    inverter, _, _ = on_model()
    (received,) = Parallel(n_jobs=2)([delayed(inverter.transform)(np.eye(8))])
    np.testing.assert_array_equal(received, inverter.transform(np.eye(8)))


# -- refusals ----------------------------------------------------------------------------------------------------------


class OwnDirect(Direct):
    """A user's own method."""


class OwnInverter(HessianInverter):
    """A user's own inverter."""


@pytest.mark.parametrize(
    ("build", "kind", "message"),
    [
        (lambda: HessianInverter("direct"), NotFittedError, "not fitted"),
        (lambda: on_rows(CG()), ValueError, "one that factorises.*Try pickle or joblib"),
        (lambda: on_rows(OwnDirect()), ValueError, "HessianInverter.method.*Got OwnDirect.*Try pickle or joblib"),
        (lambda: on_rows(random_state=np.random.RandomState(0)), ValueError, "random_state.*Got RandomState"),
        (lambda: OwnInverter("direct", 0.1).fit(np.eye(3)), TypeError, "Got OwnInverter"),
    ],
    ids=["unfitted", "matrix-free", "a class that is not ours", "a setting that is not plain", "subclass"],
)
def test_save_refuses(build, kind, message, tmp_path):
    with pytest.raises(kind, match=message):
        build().save(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_a_folder_and_a_missing_file_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="The folder of path must be one that exists"):
        on_rows().save(tmp_path / "nowhere" / "file")
    with pytest.raises(IsADirectoryError, match="path must be that of a file"):
        on_rows().save(tmp_path)
    with pytest.raises(FileNotFoundError, match="path must be a file that exists"):
        skinvert.load(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_the_error_without_safetensors_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for call in (lambda: on_rows().save(tmp_path / "file"), lambda: skinvert.load(__file__)):
        with pytest.raises(ImportError, match=r"skinvert\[persistence\]"):
            call()


@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_is_a_string_or_a_path(kind, tmp_path):
    inverter = on_rows()
    inverter.save(kind(tmp_path / "file"))
    np.testing.assert_array_equal(
        skinvert.load(kind(tmp_path / "file")).transform(np.eye(3)), inverter.transform(np.eye(3))
    )


def test_a_device_that_is_not_there_is_named(tmp_path):
    on_rows().save(tmp_path / "file")
    with pytest.raises(ValueError, match="device must be"):
        skinvert.load(tmp_path / "file", device="no such device")


def test_operators_move_to_the_device(tmp_path):
    on_rows().save(tmp_path / "file")
    kinds = {"HessianInverter": HessianInverter._file_fields()}
    _, state = load_state(tmp_path / "file", kinds, torch.device("meta"))
    inverse = state["inverse_"]
    assert inverse.device.type == inverse.curvature.matrix.device.type == inverse.cholesky.device.type == "meta"


def test_skops_refuses_a_torch_model_by_name(tmp_path):
    inverter, _, _ = on_model()
    with pytest.raises(ValueError, match="What skops writes must be without torch models.*Try pickle or joblib"):
        skops.io.dump(clone(inverter), tmp_path / "file")


@pytest.mark.cuda
def test_a_fit_on_the_gpu_loads_without_one_and_moves_back(tmp_path):
    X = np.random.default_rng(0).standard_normal((20, 3))
    inverter = HessianInverter("direct", 0.1, device="cuda").fit(X)
    for form in ("pickle", "skops", "safetensors"):
        loaded = reloaded(inverter, tmp_path, form)
        assert loaded.inverse_.curvature.matrix.device.type == loaded.inverse_.device.type == "cpu"
        np.testing.assert_allclose(loaded.transform(X), inverter.transform(X), rtol=1e-9)
    moved = skinvert.load(tmp_path / "file", device="cuda")
    assert moved.inverse_.curvature.matrix.is_cuda
    np.testing.assert_array_equal(moved.transform(X), inverter.transform(X))


# -- damaged, altered and other files ----------------------------------------------------------------------------------


def header_of(path):
    with safetensors.safe_open(path, framework="numpy") as file:
        return file.metadata()


def altered(path, header=None, arrays=None):
    """Write a sound safetensors file with another header or other arrays."""
    header = {**header_of(path), **(header or {})}
    arrays = {**safetensors.numpy.load_file(path), **(arrays or {})}
    safetensors.numpy.save_file(arrays, path, header)


@pytest.mark.parametrize("seed", range(4))
def test_250_truncations_and_flips_are_errors_or_change_nothing(seed, tmp_path):
    inverter, generator = on_rows(), np.random.default_rng(seed)
    inverter.save(tmp_path / "file")
    whole, expected = (tmp_path / "file").read_bytes(), inverter.transform(np.eye(3))
    failed = 0
    for trial in range(250):
        (tmp_path / "file").write_bytes(_damaged(whole, trial, generator))
        try:
            received = skinvert.load(tmp_path / "file").transform(np.eye(3))
        except ValueError as error:
            assert "Try" in str(error) or "save it again" in str(error) or "must be" in str(error)
            failed += 1
        else:
            np.testing.assert_array_equal(received, expected)
    assert failed >= 240


def _damaged(whole, trial, generator):
    if trial % 2:
        return whole[: generator.integers(len(whole))]
    data = np.frombuffer(whole, dtype=np.uint8).copy()
    # Half of them in the numbers, which are the smaller part of a small file.
    start = 0 if trial % 4 else 8 + int.from_bytes(whole[:8], "little")
    places = generator.integers(start, len(data), size=generator.integers(1, 9))
    data[places] ^= generator.integers(1, 256, size=len(places), dtype=np.uint8)
    return data.tobytes()


def _with_another_class(path):
    header = header_of(path)
    return {"state": header["state"].replace("methods.dense.CholeskyInverse", "os.system")}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"format": "pt"}, "a file that `save` wrote. Got a safetensors file of format 'pt'"),
        ({"version": "5"}, "of version 4. Got version 5 instead. Try a newer skinvert"),
        ({"version": "1"}, "of version 4. Got version 1 instead. Fit again and save again"),
        ({"version": "one"}, "Got a damaged one"),
        ({"kind": "Other"}, "do not fit their checksum"),
        ({"sha256": "0" * 64}, "do not fit their checksum"),
        (_with_another_class, "do not fit their checksum"),
    ],
    ids=["magic", "newer", "older", "no version", "kind", "checksum", "class"],
)
def test_an_altered_header_is_named(header, message, tmp_path):
    on_rows().save(tmp_path / "file")
    altered(tmp_path / "file", header(tmp_path / "file") if callable(header) else header)
    with pytest.raises(ValueError, match=message):
        skinvert.load(tmp_path / "file")


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: {"array0": 2 * arrays["array0"]},
        lambda arrays: {"array0": arrays["array0"].view(np.int64)},
        lambda arrays: {"array0": arrays["array0"].reshape(1, 9)},
        lambda arrays: {"array0": arrays["array1"], "array1": arrays["array0"]},
        lambda arrays: {"more": np.eye(1)},
    ],
    ids=["numbers", "dtype", "shape", "names", "one more"],
)
def test_altered_arrays_are_found(change, tmp_path):
    on_rows().save(tmp_path / "file")
    altered(tmp_path / "file", arrays=change(safetensors.numpy.load_file(tmp_path / "file")))
    with pytest.raises(ValueError, match="do not fit their checksum"):
        skinvert.load(tmp_path / "file")


@pytest.mark.parametrize("name", ["version", "kind", "state", "sha256"])
def test_a_header_without_an_entry_is_named(name, tmp_path):
    on_rows().save(tmp_path / "file")
    header = {key: value for key, value in header_of(tmp_path / "file").items() if key != name}
    safetensors.numpy.save_file(safetensors.numpy.load_file(tmp_path / "file"), tmp_path / "file", header)
    with pytest.raises(ValueError, match=f"Got a damaged one.*{name}"):
        skinvert.load(tmp_path / "file")


def signed(path, **header):
    """Alter the header and give it the checksum that fits: what someone could write on purpose."""
    header = {**header_of(path), **header}
    header["sha256"] = _checksum(header, safetensors.numpy.load_file(path))
    altered(path, header)


@pytest.mark.parametrize(
    "name",
    ["os.system", "skinvert.inverter.HessianInverter", "methods.base.Method", "persistence._Writer", "operators.np"],
)
def test_a_name_outside_the_table_is_never_looked_up(name, tmp_path):
    on_rows().save(tmp_path / "file")
    state = header_of(tmp_path / "file")["state"]
    signed(tmp_path / "file", state=state.replace("methods.dense.CholeskyInverse", name))
    with pytest.raises(ValueError, match="a state that cannot be read"):
        skinvert.load(tmp_path / "file")


@pytest.mark.parametrize("state", ["", "[]", "null", '{"root": null, "objects": []}', "[" * 100_000, '{"root": ["x"]}'])
def test_a_signed_state_that_is_none_is_an_error(state, tmp_path):
    on_rows().save(tmp_path / "file")
    signed(tmp_path / "file", state=state)
    with pytest.raises(ValueError, match="a state that cannot be read"):
        skinvert.load(tmp_path / "file")


def test_the_file_of_something_else_of_ours_is_named(tmp_path):
    on_rows().save(tmp_path / "file")
    signed(tmp_path / "file", kind="InfluenceFunction")
    with pytest.raises(ValueError, match="the file of a HessianInverter.*Got one of a InfluenceFunction"):
        skinvert.load(tmp_path / "file")


@pytest.mark.parametrize("content", [b"", b"x", b"\xff" * 100, pickle.dumps({"a": 1})], ids=["0", "1", "100", "pickle"])
def test_a_file_of_something_else_is_named(content, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match="must be a file as `save` wrote it"):
        skinvert.load(tmp_path / "file")


def test_safetensors_of_something_else_are_named(tmp_path):
    safetensors.numpy.save_file({"weight": np.eye(2)}, tmp_path / "file")
    with pytest.raises(ValueError, match="must be a file that `save` wrote. Got a safetensors file of format None"):
        skinvert.load(tmp_path / "file")


# -- interrupted saves -------------------------------------------------------------------------------------------------


def _half_written(arrays, path, header):
    Path(path).write_bytes(b"half")
    raise KeyboardInterrupt


def _refused(*paths):
    raise OSError("no space left on device")


@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize(
    ("target", "replacement", "error"),
    [
        ("safetensors.numpy.save_file", _half_written, KeyboardInterrupt),
        ("os.replace", _refused, OSError),
        ("os.fsync", _refused, OSError),
    ],
    ids=["writing", "renaming", "flushing"],
)
def test_an_interrupted_save_loses_nothing(target, replacement, error, existing, tmp_path, monkeypatch):
    inverter, other = on_rows(), on_rows(dtype="float32")
    if existing:
        inverter.save(tmp_path / "file")
    monkeypatch.setattr(target, replacement)
    with pytest.raises(error):
        other.save(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] * existing
    if existing:
        np.testing.assert_array_equal(
            skinvert.load(tmp_path / "file").transform(np.eye(3)), inverter.transform(np.eye(3))
        )


def test_a_save_takes_the_place_of_the_file_before(tmp_path):
    on_rows(dtype="float32").save(tmp_path / "file")
    (tmp_path / "file").chmod(0o640)
    (tmp_path / "link").symlink_to(tmp_path / "file")
    inverter = on_rows()
    inverter.save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    np.testing.assert_array_equal(skinvert.load(tmp_path / "file").transform(np.eye(3)), inverter.transform(np.eye(3)))


def test_a_new_file_has_the_permissions_of_any_other(tmp_path):
    on_rows().save(tmp_path / "file")
    (tmp_path / "other").touch()
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_nothing_is_warned_of(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reloaded(on_rows(), tmp_path)
