"""Files and pickles of a search: what it chose, without model, splitter and scorer."""

import json
import pickle

import numpy as np
import pytest
import safetensors.numpy
import skops.io
import torch
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import KFold

import skinvert
from skinvert import HessianInverterCV
from skinvert.encoding import LeftOut
from skinvert.persistence import _checksum


def searched(model=True, **settings):
    """Return a fitted search, and right-hand sides."""
    rng = np.random.default_rng(0)
    if not model:
        X = rng.standard_normal((20, 3))
        return HessianInverterCV([0.1, 1.0], **settings).fit(X), rng.standard_normal((2, 3))
    net = torch.nn.Linear(3, 2).double()
    X, y = rng.standard_normal((20, 3)), rng.integers(0, 2, 20)
    search = HessianInverterCV([0.1, 1.0], loss="cross_entropy", curvature="ggn", **settings)
    return search.fit(net, (X, y)), rng.standard_normal((2, 8))


@pytest.mark.parametrize("model", [True, False])
@pytest.mark.parametrize(
    "settings", [{}, {"cv": KFold(3), "method": "arnoldi"}, {"scoring": lambda estimator, X, y=None: 1.0}]
)
def test_a_search_loads_as_it_was(model, settings, tmp_path):
    fitted, b = searched(model, **settings)
    fitted.set_output(transform="pandas").save(tmp_path / "file")
    loaded = skinvert.load(tmp_path / "file")
    assert type(loaded) is HessianInverterCV
    expected = fitted.transform(b)
    assert list(loaded.transform(b).columns) == list(expected.columns)
    np.testing.assert_array_equal(loaded.transform(b), expected)
    np.testing.assert_array_equal(loaded.path(b, [0.3]), fitted.path(b, [0.3]))
    for name in ("hessian_perturbation_", "best_score_", "best_index_", "n_splits_", "n_samples_", "n_features_in_"):
        assert getattr(loaded, name) == getattr(fitted, name), name
    for key, values in fitted.cv_results_.items():
        assert type(loaded.cv_results_[key]) is type(values), key
        np.testing.assert_array_equal(loaded.cv_results_[key], values)
    assert list(loaded.get_feature_names_out()) == list(fitted.get_feature_names_out())


def test_a_loaded_search_says_what_was_left_out(tmp_path):
    fitted, _ = searched(cv=KFold(3))
    fitted.save(tmp_path / "file")
    loaded, X, y = skinvert.load(tmp_path / "file"), np.ones((9, 3)), np.arange(9) % 2
    with pytest.raises(ValueError, match=r"cv of a loaded inverter.*KFold.*set_params\(cv="):
        loaded.fit(torch.nn.Linear(3, 2).double(), (X, y))
    loaded.set_params(cv=3).fit(torch.nn.Linear(3, 2).double(), (X, y))
    assert loaded.n_splits_ == 3


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: HessianInverterCV(), NotFittedError, "not fitted"),
        (lambda: searched(method="cg")[0], ValueError, "one that factorises"),
    ],
)
def test_a_search_that_cannot_be_saved_is_named(build, error, message, tmp_path):
    with pytest.raises(error, match=message):
        build().save(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_a_search_pickles_without_the_model():
    fitted, b = searched()
    loaded = pickle.loads(pickle.dumps(fitted))
    assert loaded.model is None
    assert "_model" not in vars(loaded.inverter_)
    assert not hasattr(loaded, "curvature_")
    np.testing.assert_array_equal(loaded.transform(b), fitted.transform(b))
    kept = HessianInverterCV([0.1, 1.0], model=torch.nn.Linear(3, 2).double(), loss="mse", method="direct")
    kept.fit(np.random.default_rng(0).standard_normal((20, 3)), np.zeros((20, 2)))
    assert isinstance(pickle.loads(pickle.dumps(kept)).model, LeftOut)


def test_a_search_in_skops(tmp_path):
    fitted, b = searched()
    skops.io.dump(fitted, tmp_path / "file")
    trusted = [name for name in skops.io.get_untrusted_types(file=tmp_path / "file") if name.startswith("skinvert.")]
    np.testing.assert_array_equal(skops.io.load(tmp_path / "file", trusted=trusted).transform(b), fitted.transform(b))
    with pytest.raises(ValueError, match="without torch models"):
        skops.io.dump(searched(method="cg")[0], tmp_path / "file")


@pytest.mark.parametrize("entry", ["best_index_", "hessian_perturbation_"])
def test_a_search_that_contradicts_its_inverse_is_refused(entry, tmp_path):
    fitted, _ = searched(model=False)
    fitted.save(tmp_path / "file")
    arrays = safetensors.numpy.load_file(tmp_path / "file")
    with safetensors.safe_open(tmp_path / "file", "numpy") as file:
        header = file.metadata()
    state = json.loads(header["state"])
    pairs = dict(state["root"][1])
    if entry == "best_index_":
        pairs[entry] = 1 - fitted.best_index_
    else:
        pairs["inverter_"][1] = [[key, 0.5 if key == entry else value] for key, value in pairs["inverter_"][1]]
    state["root"][1] = [[key, value] for key, value in pairs.items()]
    header["state"] = json.dumps(state)
    # With the checksum that fits: what someone could write on purpose.
    header["sha256"] = _checksum(header, arrays)
    safetensors.numpy.save_file(arrays, tmp_path / "file", header)
    with pytest.raises(ValueError, match=r"λ (chosen|of the inverse)"):
        skinvert.load(tmp_path / "file")
