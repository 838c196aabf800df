"""On a GPU: the same answers as the oracle on the CPU, on the right device, and a fit that loads anywhere."""

import copy
import pickle

import numpy as np
import pytest
import torch
from oracles import oracle_matrix, perturbation_for, relative_error, solution
from problems import MODELS, problem

from skinvert import HessianInverter, InfluenceFunction, PerSampleGradient
from skinvert.methods import CG

pytestmark = pytest.mark.cuda

METHODS = ["direct", "cg"]


def on_gpu(case):
    """Return a copy of a problem's module on the GPU, and its data there."""
    return copy.deepcopy(case.module).cuda(), (case.X.cuda(), case.y.cuda())


def configured(method):
    return CG(rtol=1e-12, maxiter=10_000) if method == "cg" else method


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("curvature", ["hessian", "ggn", "empirical_fisher"])
@pytest.mark.parametrize("model", list(MODELS))
def test_solves_as_the_oracle_does(model, curvature, method):
    case = problem(model, "mse", 0.1, True)
    H = oracle_matrix(case, curvature)
    shift = perturbation_for(H, 1e3)
    b = case.right_hand_sides(7)
    expected = solution(H, shift, b)
    module, data = on_gpu(case)
    inverter = HessianInverter(configured(method), shift, curvature=curvature, **case.settings())
    received = inverter.fit(module, data, case.sample_weight).transform(torch.from_numpy(b).cuda())
    assert received.is_cuda
    assert relative_error(received.cpu(), expected) <= 1e-10


@pytest.mark.parametrize("method", METHODS)
def test_float32_loses_only_its_digits(method):
    case = problem("mlp", "cross_entropy")
    H = oracle_matrix(case)
    shift = perturbation_for(H, 1e3)
    b = case.right_hand_sides(7)
    module, data = on_gpu(case)
    inverter = HessianInverter(method, shift, dtype=torch.float32, **case.settings()).fit(module, data)
    assert relative_error(inverter.transform(b), solution(H, shift, b)) <= 1e-3


def test_auto_moves_the_work_and_leaves_the_model():
    case = problem("mlp", "cross_entropy")
    module = copy.deepcopy(case.module)
    inverter = HessianInverter("direct", 0.5, device="auto", curvature="ggn", **case.settings()).fit(module, case.data)
    b = case.right_hand_sides(3)
    received = inverter.transform(b)
    assert inverter.inverse_.device.type == "cuda"
    assert next(module.parameters()).device.type == "cpu"
    assert isinstance(received, np.ndarray)
    assert relative_error(received, solution(oracle_matrix(case, "ggn"), 0.5, b)) <= 1e-10


def test_a_fit_loads_on_a_machine_without_a_gpu():
    case = problem("mlp", "cross_entropy")
    module, data = on_gpu(case)
    inverter = HessianInverter("direct", 0.5, curvature="ggn", **case.settings()).fit(module, data)
    b = case.right_hand_sides(3)
    loaded = pickle.loads(pickle.dumps(inverter))
    assert loaded.inverse_.device.type == "cpu"
    np.testing.assert_allclose(loaded.transform(b), inverter.transform(b), rtol=1e-9)


def test_singular_curvature_falls_back_to_the_pseudo_inverse():
    case = problem("softmax", "cross_entropy")
    H = oracle_matrix(case)
    module, data = on_gpu(case)
    inverter = HessianInverter("direct", **case.settings()).fit(module, data)
    b = case.right_hand_sides(4) @ H
    received = inverter.transform(b)
    assert relative_error(received, b @ np.linalg.pinv(H, rcond=1e-10, hermitian=True)) <= 1e-8


def test_plain_rows_on_the_gpu():
    X = np.random.default_rng(0).standard_normal((40, 6))
    expected = solution(X.T @ X / 40, 0.1, X)
    received = HessianInverter("direct", 0.1, device="cuda").fit(X).transform(X)
    assert relative_error(received, expected) <= 1e-10


@pytest.mark.parametrize("model", ["mlp", "cnn2d", "lstm"])
def test_per_sample_gradients_are_the_cpu_s(model):
    case = problem(model, "mse")
    module, data = on_gpu(case)
    expected = PerSampleGradient(case.module, loss=case.loss).fit_transform(*case.data)
    received = PerSampleGradient(module, loss=case.loss).fit_transform(*data)
    assert received.is_cuda
    assert relative_error(received.cpu(), expected) <= 1e-10


def test_score_is_the_cpu_s():
    case = problem("mlp", "cross_entropy")
    module, data = on_gpu(case)
    settings = case.settings(curvature="ggn")
    expected = HessianInverter("direct", 0.5, **settings).fit(case.module, case.data).score(case.data)
    received = HessianInverter("direct", 0.5, **settings).fit(module, data).score(data)
    assert received == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("method", ["direct", "cg", "ekfac"])
def test_bounds_hold_and_come_back_to_the_rows(method, dtype):
    case = problem("mlp", "cross_entropy", 0.1)
    module, data = on_gpu(case)
    inverter = HessianInverter(method, 0.1, curvature="ggn", **case.settings(dtype=torch.float64)).fit(module, data)
    b = torch.from_numpy(case.right_hand_sides(20)).to(dtype)
    forms = inverter.quadratic(b.cuda(), b.cuda())
    assert forms.values.is_cuda and forms.bounds.is_cuda
    exact = b.double().numpy() @ solution(oracle_matrix(case, "ggn"), 0.1, b.double().numpy()).T
    assert (np.abs(forms.values.cpu().numpy() - exact) <= forms.bounds.cpu().numpy()).all()
    assert inverter.quadratic(b).values.device == b.device


def test_the_gaussian_is_that_of_the_cpu():
    case = problem("mlp", "cross_entropy", 0.1)
    module, data = on_gpu(case)
    settings = case.settings(curvature="ggn")
    here = HessianInverter("direct", 0.1, **settings).fit(case.module, case.data)
    there = HessianInverter("direct", 0.1, **settings).fit(module, data)
    assert there.log_det() == pytest.approx(here.log_det(), rel=1e-10)
    assert there.log_evidence() == pytest.approx(here.log_evidence(), rel=1e-10)
    np.testing.assert_allclose(there.covariance("sandwich"), here.covariance("sandwich"), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(there.sample(5, random_state=0), here.sample(5, random_state=0), rtol=1e-6, atol=1e-9)
    received = there.predictive_variance(case.X.cuda()).cpu()
    torch.testing.assert_close(received, here.predictive_variance(case.X), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("settings", [{}, {"removal": "newton"}, {"score_rtol": 1e-6}, {"normalize": "cosine"}])
@pytest.mark.parametrize("n_test", [3, 12])
def test_scores_are_the_cpu_s(n_test, settings):
    case = problem("mlp", "cross_entropy")
    module, data = on_gpu(case)
    inverter = HessianInverter("direct", 5.0, curvature="ggn", **case.settings())
    test = tuple(part[:n_test] for part in data)
    influence = InfluenceFunction(inverter, **settings).fit(module, data)
    received = influence.transform(test)
    expected = InfluenceFunction(inverter, **settings).fit(case.module, case.data)
    assert received.is_cuda
    torch.testing.assert_close(received.cpu(), expected.transform(tuple(part.cpu() for part in test)))
    torch.testing.assert_close(influence.top(test, k=2).rows.cpu(), expected.top(test, k=2).rows)
    np.testing.assert_allclose(influence.self_influence(), expected.self_influence(), rtol=1e-9)
    groups = np.arange(12) % 3
    torch.testing.assert_close(
        influence.group_effect(groups, test).cpu(), expected.group_effect(groups, case.data)[:n_test]
    )
    near, known = influence.removed_parameters([1]), expected.removed_parameters([1])
    assert all(near[name].is_cuda for name in near)
    torch.testing.assert_close({name: value.cpu() for name, value in near.items()}, known)
