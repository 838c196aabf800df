"""``direct``: singular, indefinite and ill-conditioned matrices; sample space."""

import copy
import dataclasses
import re

import numpy as np
import pytest
import scipy.linalg
import torch
from oracles import Oracle, matrix_error, oracle_matrix, perturbation_for, pseudo_solution, relative_error, solution
from problems import problem
from sklearn.exceptions import ConvergenceWarning
from torch import nn

from skinvert import HessianInverter, TorchTwiceDifferentiable
from skinvert.methods import Direct
from skinvert.methods.advice import advise
from skinvert.methods.condition import norm1, rcond
from skinvert.methods.dense import CholeskyInverse
from skinvert.methods.sample_space import SampleSpaceInverse
from skinvert.operators import Dense, DiagonalMatrix, LowRank


class Unpenalised(TorchTwiceDifferentiable):
    """Weight decay on all but the intercepts, as scikit-learn penalises."""

    def penalty_diagonal(self):
        return torch.cat(
            [
                torch.full((size,), 0.0 if "bias" in name else self.weight_decay, dtype=self.dtype)
                for name, size in zip(self.layout.names, self.layout.sizes, strict=True)
            ]
        )

    def penalty_gradient(self):
        return self.penalty_diagonal() * torch.cat([t.detach().reshape(-1) for t in self.theta])


def softmax_shift():
    """A softmax is the same for logits moved together: 7 null directions, p = 21."""
    case = problem("softmax", "cross_entropy", n=40)
    return case.module, case.data, {"loss": "cross_entropy"}, Oracle(case).hessian(), 14


def multinomial_logistic():
    """With the weights penalised one null direction is left, of the intercepts: Cholesky does not fail."""
    case = problem("softmax", "cross_entropy", n=40)
    penalty = torch.tensor([0.1] * 18 + [0.0] * 3, dtype=torch.float64)
    H = Oracle(case, penalty).hessian()
    return Unpenalised(case.module, "cross_entropy", 0.1), case.data, {}, H, 20


SINGULAR = {"softmax shift": softmax_shift, "unpenalised intercept": multinomial_logistic}


@pytest.mark.parametrize("build", SINGULAR.values(), ids=SINGULAR.keys())
def test_pseudo_inverse_inside_the_range(build):
    model, data, settings, H, rank = build()
    b = np.random.default_rng(0).standard_normal((7, 21)) @ H
    inverter = HessianInverter("direct", **settings).fit(model, data)
    x, info = inverter.solve(b)
    assert relative_error(x, pseudo_solution(H, b, rank)) <= 1e-10
    assert info["converged"].all()


@pytest.mark.parametrize("build", SINGULAR.values(), ids=SINGULAR.keys())
def test_pseudo_inverse_outside_the_range(build):
    model, data, settings, H, rank = build()
    b = np.random.default_rng(0).standard_normal((7, 21))
    inverter = HessianInverter("direct", **settings).fit(model, data)
    with pytest.warns(scipy.linalg.LinAlgWarning, match=f"rank {rank} of 21.*7 of 7"):
        x, info = inverter.solve(b)
    assert relative_error(x, pseudo_solution(H, b, rank)) <= 1e-10
    assert not info["converged"].any()


# The case that makes a condition estimate necessary: at many a θ Cholesky does not fail, and is off by 10¹³ and more.
def test_cholesky_that_does_not_fail_on_an_unpenalised_intercept():
    case, fooled = problem("softmax", "cross_entropy", n=40), 0
    penalty = torch.tensor([0.1] * 18 + [0.0] * 3, dtype=torch.float64)
    for _ in range(12):
        module = copy.deepcopy(case.module)
        for tensor in module.parameters():
            tensor.data.normal_()
        H = Oracle(dataclasses.replace(case, module=module), penalty).hessian()
        fooled += int(torch.linalg.cholesky_ex(torch.from_numpy(H)).info) == 0
        b = np.random.default_rng(0).standard_normal((3, 21)) @ H
        inverter = HessianInverter("direct").fit(Unpenalised(module, "cross_entropy", 0.1), case.data)
        assert relative_error(inverter.transform(b), pseudo_solution(H, b, 20)) <= 1e-10
    assert fooled


def test_cholesky_that_does_not_fail_on_a_singular_matrix():
    A = torch.tensor([[1.0, 1.0], [1.0, 1.0 + 2**-52]], dtype=torch.float64)
    b = torch.tensor([[2.0, 2.0]], dtype=torch.float64)
    assert int(torch.linalg.cholesky_ex(A).info) == 0
    torch.testing.assert_close(Direct().invert(Dense(A), 0.0).solve(b).x, torch.ones(1, 2, dtype=torch.float64))


def test_gradients_of_a_softmax_are_inside_the_range():
    case = problem("softmax", "cross_entropy", n=40)
    b = Oracle(case).gradient_rows()
    received = HessianInverter("direct", loss="cross_entropy").fit(case.module, case.data).transform(b)
    assert relative_error(received, pseudo_solution(Oracle(case).hessian(), b, 14)) <= 1e-10


@pytest.mark.parametrize("model", ["mlp", "cnn1d", "transformer"])
def test_indefinite_is_solved_and_said(model):
    case = problem(model, "cross_entropy", 0.05)
    H, b = oracle_matrix(case), case.right_hand_sides(5)
    least = np.linalg.eigvalsh(H)[0]
    with pytest.warns(scipy.linalg.LinAlgWarning, match="indefinite") as record:
        inverter = HessianInverter("direct", 0.01, **case.settings()).fit(case.module, case.data)
    named = float(re.search(r"eigenvalue is (-[\d.e+-]+),", str(record[0].message))[1])
    assert named == pytest.approx(least + 0.01, rel=1e-2)
    assert 'curvature="ggn"' in str(record[0].message)
    x, info = inverter.solve(b)
    assert inverter.residual(b, x).max() <= 1e-10 and info["converged"].all()
    assert relative_error(x, solution(H, 0.01, b)) <= 1e-8


def test_zero_matrix():
    inverse = Direct().invert(Dense(torch.zeros(3, 3)), 0.0)
    assert not inverse.solve(torch.zeros(1, 3)).x.any()
    with pytest.warns(scipy.linalg.LinAlgWarning, match="rank 0 of 3"):
        assert not inverse.solve(torch.ones(1, 3)).x.any()


def test_non_finite_matrix_is_refused():
    with pytest.raises(ValueError, match="finite"):
        Direct().invert(Dense(torch.full((2, 2), torch.nan)), 0.0)


@pytest.mark.parametrize("shift", [0.0, 1e-3, 1.0])
def test_at_another_perturbation(shift):
    H = torch.randn(6, 6, dtype=torch.float64)
    H = H @ H.mT
    b = torch.randn(4, 6, dtype=torch.float64)
    received = Direct().invert(Dense(H), 0.1).at(shift).solve(b).x
    assert relative_error(received, solution(H.numpy(), shift, b)) <= 1e-10


# -- sample space --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", ["ggn", "empirical_fisher"])
@pytest.mark.parametrize(("shift", "weight_decay"), [(0.01, 0.0), (0.0, 0.01), (0.1, 0.1)])
@pytest.mark.parametrize("weighted", [False, True])
def test_sample_space(curvature, shift, weight_decay, weighted):
    case = problem("cnn2d", "class_weights", weight_decay, weighted)
    inverter = HessianInverter("direct", shift, curvature=curvature, **case.settings())
    inverter.fit(case.module, case.data, case.sample_weight)
    assert isinstance(inverter.inverse_, SampleSpaceInverse)
    H, b = oracle_matrix(case, curvature), case.right_hand_sides(7)
    x, info = inverter.solve(b)
    assert relative_error(x, solution(H, shift, b)) <= 1e-10
    assert info["residual"].max() <= 1e-10 and info["converged"].all()


@pytest.mark.parametrize("shift", [1e-8, 1e-5, 1e-2])
def test_sample_space_at_a_small_perturbation(shift):
    F, b = torch.randn(5, 30, dtype=torch.float64), torch.randn(4, 30, dtype=torch.float64)
    inverse = Direct().invert(LowRank(F), shift)
    assert isinstance(inverse, SampleSpaceInverse)
    x, info = inverse.solve(b)
    A = F.mT @ F + shift * torch.eye(30, dtype=torch.float64)
    residual = (x @ A - b).norm(dim=1) / b.norm(dim=1)
    assert bool((residual <= 1e-14 / shift).all()) and info["converged"].all()


@pytest.mark.parametrize("shift", [1e-8, 1e-6])
def test_sample_space_says_where_rounding_allows_no_solution(shift):
    F, b = torch.randn(5, 30), torch.randn(4, 30)
    with pytest.warns(ConvergenceWarning, match=r"4 of 4 .*dtype=torch\.float64"):
        _, info = Direct().invert(LowRank(F), shift).solve(b)
    assert not info["converged"].any()


def test_sample_space_needs_a_positive_shift_everywhere():
    F, penalty = torch.randn(2, 5, dtype=torch.float64), torch.tensor([0.0, 1, 1, 1, 1], dtype=torch.float64)
    inverse = Direct().invert(LowRank(F, penalty), 0.0)
    b = torch.randn(3, 5, dtype=torch.float64)
    assert isinstance(inverse, CholeskyInverse)
    assert relative_error(inverse.solve(b).x, solution(LowRank(F, penalty).to_dense().numpy(), 0.0, b)) <= 1e-10


def test_a_factor_of_many_rows_is_summed():
    F = torch.randn(9, 4, dtype=torch.float64)
    assert isinstance(Direct().invert(LowRank(F), 1.0), CholeskyInverse)


# -- float32 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_float32_loses_no_more_than_the_matrix_does(seed):
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(60, 60, dtype=torch.float64, generator=generator))[0]
    A = (Q * torch.logspace(-4, 0, 60, dtype=torch.float64)) @ Q.mT
    A = ((A + A.mT) / 2).float()
    b = torch.randn(4, 60, generator=generator)
    received = Direct().invert(Dense(A), 0.0).solve(b).x
    assert relative_error(received, solution(A.double().numpy(), 0.0, b)) <= 1e-5


def test_is_the_hessian_of_a_regression():
    X, y = torch.randn(30, 4, dtype=torch.float64), torch.randn(30, 1, dtype=torch.float64)
    inverter = HessianInverter("direct", loss="mse").fit(nn.Linear(4, 1, bias=False).double(), (X, y))
    assert matrix_error(inverter.curvature_.to_dense(), (2 * X.mT @ X / 30).numpy()) <= 1e-14


def test_perturbation_is_on_the_scale_of_the_mean():
    case = problem("mlp", "mse_sum", 0.1)
    H, b = oracle_matrix(case), case.right_hand_sides(2)
    shift = perturbation_for(H, 100)
    inverter = HessianInverter("direct", shift, **case.settings()).fit(case.module, case.data)
    assert relative_error(inverter.transform(b), solution(H, shift, b)) <= 1e-10


@pytest.mark.parametrize("decades", [0, 3, 8])
@pytest.mark.parametrize("by_columns", [False, True])
def test_the_condition_is_estimated_from_a_factor_in_either_layout(decades, by_columns):
    Q = np.linalg.qr(np.random.default_rng(0).standard_normal((30, 30)))[0]
    A = torch.from_numpy((Q * np.logspace(-decades, 0, 30)) @ Q.T)
    A = (A + A.mT) / 2
    factor = torch.linalg.cholesky(A)
    factor = factor.mT.contiguous().mT if by_columns else factor.contiguous()
    exact = 1 / np.linalg.cond(A.numpy(), 1)
    # Hager's estimate of ‖A⁻¹‖ is from below, and within a factor of three in practice.
    assert exact * (1 - 1e-6) <= rcond(factor, norm1(A)) <= 3 * exact


def test_a_factorised_matrix_is_no_approximation():
    A = Dense(torch.diag(torch.tensor([1.0, 2.0])))
    dense, few = Direct().invert(A, 0.0), Direct().invert(LowRank(torch.eye(2)[:1]), 1.0)
    for inverse in (dense, dense.at(1.0), few):
        assert inverse.solve(torch.ones(1, 2)).info["approximate"] is False


def test_direct_is_advised_where_it_fits(monkeypatch):
    A = DiagonalMatrix(torch.ones(3))
    assert advise(A, "a", "b") == 'Try a, b, or method="direct".'
    # 6 p² numbers of 4 bytes.
    monkeypatch.setattr("skinvert.methods.advice.available_memory", lambda device: 6 * 9 * 4)
    assert advise(A, "a", "b") == "Try a, or b." and advise(A, "a") == "Try a."


@pytest.mark.parametrize("shift", [1e-1, 1e-2])
def test_sample_space_is_nearer_than_the_identity_of_woodbury_alone(shift):
    """One step of refinement takes off what the difference of two large terms has lost."""
    generator = torch.Generator().manual_seed(0)
    F, b = torch.randn(20, 60, generator=generator), torch.randn(30, 60, generator=generator)
    core = torch.eye(20) + F @ F.mT / shift
    alone = b / shift - (torch.linalg.solve(core, (b / shift) @ F.mT, left=False) @ F) / shift
    H = F.double().mT @ F.double() + shift * torch.eye(60, dtype=torch.float64)
    expected = torch.linalg.solve(H, b.double().mT).mT
    received = Direct(rtol=0.1).invert(LowRank(F), shift).solve(b).x
    assert float((received - expected).norm()) <= 0.7 * float((alone - expected).norm())


@pytest.mark.parametrize("condition", [10.0, 3e3])
def test_more_rows_than_parameters_go_by_the_inverse_and_are_refined(condition):
    Q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((30, 30)))
    H = (Q * np.geomspace(1 / condition, 1, 30)) @ Q.T
    A, b = Dense(torch.from_numpy(H).float()), np.random.default_rng(1).standard_normal((70, 30))
    inverse = Direct().invert(A, 0.0)
    x, info = inverse.solve(torch.from_numpy(b).float())
    assert isinstance(inverse, CholeskyInverse) and inverse._inverse is not None
    held = A.matrix.double().numpy()
    rounded = solution(held, 0.0, b).astype(np.float32).astype(np.float64)
    found, best = (np.linalg.norm(part @ held - b, axis=1).max() for part in (x.double().numpy(), rounded))
    # Near what float32 can hold of x, or what is left unrefined; the plain product with the inverse is 4 times as far.
    assert found <= max(1.5 * best, 1.1e-5 * np.linalg.norm(b, axis=1).max())
    assert bool(info["converged"].all())
