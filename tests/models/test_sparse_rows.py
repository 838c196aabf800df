"""Sparse rows give a scikit-learn model the curvature of the same rows made dense, a batch at a time."""

import warnings

import numpy as np
import pytest
import torch
from oracles import matrix_error
from scipy.sparse import coo_array, csc_array, csr_matrix
from sklearn import config_context
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline

from skinvert import HessianInverter, PerSampleGradient, SklearnTwiceDifferentiable


@pytest.mark.parametrize("kind", [csr_matrix, csc_array, coo_array])
@pytest.mark.parametrize("working_memory", [1024, 1e-4])
@pytest.mark.parametrize("case", ["binary", "ridge", "mlp"])
def test_sparse_rows_are_those_of_the_dense_matrix(case, kind, working_memory, sparse_fits):
    model, X, y = sparse_fits[case]
    b = np.random.default_rng(0).normal(size=(2, SklearnTwiceDifferentiable(model).num_params))
    expected = HessianInverter("direct", 1.0, curvature="ggn").fit(model, (X, y)).transform(b)
    with config_context(working_memory=working_memory):
        received = HessianInverter("direct", 1.0, curvature="ggn", batch_size=7).fit(model, (kind(X), y)).transform(b)
    np.testing.assert_allclose(received, expected, rtol=1e-9, atol=1e-12)


def test_sparse_rows_of_the_functional_faces(sparse_fits):
    model, X, y = sparse_fits["binary"]
    adapted = SklearnTwiceDifferentiable(model)
    torch.testing.assert_close(adapted.hessian(csr_matrix(X), y), adapted.hessian(X, y))
    rows = PerSampleGradient(model).fit_transform(csr_matrix(X), y)
    np.testing.assert_allclose(rows, PerSampleGradient(model).fit_transform(X, y), atol=1e-12)


@pytest.mark.parametrize("step", [CountVectorizer(), TfidfVectorizer()])
def test_a_pipeline_of_texts(step):
    texts = ["good film", "bad film", "nice one", "awful one", "good one", "bad one"] * 5
    labels = np.array(["pos", "neg"] * 15)
    pipe = make_pipeline(step, LogisticRegression()).fit(texts, labels)
    dense = pipe[0].transform(texts).toarray()
    inverter = HessianInverter("direct").fit(pipe, (texts, labels))
    expected = HessianInverter("direct").fit(pipe[-1], (dense, labels))
    assert matrix_error(inverter.curvature_.to_dense(), expected.curvature_.to_dense().numpy()) <= 1e-12
    rows = PerSampleGradient(pipe).fit_transform(texts, labels)
    np.testing.assert_allclose(rows, PerSampleGradient(pipe[-1]).fit_transform(dense, labels), atol=1e-12)


@pytest.fixture(scope="module")
def sparse_fits():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(30, 5)) * (rng.random((30, 5)) < 0.3)
    labels, y = rng.integers(2, size=30), rng.normal(size=30)
    network = MLPClassifier((3,), activation="tanh", solver="lbfgs", max_iter=20, alpha=1.0, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = network.fit(X, labels)
    return {
        "binary": (LogisticRegression().fit(X, labels), X, labels),
        "ridge": (Ridge().fit(X, y), X, y),
        "mlp": (fitted, X, labels),
    }
