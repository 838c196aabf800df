"""The steps of a pipeline before its model: a fit keeps what it was fitted with, and refuses steps that draw."""

import copy
import pickle
import threading

import numpy as np
import pytest
import scipy.sparse
from sklearn.compose import ColumnTransformer
from sklearn.experimental import enable_iterative_imputer  # noqa: F401 (it makes the import below)
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.impute import IterativeImputer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import FunctionTransformer, MaxAbsScaler, StandardScaler

from skinvert import HessianInverter, InfluenceFunction, PerSampleGradient

A, B = slice(30), slice(30, 60)


def data():
    generator = np.random.default_rng(0)
    X = generator.standard_normal((60, 3)) * [1, 10, 0.1] + [0, 5, 0] + (np.arange(60) >= 30)[:, None]
    return X, generator.standard_normal(60)


# -- what was fitted stays ---------------------------------------------------------------------------------------------

STEPS = {
    "scaler": StandardScaler,
    "nested": lambda: make_pipeline(make_pipeline("passthrough", StandardScaler())),
    "columns": lambda: ColumnTransformer([("a", StandardScaler(), [0]), ("b", StandardScaler(), [1, 2])]),
    "union": lambda: make_pipeline(
        FeatureUnion([("a", FunctionTransformer(lambda X: X[:, :1])), ("b", FunctionTransformer(lambda X: X[:, 1:]))]),
        StandardScaler(),
    ),
}


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("kind", STEPS)
def test_fitting_the_pipeline_again_does_not_reach_a_fit(kind, inner):
    X, y = data()
    ridge = Ridge(2.0, fit_intercept=False)
    pipe = make_pipeline("passthrough", make_pipeline(STEPS[kind](), ridge)) if inner else None
    pipe = pipe or make_pipeline(STEPS[kind](), ridge)
    fitted = InfluenceFunction(HessianInverter("direct")).fit(pipe.fit(X[A], y[A]), (X[A], y[A]))
    theta = ridge.coef_.copy()
    pipe.fit(X[B], y[B])
    Z, Zt = ((X[part] - X[A].mean(0)) / X[A].std(0) for part in (A, B))
    inverse = np.linalg.inv(Z.T @ Z + 2 * np.eye(3))
    received = fitted.inverter_.predictive_variance(X[B])
    np.testing.assert_allclose(received[:, 0], np.einsum("np,pq,nq->n", Zt, inverse, Zt), rtol=1e-9)
    expected = (Zt * (Zt @ theta - y[B])[:, None]) @ inverse @ (Z * (Z @ theta - y[A])[:, None]).T
    np.testing.assert_allclose(fitted.transform((X[B], y[B])), expected, rtol=1e-8, atol=1e-12)


def test_partial_fits_and_pickles(tmp_path):
    X, y = data()
    pipe = make_pipeline(StandardScaler(), Ridge(), memory=str(tmp_path)).fit(X[A], y[A])
    fitted = HessianInverter("direct").fit(pipe, (X[A], y[A]))
    expected = fitted.predictive_variance(X[B])
    pipe[0].partial_fit(X[B])
    pipe[0].mean_ += 1.0
    np.testing.assert_array_equal(fitted.predictive_variance(X[B]), expected)
    b = np.ones((1, 4))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(fitted)).transform(b), fitted.transform(b))


@pytest.mark.parametrize(
    "model", [LogisticRegression(), MLPClassifier((2,), alpha=9.0, solver="lbfgs", max_iter=5000, random_state=0)]
)
def test_settings_and_classes_of_a_model_alone(model):
    X, y = data()
    names = np.where(y > 0, "yes", "no")
    fitted = InfluenceFunction(HessianInverter("direct", 0.1, curvature="ggn"))
    fitted.fit(model.fit(X[A], names[A]), (X[A], names[A]))
    before, score = fitted.transform((X[B], names[B])), fitted.inverter_.score(X[B], names[B])
    # Other classes, in another order, of other columns and another penalty.
    model.set_params(**({"C": 1e-3} if isinstance(model, LogisticRegression) else {"alpha": 1e3}))
    model.fit(X[:, :2], np.where(y > 0, "left", "right"))
    np.testing.assert_array_equal(fitted.transform((X[B], names[B])), before)
    assert fitted.inverter_.score(X[B], names[B]) == score


def test_a_step_that_cannot_be_copied_is_named():
    X, y = data()
    pipe = make_pipeline(StandardScaler(), Ridge()).fit(X, y)
    pipe[0]._skl_callbacks = [threading.Lock()]  # these are shared
    HessianInverter("direct").fit(pipe, (X, y))
    pipe[0].lock = threading.Lock()
    with pytest.raises(ValueError, match="step 'standardscaler' must be one that can be copied.*X as the steps before"):
        HessianInverter("direct").fit(pipe, (X, y))


# -- steps that draw ---------------------------------------------------------------------------------------------------


def noise(X):
    return X + np.random.default_rng().standard_normal(X.shape)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_imputation_that_draws_is_refused():
    generator = np.random.default_rng(0)
    X, y = generator.standard_normal((500, 3)), generator.standard_normal(500)
    X[450, 1] = -99.0  # a single row, and no NaN to find it by
    for draws in (False, True):
        imputer = IterativeImputer(missing_values=-99.0, sample_posterior=draws, random_state=0)
        pipe = make_pipeline(StandardScaler(with_mean=False, with_std=False), imputer, Ridge()).fit(X, y)
        state = pickle.dumps(imputer.random_state_)
        for fit in (HessianInverter("direct").fit, lambda model, data: PerSampleGradient(model).fit(*data)):
            if draws:
                with pytest.raises(ValueError, match="step 'iterativeimputer' must be.*the same features.*`sample_"):
                    fit(pipe, (X, y))
            else:
                fit(pipe, (X, y))
        assert pickle.dumps(imputer.random_state_) == state


def test_noise_is_refused_wherever_it_is():
    X, y = data()
    steps = [
        (FunctionTransformer(noise), "functiontransformer"),
        (make_pipeline(MaxAbsScaler(), FunctionTransformer(noise)), "pipeline"),
        (FunctionTransformer(lambda X: scipy.sparse.csr_matrix(noise(X))), "functiontransformer"),
    ]
    for step, name in steps:
        pipe = make_pipeline("passthrough", step, MaxAbsScaler(), Ridge()).fit(X, y)
        with pytest.raises(ValueError, match=f"step '{name}' must be one that gives the same features"):
            HessianInverter("direct").fit(pipe, (X, y))


def test_steps_that_do_not_draw_are_taken():
    X, y = data()
    words = [f"word{i % 5} word{i % 3}" for i in range(60)]
    cases = [
        (make_pipeline(StandardScaler(copy=False), Ridge()), X),
        (make_pipeline(FunctionTransformer(), MaxAbsScaler(copy=False), Ridge()), scipy.sparse.coo_matrix(X)),
        (make_pipeline(TfidfVectorizer(), Ridge()), words),
    ]
    for pipe, inputs in cases:
        pipe.fit(copy.deepcopy(inputs), y)
        assert HessianInverter("direct").fit(pipe, (inputs, y)).n_samples_ == 60
