"""scikit-learn's array API dispatch: what is given in a library's arrays comes back in them."""

import json
import subprocess
import sys

import numpy as np
import pytest
import sklearn
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skinvert import HessianInverter, HessianInverterCV, InfluenceFunction, PerSampleGradient, load

ROWS = np.random.default_rng(0).standard_normal((20, 3))
B = np.random.default_rng(1).standard_normal((4, 3))


@pytest.fixture(autouse=True)
def _dispatch(monkeypatch):
    # scikit-learn asks for it beside its own setting, and its older versions for a package.
    monkeypatch.setenv("SCIPY_ARRAY_API", "1")
    try:
        with sklearn.config_context(array_api_dispatch=True):
            pass
    except ImportError as error:
        pytest.skip(str(error))


def strict():
    return pytest.importorskip("array_api_strict")


def expected(method="direct"):
    return HessianInverter(method, 0.1).fit(ROWS)


CHECKS = """
import json, warnings
from sklearn.utils.estimator_checks import check_estimator
from skinvert import HessianInverter, HessianInverterCV
warnings.simplefilter("ignore")
found = []
for estimator in (HessianInverter(), HessianInverter("cg"), HessianInverter("direct", 0.5), HessianInverterCV(cv=2)):
    found += check_estimator(estimator, on_fail=None)
named = [(str(one["status"]), one["check_name"], str(one["exception"])) for one in found]
print(json.dumps([one for one in named if "array_api" in one[1]]))
"""


def test_scikit_learns_checks_expect_no_failure():
    strict()
    shown = subprocess.run([sys.executable, "-c", CHECKS], capture_output=True, text=True, check=True)
    found = json.loads(shown.stdout)
    assert [one for one in found if one[0] not in ("passed", "skipped")] == []
    if sklearn.__version__ >= "1.9":
        # Of four estimators: NumPy, two of strict arrays, two of torch's, mixed, and another library than the fit's.
        assert sum(one[0] == "passed" for one in found) == 28


@pytest.mark.parametrize("method", ["direct", "cg", "arnoldi"])
def test_arrays_of_the_standard_stay_of_their_library(method):
    xp, plain = strict(), expected(method)
    with sklearn.config_context(array_api_dispatch=True):
        inverter = HessianInverter(method, 0.1).fit(xp.asarray(ROWS))
        b = xp.asarray(B)
        x, info = inverter.solve(b)
        found = {
            "transform": (inverter.transform(b), plain.transform(B)),
            "solve": (x, plain.solve(B).x),
            "residual": (info["residual"], plain.solve(B).info["residual"]),
            "path": (inverter.path(b, [0.1, 1.0]), plain.path(B, [0.1, 1.0])),
            "inverse_transform": (inverter.inverse_transform(b), plain.inverse_transform(B)),
        }
    for name, (received, wanted) in found.items():
        assert type(received) is type(b), name
        np.testing.assert_array_equal(np.asarray(received), wanted, err_msg=name)


def test_weights_and_scores():
    xp, weights = strict(), np.arange(20.0)
    plain = HessianInverter("direct", 0.1).fit(ROWS, sample_weight=weights)
    with sklearn.config_context(array_api_dispatch=True):
        inverter = HessianInverter("direct", 0.1).fit(xp.asarray(ROWS), sample_weight=xp.asarray(weights))
        assert inverter.score(xp.asarray(ROWS)) == plain.score(ROWS)
    assert plain.score(torch.from_numpy(ROWS)) == plain.score(ROWS)


def test_a_pipeline_of_tensors_is_one():
    rows = torch.from_numpy(ROWS)
    wanted = make_pipeline(StandardScaler(), HessianInverter("direct", 0.1)).fit_transform(ROWS)
    pipeline = make_pipeline(StandardScaler(), HessianInverter("direct", 0.1))
    with sklearn.config_context(array_api_dispatch=True):
        received = pipeline.fit(rows).transform(rows)
        assert isinstance(pipeline[0].mean_, torch.Tensor)
    assert isinstance(received, torch.Tensor)
    np.testing.assert_allclose(received.numpy(), wanted, rtol=1e-12, atol=1e-14)


def test_another_library_than_that_of_the_fit_is_refused_under_dispatch_alone(tmp_path):
    inverter = HessianInverter("direct", 0.1).fit(torch.from_numpy(ROWS))
    wanted = expected().transform(B)
    np.testing.assert_array_equal(inverter.transform(B), wanted)
    inverter.save(tmp_path / "inverter")
    with sklearn.config_context(array_api_dispatch=True):
        for method in ("transform", "inverse_transform"):
            must = r"\(\) must use the same namespace as those passed to fit\(\), torch. Got numpy"
            with pytest.raises(ValueError, match=rf"HessianInverter.{method}{must}"):
                getattr(inverter, method)(B)
        # A file does not say.
        np.testing.assert_array_equal(load(tmp_path / "inverter").transform(B), wanted)


def test_eigenvalues_are_of_the_rows_library_under_dispatch_alone(tmp_path):
    rows = torch.from_numpy(ROWS)
    wanted = HessianInverter("arnoldi", 0.1).fit(rows).eigenvalues_
    assert isinstance(wanted, np.ndarray)
    with sklearn.config_context(array_api_dispatch=True):
        inverter = HessianInverter("arnoldi", 0.1).fit(rows)
    assert isinstance(inverter.eigenvalues_, torch.Tensor)
    np.testing.assert_array_equal(inverter.eigenvalues_.numpy(), wanted)
    inverter.save(tmp_path / "inverter")
    np.testing.assert_array_equal(load(tmp_path / "inverter").eigenvalues_, wanted)


def test_without_dispatch_such_arrays_are_taken_as_numpys():
    received = expected().transform(strict().asarray(B))
    assert isinstance(received, np.ndarray)
    np.testing.assert_array_equal(received, expected().transform(B))


def test_a_search_keeps_the_library_too():
    xp, weights = strict(), np.arange(20.0) + 1
    plain = HessianInverterCV([0.1, 1.0], cv=2).fit(ROWS, sample_weight=weights)
    with sklearn.config_context(array_api_dispatch=True):
        search = HessianInverterCV([0.1, 1.0], cv=2).fit(xp.asarray(ROWS), sample_weight=xp.asarray(weights))
        b = xp.asarray(B)
        received = search.transform(b)
        assert type(received) is type(search.inverse_transform(b)) is type(b)
        with pytest.raises(ValueError, match=r"HessianInverterCV.transform\(\) must use the same namespace"):
            search.transform(B)
        with pytest.raises(ValueError, match=r"HessianInverterCV.inverse_transform\(\) must use the same namespace"):
            search.inverse_transform(B)
    np.testing.assert_array_equal(np.asarray(received), plain.transform(B))
    assert search.hessian_perturbation_ == plain.hessian_perturbation_


@pytest.mark.parametrize("kind", [Ridge, LogisticRegression])
def test_a_model_that_was_fitted_on_tensors(kind):
    # As scikit-learn leaves it under dispatch: its attributes are tensors.
    y = (ROWS[:, 0] > 0).astype(int)
    model = kind().fit(ROWS, y)
    expected = InfluenceFunction().fit(model, (ROWS, y)).transform((ROWS, y))
    for name in ("coef_", "intercept_", "classes_"):
        if name in vars(model):
            setattr(model, name, torch.as_tensor(getattr(model, name)))
    data = torch.from_numpy(ROWS), torch.from_numpy(y)
    with sklearn.config_context(array_api_dispatch=True):
        received = InfluenceFunction().fit(model, data).transform(data)
    assert isinstance(received, torch.Tensor)
    np.testing.assert_array_equal(received.numpy(), expected)


def test_what_models_are_given_is_torchs():
    net, y = torch.nn.Linear(3, 2).double(), torch.arange(20) % 2
    with sklearn.config_context(array_api_dispatch=True):
        gradients = PerSampleGradient(net, loss="cross_entropy").fit(torch.from_numpy(ROWS), y)
        assert isinstance(gradients.transform((torch.from_numpy(ROWS), y)), torch.Tensor)
        received = gradients.transform((strict().asarray(ROWS), y))
    # Of another library they are read as NumPy's are, and the tag does not say otherwise.
    assert isinstance(received, np.ndarray)
    assert not gradients.__sklearn_tags__().array_api_support
    assert not InfluenceFunction().__sklearn_tags__().array_api_support
