"""An MLP stopped early: its Hessian is indefinite, and every method deals with it openly."""

import numpy as np
import pytest
import scipy.linalg
import torch
from oracles import oracle_matrix, solution
from problems import problem

from skinvert import HessianInverter


@pytest.mark.filterwarnings("ignore::scipy.linalg.LinAlgWarning")
@pytest.mark.parametrize("method", ["direct", "minres"])
def test_solves_all_the_same(method):
    case = problem("mlp", "mse")
    H = oracle_matrix(case)
    assert np.linalg.eigvalsh(H)[0] < -1e-2
    b = case.right_hand_sides(7)
    x, info = HessianInverter(method, 1e-3, **case.settings()).fit(case.module, case.data).solve(b)
    A = H + 1e-3 * np.eye(case.p)
    assert (np.linalg.norm(x @ A - b, axis=1) <= 1e-6 * np.linalg.norm(b, axis=1)).all()
    assert info["converged"].all()
    np.testing.assert_allclose(x, solution(H, 1e-3, b), rtol=1e-3, atol=1e-3 * np.abs(x).max())


def test_direct_says_how_negative():
    case = problem("mlp", "mse")
    with pytest.warns(scipy.linalg.LinAlgWarning, match="indefinite: its smallest eigenvalue is -.*gradient's norm"):
        HessianInverter("direct", 1e-3, **case.settings()).fit(case.module, case.data)


@pytest.mark.parametrize("curvature", ["ggn", "fisher", "empirical_fisher"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_other_curvatures_are_semi_definite_to_rounding(curvature, dtype):
    case = problem("mlp", "mse")
    inverter = HessianInverter("cg", 1.0, curvature=curvature, **case.settings(dtype=dtype)).fit(case.module, case.data)
    values = torch.linalg.eigvalsh(inverter.curvature_.to_dense().double())
    assert values[0] >= -case.p * torch.finfo(dtype).eps * values[-1]
