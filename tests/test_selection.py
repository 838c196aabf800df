"""λ by cross-validation against GridSearchCV over the same folds; the scorer of one's own right-hand sides."""

import dataclasses
import importlib.util
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from definitions import SETTINGS
from facts import EVERY, KINDS, LOOSE, ON_ROWS, PRECISE, TIGHT
from oracles import Oracle, oracle_matrix, solution
from problems import problem
from sklearn.base import clone
from sklearn.datasets import load_diabetes
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, KFold, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch.utils.data import DataLoader, TensorDataset

from skinvert import (
    HessianInverter,
    HessianInverterCV,
    InverseHvpResult,
    SklearnTwiceDifferentiable,
    make_quadratic_scorer,
    methods,
)
from skinvert.curvature import faces_of
from skinvert.methods import CG, Arnoldi
from skinvert.operators import Dense

SHIFTS = [1e-3, 1e-2, 0.1, 1.0, 10.0]


# -- the scikit-learn contract -----------------------------------------------------------------------------------------


@parametrize_with_checks(
    [HessianInverterCV(), HessianInverterCV([0.1, 1.0], method="cg"), HessianInverterCV([0.1, 1.0], method="arnoldi")]
    + [HessianInverter(name, 0.5) for name in ON_ROWS]
)
def test_check_estimator(estimator, check):
    with warnings.catch_warnings():
        # The checks fit few and constant rows.
        for category in (scipy.linalg.LinAlgWarning, ConvergenceWarning):
            warnings.simplefilter("ignore", category)
        check(estimator)


# -- equality with GridSearchCV ----------------------------------------------------------------------------------------


def classification(n=40, weight_decay=0.0):
    """An untrained MLP on noise: its GGN and its Hessian differ."""
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((n, 4)), rng.integers(0, 3, n)
    net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    settings = {"model": net, "loss": "cross_entropy", "weight_decay": weight_decay, "batch_size": 16}
    return X, y, settings


# A loose method's scores are not those of another run.
METHODS = {name: KINDS[name](**SETTINGS[name]) for name in EVERY if name not in LOOSE}
METHODS["cg_preconditioned"] = CG(rtol=1e-12, preconditioner="nystroem")


def grid_search(X, y, cv, **settings):
    grid = {"hessian_perturbation": SHIFTS}
    return GridSearchCV(HessianInverter(**settings), grid, cv=cv, error_score="raise").fit(X, y)


def assert_same_choice(received, search):
    for key in ("mean_test_score", "std_test_score", "split0_test_score", "rank_test_score"):
        np.testing.assert_allclose(received.cv_results_[key], search.cv_results_[key], rtol=1e-8, atol=1e-13)
    assert received.cv_results_["params"] == search.cv_results_["params"]
    assert received.hessian_perturbation_ == search.best_params_["hessian_perturbation"]
    assert received.best_score_ == pytest.approx(search.best_score_, rel=1e-8)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("method", "curvature"),
    [
        (name, curvature)
        for name, method in METHODS.items()
        for curvature in ("ggn", "empirical_fisher")
        if set(method.requires) <= faces_of(curvature)
    ],
)
def test_equals_a_grid_search(method, curvature):
    X, y, settings = classification(weight_decay=0.01)
    settings |= {"method": METHODS[method], "curvature": curvature}
    received = HessianInverterCV(SHIFTS, cv=3, **settings).fit(X, y)
    search = grid_search(X, y, 3, **settings)
    assert_same_choice(received, search)
    b = np.random.default_rng(1).standard_normal((2, received.n_features_in_))
    np.testing.assert_allclose(received.transform(b), search.transform(b), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("method", ["direct", "cg", "arnoldi", "diagonal"])
@pytest.mark.parametrize("n", [40, 12])
def test_equals_a_grid_search_on_plain_rows(method, n):
    X = np.random.default_rng(0).standard_normal((n, 15))
    method = METHODS[method]
    received = HessianInverterCV(SHIFTS, cv=KFold(3, shuffle=True, random_state=0), method=method).fit(X)
    assert_same_choice(received, grid_search(X, None, KFold(3, shuffle=True, random_state=0), method=method))


@pytest.mark.parametrize("n", [40, 12])
@pytest.mark.filterwarnings("ignore:A = H:sklearn.exceptions.ConvergenceWarning")
def test_zero_among_the_perturbations_equals_a_fit_at_zero(n):
    X = np.random.default_rng(0).standard_normal((n, 15))
    expected = [HessianInverter("direct", 0.0).fit(X[train]).score(X[test]) for train, test in KFold(3).split(X)]
    received = HessianInverterCV([0.0, 0.1], cv=3).fit(X).cv_results_
    np.testing.assert_allclose([received[f"split{i}_test_score"][0] for i in range(3)], expected, rtol=1e-8)


def test_blocks_and_a_stratified_splitter_equal_a_grid_search():
    X, y, settings = classification()
    settings |= {"method": "direct", "curvature": "ggn", "blocks": "layer"}
    received = HessianInverterCV(SHIFTS, cv=StratifiedKFold(3), **settings).fit(X, y)
    assert_same_choice(received, grid_search(X, y, StratifiedKFold(3), **settings))


def test_a_method_that_inverts_anew_at_each():
    class Solve(methods.base.Method):
        name = "solve"

        def invert(self, A, hessian_perturbation, verbose=0):
            return _Solve(A.to_dense(), hessian_perturbation)

    X = np.random.default_rng(0).standard_normal((40, 5))
    received = HessianInverterCV(SHIFTS, cv=3, method=Solve()).fit(X)
    assert_same_choice(received, grid_search(X, None, 3, method="direct"))


class _Solve(methods.base.InverseOperator):
    positive_definite = True

    def __init__(self, matrix, hessian_perturbation):
        self.curvature, self.hessian_perturbation = Dense(matrix), hessian_perturbation

    def solve(self, B):
        return InverseHvpResult(torch.linalg.solve(self.operator.to_dense(), B.mT).mT, {})

    def at(self, hessian_perturbation):
        return _Solve(self.curvature.matrix, hessian_perturbation)


def test_weights_are_split_with_the_rows():
    X, y, settings = classification()
    weights = np.random.default_rng(2).integers(1, 4, len(X)).astype(float)
    settings |= {"method": "direct", "curvature": "ggn"}
    received = HessianInverterCV([0.1, 1.0], cv=3, **settings).fit(X, y, sample_weight=weights).cv_results_
    for i, (train, test) in enumerate(KFold(3).split(X)):
        fold = HessianInverter(hessian_perturbation=0.1, **settings).fit(X[train], y[train], weights[train])
        expected = fold.score(X[test], y[test], sample_weight=weights[test])
        assert received[f"split{i}_test_score"][0] == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("form", ["tensors", "dataset", "loader", "model set"])
def test_forms_of_data_are_the_same_rows(form):
    X, y, settings = classification()
    expected = HessianInverterCV(SHIFTS, cv=3, curvature="ggn", **settings).fit(X, y).cv_results_
    pair = (torch.from_numpy(X), torch.from_numpy(y))
    dataset = TensorDataset(*pair)
    data = {"tensors": pair, "dataset": dataset, "loader": DataLoader(dataset, 6, shuffle=True), "model set": dataset}
    if form == "model set":
        received = HessianInverterCV(SHIFTS, cv=3, curvature="ggn", **settings).fit(dataset)
    else:
        net = settings.pop("model")
        received = HessianInverterCV(SHIFTS, cv=3, curvature="ggn", **settings).fit(net, data[form])
    np.testing.assert_allclose(received.cv_results_["mean_test_score"], expected["mean_test_score"], rtol=1e-10)


# -- what is chosen ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [name for name in PRECISE if not KINDS[name].needs_psd])
def test_an_indefinite_perturbation_is_never_chosen(method):
    # An MLP far from a minimum: its Hessian has negative eigenvalues in every fold.
    case = problem("mlp", "mse", n=21)
    X, y = case.X, case.y
    lowest = [float(np.linalg.eigvalsh(hessian_of(case, train))[0]) for train, _ in KFold(3).split(X)]
    shifts = [0.3 * -min(lowest), 0.9 * -min(lowest), -2 * min(lowest), -20 * min(lowest)]
    assert min(lowest) < 0
    settings = case.settings(model=case.module, method=TIGHT[method])
    with pytest.warns(ConvergenceWarning, match="not positive definite"):
        received = HessianInverterCV(shifts, cv=3, **settings).fit(X, y)
    scores = np.array([received.cv_results_[f"split{i}_test_score"] for i in range(3)]).T
    expected = np.array([[shift + low <= 0 for low in lowest] for shift in shifts])
    np.testing.assert_array_equal(np.isneginf(scores), expected)
    assert received.hessian_perturbation_ + min(lowest) > 0


def hessian_of(case, rows):
    return oracle_matrix(dataclasses.replace(case, X=case.X[rows], y=case.y[rows]), "hessian")


@pytest.mark.filterwarnings("ignore:A = H:sklearn.exceptions.ConvergenceWarning")
def test_no_perturbation_that_serves_is_an_error():
    case = problem("mlp", "mse", n=21)
    estimator = HessianInverterCV([0.0], cv=3, **case.settings(model=case.module))
    with pytest.raises(ValueError, match="such that one λ serves every fold"):
        estimator.fit(case.X, case.y)


def test_is_afterwards_an_inverter_at_the_chosen_perturbation():
    X, y, settings = classification()
    received = HessianInverterCV(SHIFTS, cv=3, curvature="ggn", **settings).fit(X, y)
    expected = HessianInverter("auto", received.hessian_perturbation_, curvature="ggn", **settings).fit(X, y)
    b = np.random.default_rng(1).standard_normal((2, expected.n_features_in_))
    np.testing.assert_allclose(received.solve(b).x, expected.solve(b).x, rtol=1e-12)
    np.testing.assert_allclose(received.inverse_transform(b), expected.inverse_transform(b), rtol=1e-12)
    assert received.score(X, y) == pytest.approx(expected.score(X, y), rel=1e-12)
    assert list(received.get_feature_names_out()) == list(expected.get_feature_names_out())
    assert received.n_samples_ == len(X)
    np.testing.assert_allclose(received.quadratic(b).values, expected.quadratic(b).values, rtol=1e-12)
    assert received.log_det() == pytest.approx(expected.log_det())
    assert received.log_evidence() == pytest.approx(expected.log_evidence())
    np.testing.assert_allclose(received.sample(2, 0), expected.sample(2, 0), rtol=1e-9)
    np.testing.assert_allclose(received.covariance("sandwich"), expected.covariance("sandwich"), rtol=1e-9)
    variances = [each.predictive_variance(X[:3], y[:3], outputs="joint") for each in (received, expected)]
    np.testing.assert_allclose(*variances, rtol=1e-9)
    spectra = [each.spectrum(of="inverse").eigenvalues for each in (received, expected)]
    np.testing.assert_allclose(*spectra, rtol=1e-9)


ATTRIBUTES = [
    *("n_features_in_", "n_samples_", "method_", "inverse_", "curvature_", "curvature_name_", "hessian_perturbation_"),
    *("parameter_names_", "gradient_norm_", "eigenvalues_"),
]


def test_has_all_that_the_inverter_has_that_it_chose():
    X, y, settings = classification()
    # Its eigenvalues are known at every λ.
    unfitted = HessianInverterCV(SHIFTS, cv=3, method=Arnoldi(rank=43), curvature="ggn", **settings)
    assert not any(hasattr(unfitted, name) for name in ATTRIBUTES)
    fitted = clone(unfitted).fit(X, y)
    public = {name for name in dir(fitted.inverter_) if not name.startswith("_")}
    # A search has many fits, and none of its own over several processes.
    assert public - {"hessian_perturbation", "checkpoint", "process_group"} - set(dir(fitted)) == set()
    assert all(getattr(fitted, name) is getattr(fitted.inverter_, name) for name in ATTRIBUTES)
    rows = np.eye(3, fitted.n_features_in_)
    named = fitted.unflatten(rows)
    assert list(named) == fitted.parameter_names_
    np.testing.assert_array_equal(fitted.flatten(named), rows)
    A = fitted.curvature_.to_dense().numpy() + fitted.hessian_perturbation_ * np.eye(len(rows.T))
    expected = np.linalg.solve(A, rows.T).T
    np.testing.assert_allclose(fitted.transform(rows), expected, rtol=1e-6)
    np.testing.assert_allclose(fitted.aslinearoperator() @ rows.T, expected.T, rtol=1e-6)
    np.testing.assert_allclose(fitted.path(rows, [fitted.hessian_perturbation_])[0], expected, rtol=1e-6)
    assert fitted.residual(rows, expected).max() < 1e-10
    assert fitted.spectrum().largest[0] == pytest.approx(np.linalg.eigvalsh(fitted.curvature_.to_dense()).max())


def test_an_attribute_that_the_inverter_lacks_is_lacking():
    fitted = HessianInverterCV([0.1, 1.0], method="cg").fit(np.random.default_rng(0).standard_normal((20, 3)))
    lacking = [name for name in ATTRIBUTES if not hasattr(fitted, name)]
    assert lacking == ["parameter_names_", "gradient_norm_", "eigenvalues_"]
    with pytest.raises(TypeError, match="after a fit on a model"):
        fitted.flatten({})


def test_a_search_at_the_end_of_a_pipeline_is_scored_and_solved():
    X, y, settings = classification()
    pipe = make_pipeline(StandardScaler(), HessianInverterCV(SHIFTS, cv=3, curvature="ggn", **settings)).fit(X, y)
    Xt, b = pipe[0].transform(X), np.ones((2, 43))
    assert pipe.score(X, y) == pipe[1].inverter_.score(Xt, y)
    assert make_quadratic_scorer(b)(pipe, X, y) == make_quadratic_scorer(b)(pipe[1].inverter_, Xt, y)
    pipe.set_output(transform="pandas")
    assert list(pipe[-1].transform(b).columns) == list(pipe[-1].get_feature_names_out())


def test_results_have_the_keys_of_a_grid_search():
    X = np.random.default_rng(0).standard_normal((20, 3))
    received = HessianInverterCV(SHIFTS).fit(X)
    search = grid_search(X, None, 5).cv_results_
    assert {key for key in search if not key.endswith("_time")} == set(received.cv_results_)
    assert received.n_splits_ == 5
    assert (
        received.cv_results_["params"][received.best_index_]["hessian_perturbation"] == received.hessian_perturbation_
    )


def test_clone_shares_the_model_and_pickles_transform_the_same():
    X, y, settings = classification()
    fitted = HessianInverterCV(SHIFTS, cv=3, **{**settings, "curvature": "ggn"}).fit(X, y)
    assert clone(fitted).model is settings["model"]
    b = np.ones((1, fitted.n_features_in_))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(fitted)).transform(b), fitted.transform(b))


# -- the scorer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_scorer_against_its_formula(weighted):
    case, k = problem("mlp", "cross_entropy", 0.1), 4
    b, w = case.right_hand_sides(k), np.arange(1.0, 13) if weighted else np.ones(12)
    inverter = HessianInverter("direct", 2.0, **case.settings()).fit(case.module, case.data)
    z = solution(oracle_matrix(case, "hessian"), 2.0, b)
    oracle = Oracle(case)
    H = np.einsum("i,ipq->pq", w, oracle.ggn_rows()) / w.sum() + np.diag(oracle.penalty.numpy())
    expected = np.mean([bi @ zi - zi @ H @ zi / 2 for bi, zi in zip(b, z, strict=True)])
    scorer = make_quadratic_scorer(b)
    assert scorer(inverter, case.data, sample_weight=w) == pytest.approx(expected, rel=1e-9)
    assert scorer.path(inverter, [2.0], (case.data, None, w)) == pytest.approx([expected], rel=1e-9)


def test_scorer_in_a_grid_search_and_in_the_fast_path():
    X, y, settings = classification()
    settings |= {"method": "direct", "curvature": "ggn"}
    scorer = make_quadratic_scorer(np.random.default_rng(1).standard_normal((6, 43)))
    received = HessianInverterCV(SHIFTS, cv=3, scoring=scorer, **settings).fit(X, y)
    search = GridSearchCV(HessianInverter(**settings), {"hessian_perturbation": SHIFTS}, cv=3, scoring=scorer)
    assert_same_choice(received, search.fit(X, y))


def test_any_callable_scores_each_perturbation():
    X, y, settings = classification()
    seen = []

    def scoring(estimator, X, y):
        seen.append(estimator.hessian_perturbation_)
        return -abs(np.log(estimator.hessian_perturbation)) + 0 * estimator.score(X, y)

    received = HessianInverterCV(SHIFTS, cv=2, scoring=scoring, curvature="ggn", **settings).fit(X, y)
    assert received.hessian_perturbation_ == 1.0
    assert seen == 2 * SHIFTS


def test_scorer_without_right_hand_sides_is_score_and_runs_through_a_pipeline():
    X, y, settings = classification()
    pipe = make_pipeline(StandardScaler(), HessianInverter("direct", 0.1, curvature="ggn", **settings)).fit(X, y)
    Xt, b = pipe[0].transform(X), np.ones((1, 43))
    assert make_quadratic_scorer()(pipe, X, y) == pipe[1].score(Xt, y)
    assert make_quadratic_scorer(b)(pipe, X, y) == make_quadratic_scorer(b)(pipe[1], Xt, y)


def test_scorer_pickles_and_shows_its_shape():
    scorer = make_quadratic_scorer(np.ones((1, 3)))
    inverter, X = HessianInverter(hessian_perturbation=0.1).fit(np.eye(3)), np.eye(3)
    assert pickle.loads(pickle.dumps(scorer))(inverter, X) == scorer(inverter, X)
    assert "(1, 3)" in repr(scorer)


def test_scorer_of_an_indefinite_inverse_is_minus_infinity():
    case = problem("mlp", "mse")
    inverter = HessianInverter("cg", **case.settings()).fit(case.module, case.data)
    with pytest.warns(ConvergenceWarning, match="not positive definite"):
        assert make_quadratic_scorer(case.right_hand_sides(1))(inverter, case.data) == -np.inf


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"hessian_perturbations": []}, ValueError, "at least one λ"),
        ({"hessian_perturbations": [0.1, -1.0]}, ValueError, r"range \[0.0, inf\).*-1.0"),
        ({"hessian_perturbations": 0.1}, TypeError, "iterable of λ"),
        ({"cv": 10}, ValueError, "at least two"),
        ({"cv": 11}, ValueError, "n_splits=11 greater"),
        ({"scoring": "accuracy"}, TypeError, "None or a callable"),
        ({"method": "no such"}, ValueError, "one of"),
    ],
)
def test_errors(settings, error, match):
    with pytest.raises(error, match=match):
        HessianInverterCV(**settings).fit(np.random.default_rng(0).standard_normal((10, 2)))


@pytest.mark.parametrize("rhs", [np.ones(3), np.ones((0, 3)), [[1.0]]])
def test_a_wrong_right_hand_side_is_refused(rhs):
    with pytest.raises(ValueError, match=r"rhs must be .*\(k, p\)"):
        make_quadratic_scorer(rhs)


def test_batches_are_refused():
    X, y, settings = classification()
    net = settings.pop("model")
    with pytest.raises(TypeError, match="Data to split into folds"):
        HessianInverterCV(**settings).fit(net, [(torch.from_numpy(X), torch.from_numpy(y))])


# -- against retraining ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_scored_perturbation_predicts_retraining():
    path = Path(__file__).parents[1] / "docs" / "benchmarks" / "score_against_retraining.py"
    spec = importlib.util.spec_from_file_location("score_against_retraining", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    found = [benchmark.compare(seed) for seed in range(3)]
    best, score, naive = (np.mean([each[name][1] for each in found]) for name in ("best", "score", "naive"))
    assert best - score <= 0.06
    assert score - naive >= 0.2


@pytest.mark.parametrize("given", [False, True], ids=["set", "passed"])
def test_a_penalty_is_of_the_whole_fit(given):
    # Ridge's α/n: a fold's own n would make it a quarter larger.
    X, y = load_diabetes(return_X_y=True)
    ridge = Ridge(alpha=5.0).fit(X[:100], y[:100])
    shifts = [1e-4, 1e-2]
    inverter = HessianInverter("direct", model=SklearnTwiceDifferentiable(ridge, y[:100]))
    grid = GridSearchCV(inverter, {"hessian_perturbation": shifts}).fit(X[:100], y[:100])
    if given:
        received = HessianInverterCV(shifts, method="direct").fit(ridge, (X[:100], y[:100]))
    else:
        received = HessianInverterCV(shifts, method="direct", model=ridge).fit(X[:100], y[:100])
    expected = grid.cv_results_["mean_test_score"]
    np.testing.assert_allclose(received.cv_results_["mean_test_score"], expected, rtol=1e-8)
