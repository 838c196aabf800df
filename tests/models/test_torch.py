"""TorchTwiceDifferentiable: its contract, and the seam for models that are not ``loss(model(x), y)``."""

import numpy as np
import pytest
import torch
from oracles import Oracle, matrix_error, oracle_matrix, relative_error, solution
from problems import LOSSES, MODELS, problem
from torch import nn

from skinvert import HessianInverter, PerSampleGradient, TorchTwiceDifferentiable, solve_hvp


@pytest.mark.parametrize("model", MODELS)
def test_grad_hessian_and_mvp(model):
    case = problem(model, "class_weights", 0.1)
    adapted = TorchTwiceDifferentiable(case.module, case.loss, 0.1)
    V = torch.from_numpy(case.right_hand_sides(2))
    H = oracle_matrix(case)
    gradient = adapted.grad(*case.data, create_graph=True)
    np.testing.assert_allclose(gradient.detach(), Oracle(case).gradient(), rtol=1e-9, atol=1e-12)
    assert matrix_error(adapted.hessian(*case.data), H) <= 1e-12
    assert matrix_error(adapted.mvp(gradient, V, adapted.parameters), V.numpy() @ H) <= 1e-12


@pytest.mark.parametrize("loss", LOSSES)
def test_grad_of_each_loss(loss):
    case = problem("mlp", loss, 0.1)
    adapted = TorchTwiceDifferentiable(case.module, case.loss, 0.1)
    np.testing.assert_allclose(adapted.grad(*case.data), Oracle(case).gradient(), rtol=1e-10, atol=1e-12)


def test_contract():
    case = problem("mlp", "mse")
    adapted = TorchTwiceDifferentiable(case.module, "mse")
    assert adapted.num_params == case.p == sum(t.numel() for t in adapted.parameters)
    assert adapted.tensor_type() is torch.Tensor


def test_mvp_on_inputs():
    case = problem("mlp", "mse")
    adapted = TorchTwiceDifferentiable(case.module, "mse")
    X = case.X.clone().requires_grad_(True)
    received = adapted.mvp(adapted.grad(X, case.y, create_graph=True), torch.eye(case.p, dtype=X.dtype), X)
    expected = torch.autograd.functional.jacobian(lambda inputs: adapted.grad(inputs, case.y, True), case.X)
    torch.testing.assert_close(received, expected.flatten(1))


@pytest.mark.parametrize("curvature", ["hessian", "ggn", "empirical_fisher"])
@pytest.mark.parametrize("params", ["2.*", "*.bias", ["0.weight", "2.bias"]])
def test_params_select_a_block(curvature, params):
    case = problem("mlp", "class_weights", 0.1)
    whole = HessianInverter("direct", 2.0, **case.settings(curvature=curvature)).fit(case.module, case.data)
    part = HessianInverter("direct", 2.0, **case.settings(curvature=curvature, params=params))
    part.fit(case.module, case.data)
    names = whole.get_feature_names_out().tolist()
    places = [names.index(name) for name in part.get_feature_names_out()]
    expected = oracle_matrix(case, curvature)[np.ix_(places, places)]
    assert 0 < len(places) < case.p
    assert matrix_error(part.curvature_.to_dense(), expected) <= 1e-12


# -- the seam ------------------------------------------------------------------------------------------------------


class Scorer(nn.Module):
    """A model of keyword arguments that returns its own loss and logits, as language models do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, tokens, labels):
        logits = self.inner(tokens)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class FromLogits(TorchTwiceDifferentiable):
    """The seam with one tensor of outputs: every curvature."""

    def outputs(self, module, batch):
        return module(**batch)["logits"]

    def per_sample_loss(self, outputs, batch):
        return nn.functional.cross_entropy(outputs, batch["labels"], reduction="none")


class FromLoss(TorchTwiceDifferentiable):
    """The seam with the model's outputs as they are: the Hessian and the empirical Fisher."""

    def outputs(self, module, batch):
        return module(**batch)

    def per_sample_loss(self, outputs, batch):
        return nn.functional.cross_entropy(outputs["logits"], batch["labels"], reduction="none")


class Masked(TorchTwiceDifferentiable):
    """Padded sequences: a row's loss is the mean over its own valid steps."""

    def outputs(self, module, batch):
        return module(batch["x"])

    def per_sample_loss(self, outputs, batch):
        each = (outputs - batch["y"]).square().mean(2)
        return (each * batch["mask"]).sum(1) / batch["mask"].sum(1)


def dict_batches(case, size=5):
    return [{"tokens": case.X[i : i + size], "labels": case.y[i : i + size]} for i in range(0, len(case.y), size)]


@pytest.mark.parametrize(
    ("seam", "curvature"),
    [(FromLogits, c) for c in ("hessian", "ggn", "empirical_fisher")]
    + [(FromLoss, "hessian"), (FromLoss, "empirical_fisher")],
)
def test_dict_batches(seam, curvature):
    case = problem("embedding", "cross_entropy", 0.1)
    H = oracle_matrix(case, curvature)
    model, b = seam(Scorer(case.module), None, 0.1), case.right_hand_sides(3)
    inverter = HessianInverter("direct", 2.0, curvature=curvature).fit(model, dict_batches(case))
    assert matrix_error(inverter.curvature_.to_dense(), H) <= 1e-12
    assert relative_error(inverter.transform(b), solution(H, 2.0, b)) <= 1e-10


@pytest.mark.parametrize("curvature", ["hessian", "ggn", "empirical_fisher"])
def test_dict_batches_with_weights(curvature):
    case = problem("embedding", "cross_entropy", 0.1, True)
    inverter = HessianInverter("direct", 2.0, curvature=curvature)
    inverter.fit(FromLogits(Scorer(case.module), None, 0.1), dict_batches(case), case.sample_weight)
    assert matrix_error(inverter.curvature_.to_dense(), oracle_matrix(case, curvature)) <= 1e-12


@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_masked_sequences(curvature):
    case = problem("tokenwise", "mse", 0.1)
    mask = (torch.arange(3)[None] <= torch.arange(12)[:, None] % 3).double()
    batches = [{"mask": mask[i : i + 5], "x": case.X[i : i + 5], "y": case.y[i : i + 5]} for i in (0, 5, 10)]
    oracle = Oracle(case)
    oracle.whole = lambda f, y: ((f - y).square().mean(2) * mask / mask.sum(1, keepdim=True)).sum(1).mean()
    inverter = HessianInverter("direct", 2.0, curvature=curvature).fit(Masked(case.module, None, 0.1), batches)
    assert matrix_error(inverter.curvature_.to_dense(), oracle.curvature(curvature)) <= 1e-12


def test_seam_and_the_other_public_faces():
    case = problem("embedding", "cross_entropy", 0.1)
    model, b = FromLogits(Scorer(case.module), None, 0.1), case.right_hand_sides(3)
    x, _ = solve_hvp("cg", model, dict_batches(case), b, hessian_perturbation=2.0, rtol=1e-12)
    assert relative_error(x, solution(oracle_matrix(case), 2.0, b)) <= 1e-10
    gradients = PerSampleGradient(model).fit(dict_batches(case)).transform(dict_batches(case))
    np.testing.assert_allclose(gradients, Oracle(case).gradient_rows(), rtol=1e-9, atol=1e-12)
