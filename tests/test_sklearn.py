"""The scikit-learn contract: check_estimator without exceptions, searches, pipelines, clones, pickles."""

import copy
import pickle
import warnings

import joblib
import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import estimator_html_repr
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch.utils.data import TensorDataset

from skinvert import HessianInverter, PerSampleGradient
from skinvert.methods import CG

ESTIMATORS = [
    HessianInverter(method, hessian_perturbation=shift) for method in ("auto", "direct", "cg") for shift in (0.0, 0.5)
]


@parametrize_with_checks(ESTIMATORS)
def test_check_estimator(estimator, check):
    with warnings.catch_warnings():
        # The checks fit fewer rows than columns: A is singular at λ = 0, and says so.
        for category in (scipy.linalg.LinAlgWarning, ConvergenceWarning):
            warnings.simplefilter("ignore", category)
        check(estimator)


# -- problems ----------------------------------------------------------------------------------------------------------


class CountedLinear(torch.nn.Linear):
    """Counts the deep copies of itself."""

    copies = 0

    def __deepcopy__(self, memo):
        type(self).copies += 1
        return self


def classification(dtype=torch.float64, layer=torch.nn.Linear):
    net = torch.nn.Sequential(layer(3, 4), torch.nn.Tanh(), layer(4, 2)).to(dtype)
    generator = np.random.default_rng(0)
    X, y = generator.standard_normal((30, 3)), generator.integers(0, 2, 30)
    return net, torch.from_numpy(X).to(dtype).numpy(), y


def inverter_of(net, method="direct", shift=0.1):
    return HessianInverter(method, shift, model=net, loss="cross_entropy", curvature="ggn")


def search_over(net, n_jobs=None):
    grid = {"hessian_perturbation": [0.1, 1.0]}
    return GridSearchCV(inverter_of(net), grid, cv=3, n_jobs=n_jobs, error_score="raise")


def right_sides(net, k=3):
    p = sum(parameter.numel() for parameter in net.parameters())
    return np.random.default_rng(1).standard_normal((k, p))


@pytest.fixture
def copies(monkeypatch):
    """Return a count of the deep copies of tensors and of ``CountedLinear``."""
    counts = []
    monkeypatch.setattr(CountedLinear, "copies", 0)
    for owner in (torch.Tensor, torch.nn.Parameter):
        original = owner.__deepcopy__

        def counted(self, memo, original=original):
            counts.append(type(self))
            return original(self, memo)

        monkeypatch.setattr(owner, "__deepcopy__", counted)
    return lambda: len(counts) + CountedLinear.copies


# -- searches ----------------------------------------------------------------------------------------------------------


def test_the_counter_of_copies_counts(copies):
    copy.deepcopy([CountedLinear(1, 1), torch.zeros(1), torch.nn.Parameter(torch.zeros(1))])
    assert copies() >= 3


def test_grid_search_never_copies_the_model(copies):
    net, X, y = classification(layer=CountedLinear)
    search = search_over(net).fit(X, y)
    assert copies() == 0
    assert search.best_estimator_.model is net


def test_grid_search_runs_on_score():
    net, X, y = classification()
    expected = [
        inverter_of(net, shift=0.1).fit(X[train], y[train]).score(X[test], y[test]) for train, test in KFold(3).split(X)
    ]
    results = search_over(net).fit(X, y).cv_results_
    received = [results[f"split{i}_test_score"][0] for i in range(3)]
    np.testing.assert_allclose(received, expected, rtol=1e-12)


def test_grid_search_over_a_dataset_equals_arrays():
    # scikit-learn indexes a data set into a list of (x, y), with y=None.
    net, X, y = classification()
    expected = search_over(net).fit(X, y).cv_results_["mean_test_score"]
    data = TensorDataset(torch.from_numpy(X), torch.from_numpy(y))
    received = search_over(net).fit(data).cv_results_["mean_test_score"]
    np.testing.assert_allclose(received, expected, rtol=1e-12)


def test_grid_search_in_two_processes_equals_one():
    net, X, y = classification()
    expected = search_over(net).fit(X, y).cv_results_["mean_test_score"]
    received = search_over(net, n_jobs=2).fit(X, y).cv_results_["mean_test_score"]
    np.testing.assert_allclose(received, expected, rtol=1e-12)


def test_grid_search_over_a_setting_of_a_method():
    net, X, y = classification()
    search = GridSearchCV(inverter_of(net, CG(rtol=1e-6)), {"method__maxiter": [50, 100]}, cv=2, error_score="raise")
    assert np.isfinite(search.fit(X, y).best_score_)


# -- pipelines and outputs ---------------------------------------------------------------------------------------------


def test_pipeline_equals_its_steps():
    X = np.random.default_rng(0).standard_normal((20, 3))
    scaled = StandardScaler().fit_transform(X)
    expected = HessianInverter("direct", 0.1).fit(scaled).transform(scaled)
    received = make_pipeline(StandardScaler(), HessianInverter("direct", 0.1)).fit_transform(X)
    np.testing.assert_allclose(received, expected, rtol=1e-12)


def test_gradients_and_inverter_in_a_row():
    net, X, y = classification()
    rows = PerSampleGradient(net, loss="cross_entropy").fit_transform(X, y)
    pipeline = make_pipeline(PerSampleGradient(net, loss="cross_entropy"), HessianInverter("direct", 0.1))
    expected = HessianInverter("direct", 0.1).fit_transform(rows)
    np.testing.assert_allclose(pipeline.fit(X, y).transform((X, y)), expected, rtol=1e-10)


@pytest.mark.parametrize("with_model", [True, False])
def test_set_output_names_the_columns(with_model):
    pandas = pytest.importorskip("pandas")
    net, X, y = classification()
    inverter = inverter_of(net).fit(X, y) if with_model else HessianInverter("direct", 0.1).fit(X)
    b = right_sides(net) if with_model else X
    received = inverter.set_output(transform="pandas").transform(b)
    assert isinstance(received, pandas.DataFrame)
    assert list(received.columns) == list(inverter.get_feature_names_out())


def test_set_output_survives_a_clone():
    pandas = pytest.importorskip("pandas")
    X = np.random.default_rng(0).standard_normal((20, 3))
    inverter = clone(HessianInverter("direct", 0.1).set_output(transform="pandas"))
    assert isinstance(inverter.fit_transform(X), pandas.DataFrame)


# -- clones and parameters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [HessianInverter, PerSampleGradient])
def test_clone_of_a_fitted_one_is_unfitted_and_shares_model_and_loss(kind, copies):
    X, y = classification()[1:]
    net = torch.nn.Linear(3, 2).double()
    loss = torch.nn.CrossEntropyLoss(weight=torch.ones(2, dtype=torch.float64))
    fitted = kind(model=net, loss=loss).set_params(batch_size=7).fit(X, y)
    before = copies()
    duplicate = clone(fitted)
    assert copies() == before, "clone copied a tensor"
    assert duplicate.model is net
    assert duplicate.loss is loss
    assert duplicate.batch_size == 7
    with pytest.raises(NotFittedError):
        duplicate.transform((X, y))


def test_clone_gives_the_method_its_own_settings():
    inverter = HessianInverter(CG(rtol=1e-3))
    duplicate = clone(inverter).set_params(method__rtol=1e-9)
    assert (inverter.method.rtol, duplicate.method.rtol) == (1e-3, 1e-9)


def test_fit_leaves_the_parameters_alone():
    net, X, y = classification()
    inverter = HessianInverter(CG(), model=net, loss="cross_entropy", curvature="ggn", hessian_perturbation=1)
    before = inverter.get_params(deep=False)
    inverter.fit(X, y)
    assert all(inverter.get_params(deep=False)[name] is value for name, value in before.items())


@pytest.mark.parametrize("kind", [HessianInverter, PerSampleGradient])
def test_every_parameter_can_be_set_and_read_back(kind):
    marks = {name: object() for name in kind().get_params(deep=False)}
    assert kind().set_params(**marks).get_params(deep=False) == marks


@pytest.mark.parametrize("fitted", [True, False])
@pytest.mark.parametrize("kind", [HessianInverter, PerSampleGradient])
def test_reprs_show_what_was_set(kind, fitted):
    X, y = classification()[1:]
    estimator = kind(model=torch.nn.Linear(3, 2).double(), loss="cross_entropy", batch_size=7)
    if fitted:
        estimator.fit(X, y)
    for text in (repr(estimator), estimator_html_repr(estimator)):
        assert kind.__name__ in text
        assert "batch_size" in text


# -- pickles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["direct", "cg"])
@pytest.mark.parametrize("with_model", [True, False])
def test_pickled_inverter_transforms_bit_identically(method, with_model):
    net, X, y = classification()
    inverter = inverter_of(net, method).fit(X, y) if with_model else HessianInverter(method, 0.1).fit(X)
    b = right_sides(net) if with_model else X
    expected = inverter.transform(b)
    received = pickle.loads(pickle.dumps(inverter)).transform(b)
    np.testing.assert_array_equal(received, expected)


def test_pickled_factorisation_leaves_out_model_and_data():
    net, X, y = classification()
    fitted = HessianInverter("direct", 0.1, curvature="ggn", loss="cross_entropy").fit(net, (X, y))
    large = pickle.dumps(fitted)
    grown = HessianInverter("direct", 0.1, curvature="ggn", loss="cross_entropy")
    more = pickle.dumps(grown.fit(net, (np.repeat(X, 100, axis=0), np.repeat(y, 100))))
    assert not hasattr(pickle.loads(large), "curvature_")
    assert abs(len(more) - len(large)) < 1000


@pytest.mark.parametrize(
    "call",
    [
        lambda inverter, b, X, y: inverter.residual(b, b),
        lambda inverter, b, X, y: inverter.score(X, y),
    ],
    ids=["residual", "score"],
)
def test_loaded_factorisation_says_to_fit_again(call):
    net, X, y = classification()
    loaded = pickle.loads(pickle.dumps(inverter_of(net).fit(X, y)))
    with pytest.raises(ValueError, match="call `fit` again"):
        call(loaded, right_sides(net), X, y)


def test_loaded_matrix_free_inverter_keeps_its_curvature():
    net, X, y = classification()
    b = right_sides(net)
    inverter = inverter_of(net, "cg").fit(X, y)
    loaded = pickle.loads(pickle.dumps(inverter))
    x = loaded.transform(b)
    np.testing.assert_allclose(loaded.residual(b, x), inverter.residual(b, x), rtol=1e-6)
    assert loaded.score(X, y) == pytest.approx(inverter.score(X, y), rel=1e-12)


def test_pickled_per_sample_gradient_transforms_bit_identically():
    net, X, y = classification()
    fitted = PerSampleGradient(net, loss="cross_entropy").fit(X, y)
    received = pickle.loads(pickle.dumps(fitted)).transform((X, y))
    np.testing.assert_array_equal(received, fitted.transform((X, y)))


# -- arrays ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["direct", "cg"])
def test_memory_mapped_arrays_work_and_stay_as_they_are(method, tmp_path):
    net, X, y = classification()
    b = right_sides(net)
    expected = inverter_of(net, method).fit(X, y).transform(b)
    joblib.dump((X, y, b), tmp_path / "arrays")
    X_map, y_map, b_map = joblib.load(tmp_path / "arrays", mmap_mode="r")
    received = inverter_of(net, method).fit(X_map, y_map).transform(b_map)
    np.testing.assert_array_equal(received, expected)


def test_memory_mapped_inverter_transforms(tmp_path):
    X = np.random.default_rng(0).standard_normal((20, 3))
    fitted = HessianInverter("direct", 0.1).fit(X)
    joblib.dump(fitted, tmp_path / "inverter")
    loaded = joblib.load(tmp_path / "inverter", mmap_mode="r")
    np.testing.assert_array_equal(loaded.transform(X), fitted.transform(X))


@pytest.mark.parametrize("method", ["direct", "cg"])
def test_rows_alone_equal_rows_together(method):
    net, X, y = classification()
    b = right_sides(net, 5)
    inverter = inverter_of(net, method).fit(X, y)
    together = inverter.transform(b)
    alone = np.concatenate([inverter.transform(row[None]) for row in b])
    np.testing.assert_allclose(alone, together, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("with_model", [True, False])
def test_array_in_array_out_of_the_same_dtype(dtype, with_model):
    net, X, y = classification()
    inverter = inverter_of(net).fit(X, y) if with_model else HessianInverter("direct", 0.1).fit(X)
    received = inverter.transform((right_sides(net) if with_model else X).astype(dtype))
    assert isinstance(received, np.ndarray)
    assert received.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_model", [True, False])
def test_tensor_in_tensor_out_of_the_same_dtype(dtype, with_model):
    net, X, y = classification()
    inverter = inverter_of(net).fit(X, y) if with_model else HessianInverter("direct", 0.1).fit(X)
    b = torch.from_numpy(right_sides(net) if with_model else X).to(dtype)
    received = inverter.transform(b)
    assert isinstance(received, torch.Tensor)
    assert (received.dtype, received.device) == (dtype, b.device)


def test_integers_are_taken_as_floats():
    X = np.arange(12).reshape(4, 3) % 5
    expected = HessianInverter("direct", 0.1).fit(X.astype(float)).transform(X.astype(float))
    received = HessianInverter("direct", 0.1).fit(X).transform(X)
    np.testing.assert_array_equal(received, expected)
