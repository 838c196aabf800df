"""PerSampleGradient's rows against one backward pass a row."""

import pickle

import numpy as np
import pytest
import sklearn
import torch
from oracles import Oracle
from problems import LOSSES, MODELS, problem
from sklearn.base import clone
from sklearn.pipeline import make_pipeline
from torch.utils.data import DataLoader, TensorDataset

from skinvert import HessianInverter, PerSampleGradient

PAIRS = [(model, loss) for i, model in enumerate(MODELS) for loss in list(LOSSES)[i % 3 :: 3]]


@pytest.mark.parametrize(("model", "loss"), PAIRS)
def test_rows(model, loss):
    case = problem(model, loss)
    received = PerSampleGradient(case.module, loss=case.loss, batch_size=5).fit_transform(*case.data)
    np.testing.assert_allclose(received, Oracle(case).gradient_rows(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", ["class_weights", "mse", "ignore_index"])
def test_mean_of_the_training_rows_is_the_gradient(loss):
    case = problem("mlp", loss)
    rows = PerSampleGradient(case.module, loss=case.loss).fit_transform(*case.data)
    np.testing.assert_allclose(rows.mean(0), Oracle(case).gradient(), rtol=1e-10, atol=1e-13)


def test_weights_of_the_fit_set_the_scale():
    case = problem("mlp", "class_weights", 0.0, True)
    gradients = PerSampleGradient(case.module, loss=case.loss).fit(*case.data, case.sample_weight)
    assert gradients.loss_scale_ == pytest.approx(Oracle(case).scale)
    rows = gradients.transform(case.data).numpy()
    received = case.counts @ rows / case.counts.sum()
    np.testing.assert_allclose(received, Oracle(case).gradient(), rtol=1e-10, atol=1e-13)


def test_the_scale_of_the_fit_serves_other_rows():
    case = problem("mlp", "class_weights")
    gradients = PerSampleGradient(case.module, loss=case.loss).fit(*case.data)
    received = gradients.transform((case.X[3:5], case.y[3:5]))
    np.testing.assert_allclose(received, Oracle(case).gradient_rows()[3:5], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("model", ["mlp", "lstm", "cnn2d"])
def test_batch_size_and_memory_change_nothing(model):
    case = problem(model, "class_weights")
    whole = PerSampleGradient(case.module, loss=case.loss).fit_transform(*case.data)
    with sklearn.config_context(working_memory=0.01):
        parts = PerSampleGradient(case.module, loss=case.loss, batch_size=5).fit_transform(*case.data)
    np.testing.assert_allclose(parts, whole, rtol=1e-12, atol=1e-14)


def test_data_forms_and_kinds():
    case = problem("mlp", "class_weights")
    gradients = PerSampleGradient(case.module, loss=case.loss).fit(*case.data)
    expected = gradients.transform(case.data)
    assert isinstance(expected, torch.Tensor)
    arrays = gradients.transform((case.X.numpy(), case.y.numpy()))
    loader = gradients.transform(DataLoader(TensorDataset(*case.data), 5, shuffle=True))
    assert isinstance(arrays, np.ndarray)
    np.testing.assert_allclose(arrays, expected, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(loader, expected, rtol=1e-12, atol=1e-15)


def test_params_select_columns():
    case = problem("mlp", "cross_entropy")
    whole = PerSampleGradient(case.module, loss="cross_entropy").fit(*case.data)
    part = PerSampleGradient(case.module, loss="cross_entropy", params="2.*").fit(*case.data)
    places = [whole.get_feature_names_out().tolist().index(name) for name in part.get_feature_names_out()]
    assert places == list(range(25, 43)) == list(range(25, 25 + part.n_features_out_))
    np.testing.assert_allclose(part.transform(case.data), whole.transform(case.data)[:, places], atol=1e-14)


def test_gram_of_the_rows_is_the_empirical_fisher():
    case = problem("mlp", "class_weights", 0.0, True)
    pipeline = make_pipeline(PerSampleGradient(case.module, loss=case.loss), HessianInverter("direct", 0.1))
    pipeline.fit(case.X.numpy(), case.y.numpy())
    plain = problem("mlp", "class_weights")
    received = pipeline[-1].curvature_.to_dense()
    np.testing.assert_allclose(received, Oracle(plain).empirical_fisher(), rtol=1e-9, atol=1e-12)


def test_clone_shares_the_model_and_pickle_keeps_the_numbers():
    case = problem("mlp", "cross_entropy")
    gradients = PerSampleGradient(case.module, loss="cross_entropy", batch_size=3).fit(*case.data)
    assert clone(gradients).model is case.module and clone(gradients).batch_size == 3
    loaded = pickle.loads(pickle.dumps(gradients))
    torch.testing.assert_close(loaded.transform(case.data), gradients.transform(case.data), rtol=0, atol=0)
    assert "PerSampleGradient" in repr(gradients) and "PerSampleGradient" in gradients._repr_html_()
