"""Scorers in scikit-learn's searches: weights, groups, and pipelines whose first step makes the rows."""

import pickle

import numpy as np
import pytest
import sklearn
import torch
from sklearn.base import clone
from sklearn.exceptions import UnsetMetadataPassedError
from sklearn.frozen import FrozenEstimator
from sklearn.model_selection import GridSearchCV, GroupKFold, KFold, LeaveOneGroupOut, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.random_projection import GaussianRandomProjection
from torch import nn

from skinvert import HessianInverter, HessianInverterCV, PerSampleGradient, make_quadratic_scorer

LAMBDAS = [0.03, 3.0]
CV = KFold(3)


def data(n=30):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    X, y = torch.randn(n, 3, dtype=torch.float64).numpy(), torch.randint(0, 2, (n,)).numpy()
    return net, X, y, np.random.default_rng(0).integers(1, 4, n).astype(float)


def inverter(net):
    return HessianInverter("direct", 0.1, model=net, loss="cross_entropy", curvature="ggn")


def trak(net):
    gradients = PerSampleGradient(net, loss="cross_entropy")
    return make_pipeline(gradients, GaussianRandomProjection(4, random_state=0), HessianInverter("direct", 0.1))


# -- weights -----------------------------------------------------------------------------------------------------------


def by_hand(net, X, y, w, scored):
    """Weighted fits, and weighted scores where ``scored``."""
    scores = []
    for shift in LAMBDAS:
        folds = []
        for train, test in CV.split(X):
            fitted = inverter(net).set_params(hessian_perturbation=shift).fit(X[train], y[train], w[train])
            folds.append(fitted.score(X[test], y[test], w[test] if scored else None))
        scores.append(np.mean(folds))
    return scores


def search(estimator, scoring, **settings):
    grid = {"hessian_perturbation": LAMBDAS}
    return GridSearchCV(estimator, grid, cv=CV, scoring=scoring, error_score="raise", **settings)


@pytest.mark.parametrize("request_", [True, False, "weights"])
def test_a_scorer_requests_its_weights(request_):
    net, X, y, w = data()
    name = request_ if isinstance(request_, str) else "sample_weight"
    with sklearn.config_context(enable_metadata_routing=True):
        estimator = inverter(net).set_fit_request(sample_weight=name if isinstance(request_, str) else True)
        scorer = make_quadratic_scorer()
        assert scorer.set_score_request(sample_weight=request_) is scorer
        fitted = search(estimator, scorer).fit(X, y, **{name: w})
        several = search(estimator, {"a": scorer}, refit="a").fit(X, y, **{name: w})
    expected = by_hand(net, X, y, w, request_ is not False)
    np.testing.assert_allclose(fitted.cv_results_["mean_test_score"], expected, rtol=1e-10)
    np.testing.assert_allclose(several.cv_results_["mean_test_a"], expected, rtol=1e-10)


def test_weights_that_were_not_spoken_of_are_refused():
    net, X, y, w = data()
    with sklearn.config_context(enable_metadata_routing=True):
        estimator = inverter(net).set_fit_request(sample_weight=True)
        with pytest.raises(UnsetMetadataPassedError, match=r"make_quadratic_scorer\(\)"):
            search(estimator, make_quadratic_scorer()).fit(X, y, sample_weight=w)


def test_set_score_request_wants_routing():
    with pytest.raises(RuntimeError, match="enable_metadata_routing=True"):
        make_quadratic_scorer().set_score_request(sample_weight=True)


@pytest.mark.skipif(
    tuple(map(int, sklearn.__version__.split(".")[:2])) < (1, 9), reason="older searches pass no weights on"
)
def test_without_routing_scikit_learn_passes_the_weights():
    net, X, y, w = data()
    expected = by_hand(net, X, y, w, True)
    fitted = search(inverter(net), make_quadratic_scorer()).fit(X, y, sample_weight=w)
    np.testing.assert_allclose(fitted.cv_results_["mean_test_score"], expected, rtol=1e-10)
    several = search(inverter(net), {"a": make_quadratic_scorer()}, refit="a").fit(X, y, sample_weight=w)
    np.testing.assert_allclose(several.cv_results_["mean_test_a"], expected, rtol=1e-10)


def test_requests_survive_a_pickle_and_a_clone():
    with sklearn.config_context(enable_metadata_routing=True):
        scorer = make_quadratic_scorer(np.ones((1, 2))).set_score_request(sample_weight=True)
        assert pickle.loads(pickle.dumps(scorer)).get_metadata_routing().score.requests == {"sample_weight": True}
        gradients = clone(PerSampleGradient().set_fit_request(sample_weight=True))
        assert gradients.get_metadata_routing().fit.requests == {"sample_weight": True}


# -- cross-validation of one's own -------------------------------------------------------------------------------------


def test_groups_stay_together():
    net, X, y, _ = data()
    groups = np.arange(30) % 5
    settings = {"loss": "cross_entropy", "curvature": "ggn", "method": "direct"}
    splits = list(LeaveOneGroupOut().split(X, y, groups))
    expected = HessianInverterCV(LAMBDAS, cv=splits, **settings).fit(net, (X, y))
    received = HessianInverterCV(LAMBDAS, cv=LeaveOneGroupOut(), **settings).fit(net, (X, y), groups=groups)
    np.testing.assert_array_equal(received.cv_results_["mean_test_score"], expected.cv_results_["mean_test_score"])
    with pytest.raises(ValueError, match="'groups' parameter should not be None"):
        HessianInverterCV(LAMBDAS, cv=GroupKFold(3), **settings).fit(net, (X, y))
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        HessianInverterCV(LAMBDAS, cv=GroupKFold(3), **settings).fit(net, (X, y), groups=groups[:7])


def test_a_scoring_of_one_s_own_gets_the_weights_or_is_refused():
    net, X, y, w = data()
    chosen = HessianInverterCV(LAMBDAS, cv=CV, method="direct", loss="cross_entropy", curvature="ggn")
    expected = by_hand(net, X, y, w, True)

    def weighed(estimator, X, y=None, sample_weight=None):
        return estimator.score(X, y, sample_weight)

    received = chosen.set_params(scoring=weighed).fit(net, (X, y), w).cv_results_["mean_test_score"]
    np.testing.assert_allclose(received, expected, rtol=1e-8)
    chosen.set_params(scoring=lambda estimator, X, y=None: estimator.score(X, y))
    with pytest.raises(TypeError, match="scoring must be one that takes sample_weight by name"):
        chosen.fit(net, (X, y), w)
    assert chosen.fit(net, (X, y)).n_splits_ == 3


# -- gradients in a pipeline -------------------------------------------------------------------------------------------


def scored_by_hand(pipe, X, y, w=None, test=slice(None)):
    """The held-out quadratic of rows of gradients, from the steps one by one."""
    rows = pipe[0].transform((X[test], y[test]))
    for step in pipe[1:-1]:
        rows = step.transform(rows)
    return pipe[-1].score(rows, None, w)


def test_a_search_over_projected_gradients():
    net, X, y, _ = data()
    grid = {"hessianinverter__hessian_perturbation": LAMBDAS}
    fitted = GridSearchCV(trak(net), grid, cv=CV, scoring=make_quadratic_scorer(), error_score="raise").fit(X, y)
    expected = []
    for shift in LAMBDAS:
        pipe = trak(net).set_params(hessianinverter__hessian_perturbation=shift)
        folds = [scored_by_hand(pipe.fit(X[train], y[train]), X, y, test=test) for train, test in CV.split(X)]
        expected.append(np.mean(folds))
    np.testing.assert_allclose(fitted.cv_results_["mean_test_score"], expected, rtol=1e-10)
    assert fitted.transform((X, y)).shape == (30, 4)


@pytest.mark.parametrize("form", ["scaled", "nested", "frozen", "passthrough", "search"])
def test_gradients_anywhere_among_the_steps(form):
    net, X, y, w = data()
    gradients, last = PerSampleGradient(net, loss="cross_entropy"), HessianInverter("direct", 0.1)
    scaled = StandardScaler().fit_transform(X)
    pipe = {
        "scaled": lambda: make_pipeline(StandardScaler(), gradients, last),
        "nested": lambda: make_pipeline(make_pipeline(StandardScaler(), gradients), last),
        "frozen": lambda: make_pipeline(StandardScaler(), FrozenEstimator(gradients.fit(scaled, y)), last),
        "passthrough": lambda: make_pipeline(StandardScaler(), gradients, "passthrough", last),
        "search": lambda: GridSearchCV(
            make_pipeline(StandardScaler(), gradients, last),
            {"hessianinverter__hessian_perturbation": [0.1]},
            scoring=make_quadratic_scorer(),
        ),
    }[form]()
    rows = PerSampleGradient(net, loss="cross_entropy").fit_transform(scaled, y)
    expected = HessianInverter("direct", 0.1).fit(rows)
    # FrozenEstimator.fit_transform passes no targets on.
    fitted = pipe if form == "frozen" else pipe.fit(X, y)
    if form == "frozen":
        pipe[0].fit(X)
        pipe[-1].fit(rows)
    for weights in (None, w):
        received = make_quadratic_scorer()(fitted, X, y, weights)
        assert received == pytest.approx(expected.score(rows, None, weights), rel=1e-10)
    b = np.ones((2, rows.shape[1]))
    assert make_quadratic_scorer(b)(fitted, X, y) == pytest.approx(make_quadratic_scorer(b)(expected, rows))


def test_nested_cross_validation():
    net, X, y, _ = data()
    grid = {"hessianinverter__hessian_perturbation": LAMBDAS}
    inner = GridSearchCV(trak(net), grid, cv=2, scoring=make_quadratic_scorer(), error_score="raise")
    received = cross_val_score(inner, X, y, cv=2, scoring=make_quadratic_scorer(), error_score="raise")
    assert np.isfinite(received).all()


def test_scikit_learn_s_own_calls_without_targets_are_told_the_way():
    net, X, y, _ = data()
    pipe = trak(net).fit(X, y)
    for call in (lambda: pipe.score(X, y), lambda: pipe.transform(X)):
        with pytest.raises(TypeError, match=r"transform\(\(X, y\)\).*make_quadratic_scorer\(\)"):
            call()


def test_what_is_no_inverter_is_not_scored():
    _, X, y, _ = data()
    with pytest.raises(TypeError, match="must be a HessianInverter.*Got a StandardScaler"):
        make_quadratic_scorer()(StandardScaler().fit(X), X, y)
