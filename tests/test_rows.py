"""Right-hand sides in the user's dtype, of any size, and the answers back in it."""

import numpy as np
import pytest
import torch
from facts import EXACT, ON_ROWS
from sklearn.exceptions import ConvergenceWarning
from torch import nn

from skinvert import HessianInverter, solve_hvp
from skinvert.methods import CG, MINRES, LiSSA
from skinvert.models import TorchTwiceDifferentiable

P, SHIFT = 8, 0.1
RNG = np.random.default_rng(0)
X, B = RNG.standard_normal((50, P)), RNG.standard_normal((3, P))
A = X.T @ X / 50 + SHIFT * np.eye(P)
METHODS = [name for name in EXACT if name in ON_ROWS]


def fitted(method="direct", rows=X, **settings):
    return HessianInverter(method, SHIFT, **settings).fit(rows.astype(np.float32))


def error(x, expected):
    return np.abs(np.asarray(x, dtype=np.float64) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_float64_rows_of_any_size_under_a_float32_curvature(method, as_tensor):
    inverter = fitted(method)
    for size in (1e-300, 1e-50, 1e-20, 1.0, 1e20, 1e50, 1e290):
        b = torch.from_numpy(B * size) if as_tensor else B * size
        x, info = inverter.solve(b)
        assert x.dtype == (torch.float64 if as_tensor else np.float64)
        assert info["converged"].all()
        assert error(x / size, np.linalg.solve(A, B.T).T) <= 2e-3
        assert error(inverter.inverse_transform(x) / size, B) <= 2e-3
        assert np.asarray(inverter.residual(b, x)).max() <= 2e-3
        assert np.asarray(inverter.residual(b, 2 * x)) == pytest.approx(1, abs=1e-2)
        path = inverter.path(b, [SHIFT, 1.0])
        assert error(path[0] / size, np.linalg.solve(A, B.T).T) <= 2e-3


@pytest.mark.parametrize("method", ["direct", "cg", "minres"])
def test_rows_of_many_sizes_together(method):
    sizes = np.array([1e-200, 1.0, 1e200])[:, None]
    x = fitted(method).transform(B * sizes)
    assert error(x / sizes, np.linalg.solve(A, B.T).T) <= 1e-4
    # Rows within reach of the dtype are not touched, to the last bit.
    inverter = fitted("direct")
    np.testing.assert_array_equal(inverter.transform(B * sizes)[1], inverter.transform(B)[1])


@pytest.mark.parametrize("method", [CG(atol=1e-3), MINRES(atol=1e-3), CG(x0=np.ones(P)), LiSSA(h0=np.ones(P))])
@pytest.mark.parametrize("size", [1e-60, 1e60])
def test_tolerances_and_starts_are_on_the_scale_of_b(method, size):
    x, info = fitted(method).solve(B * size)
    assert error(x / size, np.linalg.solve(A, B.T).T) <= 2e-3
    assert info["converged"].all()


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_functional_face(size):
    torch.manual_seed(0)
    net = nn.Linear(4, 1, bias=False)
    data = (torch.randn(30, 4), torch.randn(30, 1))
    b = np.random.default_rng(1).standard_normal((2, 4))
    H = 2 * (data[0].double().T @ data[0].double()).numpy() / 30
    for method in ("direct", "cg"):
        model = TorchTwiceDifferentiable(net, "mse")
        x, info = solve_hvp(method, model, data, b * size**4, hessian_perturbation=SHIFT)
        assert error(x / size**4, np.linalg.solve(H + SHIFT * np.eye(4), b.T).T) <= 1e-4
        assert info["converged"].all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rows(dtype):
    inverter, b = fitted(), torch.from_numpy(B).to(dtype)
    x, info = inverter.solve(b)
    assert x.dtype == dtype and info["converged"].all()
    assert error(x.double(), np.linalg.solve(A, b.double().numpy().T).T) <= 1e-2


def test_an_answer_beyond_the_dtype_of_b_is_told():
    weak = HessianInverter("direct", 1e-6).fit((X * 1e-3).astype(np.float32))
    with pytest.raises(ValueError, match=r"range of b's dtype torch\.float16.*Give b in float32"):
        weak.transform(torch.from_numpy(B).half())
    for inverter in (weak, HessianInverter("direct", 1e-10).fit((X * 1e-5).astype(np.float32))):
        with pytest.raises(ValueError, match=r"range of b's dtype.*float64"):
            inverter.transform(
                (B * 1e35).astype(np.float32) if inverter is weak else torch.from_numpy(B * 1e35).float()
            )
    strong = HessianInverter("direct", 1e6).fit((X * 1e3).astype(np.float32))
    with pytest.warns(ConvergenceWarning, match="below the range of b's dtype"):
        _, info = strong.solve((B * 1e-35).astype(np.float32))
    assert not info["converged"].any()
    with pytest.warns(ConvergenceWarning, match="below the range of b's dtype"):
        strong.path((B * 1e-35).astype(np.float32), [1e6])


def test_zeros_and_integers_stay_what_they_are():
    for method in METHODS:
        x, info = fitted(method).solve(np.vstack([np.zeros(P), B[0] * 1e-60]))
        assert not x[0].any() and info["converged"].all()
    whole = torch.arange(P)[None]
    assert fitted().transform(whole).dtype == torch.float32


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_plain_rows_whose_squares_leave_the_dtype_are_refused(size):
    with pytest.raises(ValueError, match=r"squares.*float64"):
        HessianInverter("cg", 1e-3).fit((X * size).astype(np.float32))
    x = HessianInverter("cg", SHIFT * size**2).fit(X * size).transform(B)
    assert error(x * size**2, np.linalg.solve(A, B.T).T) <= 1e-6


@pytest.mark.parametrize("method", ON_ROWS)
def test_a_perturbation_beyond_the_dtype_is_named(method):
    with pytest.raises(
        ValueError, match=r"hessian_perturbation must be 0 or in the range .*3\.4e\+38. of torch.float32.*float64"
    ):
        HessianInverter(method, 1e39).fit(X.astype(np.float32))
    with pytest.raises(ValueError, match="hessian_perturbation must be 0 or in the range"):
        fitted(method).path(B, [0.1, 1e39])
    x = HessianInverter(method, 1e39).fit(X).transform(B)
    assert error(x * 1e39, B) <= 1e-3
