"""Searches, pipelines, clones, routing: the whole of scikit-learn around a model of any kind, over data of any form."""

import numpy as np
import pytest
import sklearn
import torch
from scipy.stats import loguniform
from sklearn.base import clone
from sklearn.datasets import load_digits, load_iris
from sklearn.exceptions import NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, KFold, RandomizedSearchCV, cross_val_score
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from skorch import NeuralNetBinaryClassifier, NeuralNetClassifier, NeuralNetRegressor
from skorch.helper import SliceDataset, SliceDict
from torch import nn
from torch.utils.data import TensorDataset

from skinvert import HessianInverter, PerSampleGradient, SharedModel, TorchTwiceDifferentiable, register_model

LAMBDAS = [0.03, 0.3, 3.0]


# -- data and models ---------------------------------------------------------------------------------------------------


class Named(nn.Module):
    """Two named inputs, as a SliceDict brings them."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(2, 3), nn.Linear(2, 3)

    def forward(self, left, right):
        return self.left(left) + self.right(right).tanh()


def flowers():
    X, y = load_iris(return_X_y=True)
    return (X[::3] - X.mean(0)).astype(np.float64), y[::3]


def digits():
    X, y = load_digits(return_X_y=True)
    keep = y < 3
    return X[keep][:45].reshape(-1, 1, 8, 8) / 16, y[keep][:45]


def vectors():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()


def images():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)).double()


def named():
    torch.manual_seed(0)
    return Named().double()


def arrays():
    return vectors(), *flowers()


def tensors():
    X, y = flowers()
    return vectors(), torch.from_numpy(X), torch.from_numpy(y)


def pictures():
    return images(), *digits()


def slice_dict():
    X, y = flowers()
    return named(), SliceDict(left=X[:, :2], right=X[:, 2:]), y


def slice_dataset():
    X, y = flowers()
    data = TensorDataset(torch.from_numpy(X), torch.from_numpy(y))
    return vectors(), SliceDataset(data), y


def logistic():
    X, y = flowers()
    y = np.array(["a", "b", "c"])[y]
    return LogisticRegression(max_iter=1000).fit(X, y), X, y


def skorch_net():
    X, y = flowers()
    net = NeuralNetClassifier(vectors(), criterion=nn.CrossEntropyLoss, max_epochs=2, verbose=0, train_split=None)
    return net.fit(X, y), X, y


def pipeline_of_scikit_learn():
    X, y = flowers()
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(X, y), X, y


FORMS = {
    form.__name__: form
    for form in (
        arrays,
        tensors,
        pictures,
        slice_dict,
        slice_dataset,
        logistic,
        skorch_net,
        pipeline_of_scikit_learn,
    )
}
if tuple(map(int, sklearn.__version__.split(".")[:2])) < (1, 7):
    # Its searches index arrays alone.
    del FORMS["tensors"]
ALL = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def loss_of(model):
    return "cross_entropy" if isinstance(model, nn.Module) else None


def inverter_of(model, **settings):
    return HessianInverter("direct", 0.1, model=model, loss=loss_of(model), curvature="ggn", **settings)


def rows_of(X, index):
    return SliceDict(**{key: value[index] for key, value in X.items()}) if isinstance(X, SliceDict) else X[index]


def by_hand(model, X, y, shifts, weights=None):
    """The mean score over three folds for each λ."""
    scores = np.zeros((len(shifts), 3))
    for j, (train, test) in enumerate(KFold(3).split(y)):
        for i, shift in enumerate(shifts):
            inverter = inverter_of(model).set_params(hessian_perturbation=shift)
            inner = (None, None) if weights is None else (weights[train], weights[test])
            inverter.fit(rows_of(X, train), y[train], inner[0])
            scores[i, j] = inverter.score(rows_of(X, test), y[test], inner[1])
    return scores.mean(1)


# -- searches ----------------------------------------------------------------------------------------------------------


@pytest.mark.one_in(3)
@ALL
@pytest.mark.parametrize("n_jobs", [1, 2])
def test_grid_search_over_every_form(form, n_jobs):
    model, X, y = form()
    expected = by_hand(model, X, y, LAMBDAS)
    search = GridSearchCV(inverter_of(model), {"hessian_perturbation": LAMBDAS}, cv=KFold(3), n_jobs=n_jobs)
    search.set_params(error_score="raise").fit(X, y)
    np.testing.assert_allclose(search.cv_results_["mean_test_score"], expected, rtol=1e-10)
    best = search.best_estimator_
    assert best.hessian_perturbation == LAMBDAS[int(expected.argmax())]
    assert search.transform(np.ones((2, best.n_features_in_))).shape == (2, best.n_features_in_)
    assert best.model is model


@pytest.mark.one_in(2)
@ALL
def test_randomized_search_over_every_form(form):
    model, X, y = form()
    distributions = {"hessian_perturbation": loguniform(1e-2, 1e1)}
    search = RandomizedSearchCV(inverter_of(model), distributions, n_iter=3, cv=KFold(3), random_state=0)
    search.set_params(error_score="raise").fit(X, y)
    drawn = [params["hessian_perturbation"] for params in search.cv_results_["params"]]
    np.testing.assert_allclose(search.cv_results_["mean_test_score"], by_hand(model, X, y, drawn), rtol=1e-10)


def test_cross_val_score():
    model, X, y = logistic()
    received = cross_val_score(inverter_of(model), X, y, cv=KFold(3), error_score="raise")
    assert received.mean() == pytest.approx(by_hand(model, X, y, [0.1])[0])


# -- models inside a grid ----------------------------------------------------------------------------------------------


def models_in_a_grid():
    X, y = flowers()
    # Labels as integers: the three kinds read the same data.
    classifier = LogisticRegression(max_iter=1000).fit(X, y)
    net = skorch_net()[0]
    yield "SharedModel of a classifier", SharedModel(classifier), classifier
    yield "FrozenEstimator of a classifier", FrozenEstimator(classifier), classifier
    yield "SharedModel of a net", SharedModel(net), net
    yield "FrozenEstimator of a net", FrozenEstimator(net), net
    yield "SharedModel of a module", SharedModel(TorchTwiceDifferentiable(vectors(), "cross_entropy")), None


IN_A_GRID = {name: (wrapped, model) for name, wrapped, model in models_in_a_grid()}


@pytest.mark.parametrize("name", IN_A_GRID)
def test_a_model_inside_a_param_grid(name):
    wrapped, model = IN_A_GRID[name]
    X, y = flowers()
    other = TorchTwiceDifferentiable(vectors(), "cross_entropy")
    grid = {"model": [SharedModel(other), wrapped]}
    search = GridSearchCV(HessianInverter("direct", 0.1, curvature="ggn"), grid, cv=KFold(3), error_score="raise")
    search.fit(X, y)
    inner = wrapped.model if isinstance(wrapped, SharedModel) else wrapped.estimator
    expected = [by_hand(each, X, y, [0.1])[0] for each in (other, inner)]
    np.testing.assert_allclose(search.cv_results_["mean_test_score"], expected, rtol=1e-10)
    assert model is None or inner is model


def test_a_module_in_a_shared_model_takes_a_loss():
    X, y = flowers()
    expected = inverter_of(vectors()).fit(X, y).curvature_.to_dense()
    received = HessianInverter("direct", 0.1, model=SharedModel(vectors()), loss="cross_entropy", curvature="ggn")
    torch.testing.assert_close(received.fit(X, y).curvature_.to_dense(), expected)


@pytest.mark.parametrize("form", [logistic, skorch_net], ids=["estimator", "net"])
def test_a_bare_fitted_model_in_a_grid_says_what_happened(form):
    model, X, y = form()
    search = GridSearchCV(inverter_of(None), {"model": [model]}, cv=2, error_score="raise")
    with pytest.raises(NotFittedError, match=r"`clone` of a fitted model is unfitted.*SharedModel\(model\)"):
        search.fit(X, y)


@pytest.mark.parametrize("wrap", [SharedModel, FrozenEstimator])
def test_a_wrapped_model_is_a_model_for_fit_and_for_gradients(wrap):
    model, X, y = logistic()
    expected = HessianInverter("direct").fit(model, (X, y)).curvature_.to_dense()
    received = HessianInverter("direct").fit(wrap(model), (X, y)).curvature_.to_dense()
    torch.testing.assert_close(received, expected)
    gradients = PerSampleGradient(wrap(model)).fit_transform(X, y)
    np.testing.assert_array_equal(gradients, PerSampleGradient(model).fit_transform(X, y))


def test_clone_and_repr_of_a_shared_model():
    shared = SharedModel(vectors())
    assert clone(shared) is shared
    assert shared.get_params() == {"model": shared.model}
    assert "Sequential" in repr(shared)


# -- models of one's own -----------------------------------------------------------------------------------------------


class Line:
    """A model that no library knows."""

    def __init__(self, slope):
        self.slope = slope


class Steeper(Line):
    """Found along the MRO."""


def adapt_line(line):
    net = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.constant_(net.weight, line.slope)
    return TorchTwiceDifferentiable(net, "mse")


def test_a_registered_model_is_adapted_along_the_mro():
    register_model(Line, adapt_line)
    X, y = np.array([[1.0], [3.0]]), np.zeros((2, 1))
    # d²/dw² of mean((w x − y)²).
    for model in (Line(2.0), Steeper(2.0), SharedModel(Steeper(2.0))):
        inverter = HessianInverter("direct").fit(model, (X, y))
        assert inverter.curvature_.to_dense().item() == 10.0
        assert inverter.gradient_norm_ == 20.0
    with pytest.raises(ValueError, match="loss must be left at its default.*A Line brings its own"):
        HessianInverter(loss="mse").fit(Line(2.0), (X, y))


def test_register_model_checks_its_arguments():
    with pytest.raises(TypeError, match="model_type must be a type"):
        register_model("Line", adapt_line)
    with pytest.raises(TypeError, match="adapter must be a function"):
        register_model(Line, None)
    register_model(Line, lambda line: "nothing")
    with pytest.raises(TypeError, match="registered for a Line returns must be a TwiceDifferentiable"):
        HessianInverter().fit(Line(1.0), (np.ones((2, 1)), np.ones((2, 1))))


# -- whole pipelines as models -----------------------------------------------------------------------------------------


def final_estimators():
    X, y = flowers()
    binary = (y > 0).astype(np.float64)
    torch.manual_seed(0)
    one_logit = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)).double()
    regression = nn.Linear(4, 1).double()
    settings = {"max_epochs": 2, "verbose": 0, "train_split": None}
    yield LogisticRegression(max_iter=1000), X, y
    yield Ridge(), X, y.astype(float)
    probabilities = nn.Sequential(vectors(), nn.Softmax(1))
    yield NeuralNetClassifier(probabilities, **settings), X, y
    yield NeuralNetClassifier(vectors(), criterion=nn.CrossEntropyLoss, **settings), X, y
    yield NeuralNetBinaryClassifier(one_logit, **settings), X, binary
    yield NeuralNetRegressor(regression, **settings), X, binary[:, None]


FINAL = {f"{type(model).__name__}{i}": (model, X, y) for i, (model, X, y) in enumerate(final_estimators())}


@pytest.mark.parametrize("name", FINAL)
def test_a_whole_pipeline_is_its_last_step_over_transformed_features(name):
    model, X, y = FINAL[name]
    pipe = make_pipeline(StandardScaler(), model).fit(X, y)
    Z = pipe[0].transform(X)
    expected = HessianInverter("direct", 5.0).fit(pipe[-1], (Z, y))
    received = HessianInverter("direct", 5.0).fit(pipe, (X, y))
    torch.testing.assert_close(received.curvature_.to_dense(), expected.curvature_.to_dense())
    held_out = (X[:20], y[:20]), (Z[:20], y[:20])
    assert received.score(held_out[0]) == pytest.approx(expected.score(held_out[1]))
    gradients = PerSampleGradient(pipe).fit(X, y).transform((X[:5], y[:5]))
    np.testing.assert_allclose(gradients, PerSampleGradient(pipe[-1]).fit(Z, y).transform((Z[:5], y[:5])))


def test_pipelines_in_pipelines():
    X, y = flowers()
    inner = make_pipeline(PolynomialFeatures(2, include_bias=False), LogisticRegression(max_iter=5000))
    pipe = make_pipeline(StandardScaler(), inner).fit(X, y)
    Z = inner[0].transform(pipe[0].transform(X))
    expected = HessianInverter("direct", 1.0).fit(inner[-1], (Z, y)).curvature_.to_dense()
    received = HessianInverter("direct", 1.0).fit(FrozenEstimator(pipe), (X, y)).curvature_.to_dense()
    torch.testing.assert_close(received, expected)


def test_a_pipeline_of_one_step_is_that_step():
    X, y = flowers()
    pipe = make_pipeline(LogisticRegression(max_iter=1000)).fit(X, y)
    expected = HessianInverter("direct", 1.0).fit(pipe[-1], (X, y)).curvature_.to_dense()
    torch.testing.assert_close(HessianInverter("direct", 1.0).fit(pipe, (X, y)).curvature_.to_dense(), expected)


def test_pipelines_that_end_in_no_model_or_an_unfitted_one():
    X, y = flowers()
    with pytest.raises(TypeError, match="Got a PCA|Got a StandardScaler"):
        HessianInverter().fit(make_pipeline(PolynomialFeatures(), StandardScaler()).fit(X), (X, y))
    with pytest.raises(NotFittedError, match="SharedModel"):
        HessianInverter().fit(make_pipeline(StandardScaler(), LogisticRegression()), (X, y))
    with pytest.raises(TypeError, match=r"an \(X, y\) tuple for a Pipeline"):
        HessianInverter().fit(pipeline_of_scikit_learn()[0], [(X, y)])


# -- an inverter at the end of a pipeline ------------------------------------------------------------------------------


def ending_in_an_inverter():
    X, y = flowers()
    model = LogisticRegression(C=0.1, max_iter=1000).fit(StandardScaler().fit_transform(X), y)
    return make_pipeline(StandardScaler(), inverter_of(model)), model, X, y


def test_fit_and_score_run_through_a_pipeline_and_rows_go_to_its_last_step():
    pipe, model, X, y = ending_in_an_inverter()
    Z = StandardScaler().fit_transform(X)
    expected = inverter_of(model).fit(Z, y)
    b = np.random.default_rng(0).standard_normal((3, 15))
    pipe.fit(X, y)
    np.testing.assert_allclose(pipe[-1].transform(b), expected.transform(b))
    assert pipe.score(X, y) == pytest.approx(expected.score(Z, y))


def test_rows_through_the_whole_pipeline_are_told_the_way():
    pipe, _, X, y = ending_in_an_inverter()
    with pytest.raises(ValueError, match=r"b must be of shape \(k, 15\).*pipe\[-1\].transform\(b\)"):
        pipe.fit(X, y).transform(X)


def test_fit_transform_with_a_model_names_the_gradient_step():
    pipe, _, X, y = ending_in_an_inverter()
    with pytest.raises(TypeError, match=r"PerSampleGradient\(model, loss=...\)"):
        pipe.fit_transform(X, y)


def test_a_search_over_a_pipeline():
    pipe, _, X, y = ending_in_an_inverter()
    search = GridSearchCV(pipe, {"hessianinverter__hessian_perturbation": LAMBDAS}, cv=KFold(3), error_score="raise")
    search.fit(X, y)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert isinstance(search.best_estimator_, Pipeline)


@pytest.mark.parametrize("container", ["pandas", "default"])
def test_set_output_after_a_search(container):
    pandas = pytest.importorskip("pandas")
    model, X, y = logistic()
    inverter = inverter_of(model).set_output(transform=container)
    best = GridSearchCV(inverter, {"hessian_perturbation": LAMBDAS}, cv=2).fit(X, y).best_estimator_
    received = best.transform(np.ones((2, 15)))
    assert isinstance(received, pandas.DataFrame if container == "pandas" else np.ndarray)
    if container == "pandas":
        assert received.columns[0] == "coef[0,0]"


# -- weights by metadata routing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_jobs", [1, 2])
@pytest.mark.parametrize("form", [arrays, logistic, slice_dict], ids=["module", "estimator", "slice dict"])
def test_sample_weights_are_routed(form, n_jobs):
    model, X, y = form()
    weights = np.random.default_rng(0).integers(0, 4, len(y)).astype(float)
    expected = by_hand(model, X, y, LAMBDAS, weights)
    with sklearn.config_context(enable_metadata_routing=True):
        inverter = inverter_of(model).set_fit_request(sample_weight=True).set_score_request(sample_weight=True)
        search = GridSearchCV(inverter, {"hessian_perturbation": LAMBDAS}, cv=KFold(3), n_jobs=n_jobs)
        search.set_params(error_score="raise").fit(X, y, sample_weight=weights)
    np.testing.assert_allclose(search.cv_results_["mean_test_score"], expected, rtol=1e-10)


def test_sample_weights_are_routed_through_a_pipeline():
    pipe, model, X, y = ending_in_an_inverter()
    weights = np.arange(len(y)) % 3 + 0.0
    expected = inverter_of(model).fit(StandardScaler().fit_transform(X), y, weights)
    with sklearn.config_context(enable_metadata_routing=True):
        pipe[-1].set_fit_request(sample_weight=True)
        pipe[0].set_fit_request(sample_weight=False)
        pipe.fit(X, y, sample_weight=weights)
    torch.testing.assert_close(pipe[-1].curvature_.to_dense(), expected.curvature_.to_dense())
