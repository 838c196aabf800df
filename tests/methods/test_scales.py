"""The scales of A and of b divide out of every method: each row is right, or warned of and not converged."""

import warnings

import numpy as np
import pytest
import torch
from facts import EXACT, KINDS, at_rest, having
from sklearn.exceptions import ConvergenceWarning

from skinvert._scaling import exponents, norms
from skinvert.curvature import Gram
from skinvert.methods import CG, MINRES, LiSSA, Nystroem
from skinvert.operators import Dense

METHODS = {name: at_rest(name) for name in EXACT} | {
    "block cg": CG(block=True),
    "block minres": MINRES(block=True),
    "cg, jacobi": CG(preconditioner="jacobi"),
    "cg, nystroem": CG(preconditioner=Nystroem(rank=6)),
    "lissa, minibatches": LiSSA(rtol=1e-3, batch_size=40),
}
OF_B = {torch.float32: [1e-36, 1e-30, 1e-24, 1e-12, 1e12, 1e20, 1e30], torch.float64: [1e-300, 1e-30, 1.0, 1e30, 1e290]}
OF_A = [1e-20, 1e-10, 1.0, 1e12, 1e30]
P = 12


def problem(k=3, seed=0):
    """Rows of a factor, the matrix at λ = 0.3, right-hand sides and solutions, all near one and in float64."""
    rng = np.random.default_rng(seed)
    X, b = rng.standard_normal((60, P)), rng.standard_normal((k, P))
    A = X.T @ X / 60 + 0.3 * np.eye(P)
    return X, b, np.linalg.solve(A, b.T).T


def error(x, expected):
    return float((np.linalg.norm(np.asarray(x) - expected, axis=-1) / np.linalg.norm(expected, axis=-1)).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", METHODS)
def test_solve(name, dtype):
    X, b, x = problem()
    for of_a in OF_A:
        inverse = METHODS[name].invert(Gram(torch.from_numpy(X * of_a**0.5).to(dtype)), 0.3 * of_a)
        for of_b in OF_B[dtype]:
            rows, (low, high) = torch.from_numpy(b * of_b).to(dtype), (torch.finfo(dtype).tiny, torch.finfo(dtype).max)
            # √p and the largest entries stand between the sizes of x and of its rows.
            if not low * 100 < of_b / of_a < high / 100:
                continue
            found, info = inverse.solve(rows)
            assert error(found.double() * (of_a / of_b), x) <= 3e-3, (of_a, of_b)
            assert info["converged"].all(), (of_a, of_b)


@pytest.mark.parametrize("name", METHODS)
def test_a_solution_beyond_the_dtype_is_told(name):
    X, b, _ = problem()
    rows = torch.from_numpy(b).float()
    small = METHODS[name].invert(Gram(torch.from_numpy(X * 1e6).float()), 0.3e12)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        _, info = small.solve(rows * 1e-35)
    assert told and not info["converged"].any()


# Those that bring A and b near one, and back.
@pytest.mark.parametrize("name", ["cg", "cg, jacobi", "minres", "block minres", "lissa"])
def test_solutions_that_all_overflow_are_an_error(name):
    X, b, _ = problem()
    inverse = METHODS[name].invert(Gram(torch.from_numpy(X * 1e-10).float()), 0.3e-20)
    with pytest.raises(ValueError, match="range of"):
        inverse.solve(torch.from_numpy(b * 1e30).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["cg", "cg, jacobi", "cg, nystroem"])
def test_path(name, dtype):
    X, b, _ = problem()
    H = X.T @ X / 60
    shifts = np.array([1e-2, 0.3, 40.0])
    expected = np.stack([np.linalg.solve(H + shift * np.eye(P), b.T).T for shift in shifts])
    for of_a in OF_A:
        inverse = METHODS[name].invert(Gram(torch.from_numpy(X * of_a**0.5).to(dtype)), 0.3 * of_a)
        for of_b in (1e-24, 1.0, 1e20):
            if not 1e-36 < of_b / of_a < 1e36:
                continue
            B = torch.from_numpy(b * of_b).to(dtype)
            results = inverse.solve_path(B, shifts * of_a)
            assert all(info["converged"].all() and not info["negative_curvature"].any() for _, info in results)
            assert error(torch.stack([x for x, _ in results]).double() * (of_a / of_b), expected) <= 1e-3
            assert torch.equal(inverse.path(B, shifts * of_a)[1], results[1].x)


@pytest.mark.parametrize("name", METHODS)
def test_powers_of_two_change_no_digit(name):
    X, b, _ = problem()
    B, solutions = torch.from_numpy(b), []
    for of_a, of_b in ((0, 0), (200, -300)):
        rows = torch.ldexp(torch.from_numpy(X), torch.tensor(of_a // 2))
        inverse = METHODS[name].invert(Gram(rows), 0.3 * 2.0**of_a)
        x, info = inverse.solve(torch.ldexp(B, torch.tensor(of_b)))
        solutions.append((torch.ldexp(x, torch.tensor(of_a - of_b)), info.get("n_iter", torch.zeros(3))))
    # The preconditioner's and the largest eigenvalue's own decompositions may round differently.
    torch.testing.assert_close(
        solutions[0][0], solutions[1][0], rtol=1e-13 if name in ("cg", "minres") else 1e-9, atol=0
    )
    assert torch.equal(solutions[0][1], solutions[1][1])


# Three digits are all that the minibatches are asked for here.
@pytest.mark.parametrize("name", [name for name in METHODS if name != "lissa, minibatches"])
def test_rows_of_many_scales_together_are_rows_alone(name):
    X, b, x = problem(6)
    sizes = np.array([1e-36, 1e-24, 0.0, 1.0, 1e20, 1e30])[:, None]
    inverse = METHODS[name].invert(Gram(torch.from_numpy(X).float()), 0.3)
    B = torch.from_numpy(b * sizes).float()
    together, info = inverse.solve(B)
    assert info["converged"].all() and not together[2].any()
    some = [0, 1, 3, 4, 5]
    assert error(together[some].double() / torch.from_numpy(sizes[some]), x[some]) <= 1e-3
    for row, size in zip(range(6), sizes[:, 0], strict=True):
        alone = inverse.solve(B[row : row + 1]).x.double()[0] / (size or 1)
        torch.testing.assert_close(alone, together[row].double() / (size or 1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", [KINDS[name] for name in having("atol")])
def test_atol_is_on_the_scale_of_b(method):
    X, b, x = problem()
    A = Gram(torch.from_numpy(X).float())
    B = torch.from_numpy(b).float()
    # Above the size of b: nothing to do.
    done, info = method(atol=1e-20).invert(A, 0.3).solve(1e-25 * B)
    assert not done.any() and info["converged"].all() and not info["n_iter"].any()
    found, info = method(atol=1e-28).invert(A, 0.3).solve(1e-25 * B)
    assert 1e-5 < error(found.double() * 1e25, x) <= 0.02 and info["converged"].all()
    found, _ = method(atol=1e-3).invert(A, 0.3).solve(1e30 * B)
    assert error(found.double() / 1e30, x) <= 1e-4


@pytest.mark.parametrize("method", [KINDS[name] for name in having("x0")])
@pytest.mark.parametrize("of_b", [1e-30, 1.0, 1e20])
@pytest.mark.parametrize("of_start", [1e-30, 1.0, 1e30])
def test_starts_of_any_scale(method, of_b, of_start):
    X, b, x = problem()
    for of_a in (1e-10, 1.0, 1e10) if of_b > 1e-30 else (1e-10, 1.0):
        A = Gram(torch.from_numpy(X * of_a**0.5).float())
        inverse = method(x0=np.ones(P) * of_start).invert(A, 0.3 * of_a)
        found, info = inverse.solve(torch.from_numpy(b * of_b).float())
        assert error(found.double() * (of_a / of_b), x) <= 1e-3 and info["converged"].all()


@pytest.mark.parametrize("method", [KINDS[name] for name in having("x0")])
def test_a_start_near_the_solution_is_used_at_any_scale(method):
    X, b, x = problem()
    A, B = Gram(torch.from_numpy(X * 1e-10).float()), torch.from_numpy(b * 1e-30).float()
    _, info = method(x0=x * 1e-10, rtol=1e-4).invert(A, 0.3e-20).solve(B)
    assert info["n_iter"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("method", [KINDS[name] for name in having("x0")])
def test_a_row_of_zeros_is_solved_by_zero_whatever_the_start(method):
    X, b, _ = problem()
    b[1] = 0
    singular = np.vstack([X[:3], np.zeros((57, P))])
    for rows, shift in ((X, 0.3), (singular, 0.0)):
        A = Gram(torch.from_numpy(rows).float())
        inverse = method(x0=np.ones(P), maxiter=4).invert(A, shift)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            x, info = inverse.solve(torch.from_numpy(b).float())
        assert not x[1].any() and info["converged"][1] and info["n_iter"][1] == 0
        assert info["n_iter"].max() <= 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "method", [CG(rtol=0.0), CG(rtol=0.0, block=True), MINRES(rtol=0.0), MINRES(rtol=0.0, block=True)]
)
def test_no_tolerance_ends_at_the_floor_of_the_dtype(method, dtype):
    X, b, x = problem()
    with pytest.warns(ConvergenceWarning, match="did not converge"):
        found, info = method.invert(Gram(torch.from_numpy(X).to(dtype)), 0.3).solve(torch.from_numpy(b).to(dtype))
    assert error(found, x) <= 1e3 * torch.finfo(dtype).eps
    assert info["residual"].max() <= 100 * torch.finfo(dtype).eps


def test_what_no_dtype_holds_is_an_error():
    A = Dense(torch.full((2, 2), 3e38) + torch.eye(2))
    for method in (CG(), MINRES(), MINRES(block=True)):
        with pytest.raises(FloatingPointError, match="float64"):
            method.invert(Dense(torch.full((2, 2), torch.inf)), 0.0).solve(torch.ones(1, 2))
    x, info = CG().invert(Dense(torch.eye(2) * 3e38), 0.0).solve(torch.ones(1, 2) * 1e10)
    np.testing.assert_allclose(x, 1e10 / 3e38, rtol=1e-4)
    assert info["converged"].all() and A.size == 2


def problem_of_many_scales():
    """Rows in float32 whose columns have scales from 1e-8 to 1e8, these scales, and gradients of the rows' loss."""
    rng = np.random.default_rng(0)
    D = np.logspace(-8, 8, 17)
    X = (rng.standard_normal((60, 17)) * D).astype("f4")
    gradients = (rng.standard_normal((3, 60)) @ X / 60).astype("f4")
    return X, D, gradients


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("preconditioner", [None, "jacobi"])
def test_a_row_that_overflows_ends_alone(preconditioner, block):
    X, D, gradients = problem_of_many_scales()
    rng = np.random.default_rng(1)
    bad = np.concatenate([np.eye(17), rng.standard_normal((3, 17)) / D]).astype("f4")
    inverse = CG(preconditioner=preconditioner, block=block).invert(Gram(torch.from_numpy(X)), 0.0)
    for b in (bad, np.concatenate([gradients, bad])):
        x, info = inverse.solve(torch.from_numpy(b))
        assert torch.isfinite(x).all() and not info["negative_curvature"].any()
        # In float64, what the sums of 17 columns of float32 leave.
        A = X.astype("f8").T @ X.astype("f8") / 60
        true = np.linalg.norm(x.double().numpy() @ A - b, axis=1) / np.linalg.norm(b.astype("f8"), axis=1)
        assert (true[info["converged"].numpy()] <= 2e-5).all()
    if preconditioner:
        assert info["converged"][:3].all()


@pytest.mark.parametrize("preconditioner", ["jacobi", Nystroem(rank=17)])
def test_rounding_is_no_negative_curvature(preconditioner):
    X, _, _ = problem_of_many_scales()
    b = np.random.default_rng(1).standard_normal((3, 17)).astype("f4")
    inverse = CG(preconditioner=preconditioner).invert(Gram(torch.from_numpy(X)), 1e-3)
    with pytest.warns(ConvergenceWarning, match="Rounding does not allow less") as told:
        _, info = inverse.solve(torch.from_numpy(b))
    assert len(told) == 1 and not info["converged"].any()
    assert info["stagnated"].all() and not info["negative_curvature"].any()


@pytest.mark.parametrize("name", ["cg", "block cg", "cg, jacobi", "minres", "block minres", "lissa"])
def test_one_solution_beyond_the_dtype_leaves_the_others(name):
    X, b, x = problem()
    inverse = METHODS[name].invert(Gram(torch.from_numpy(X * 1e-10).float()), 0.3e-20)
    sizes = np.array([1.0, 1e30, 1e-5])[:, None]
    with pytest.warns(ConvergenceWarning, match="solutions of 1 of 3 right-hand sides overflow"):
        found, info = inverse.solve(torch.from_numpy(b * sizes).float())
    assert info["converged"].tolist() == [True, False, True] and info["residual"][1] == torch.inf
    assert error(found[::2].double() * 1e-20 / torch.from_numpy(sizes[::2]), x[::2]) <= 3e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_of_long_rows_and_largest_magnitudes(dtype):
    V = torch.randn(5, 100_000, generator=torch.Generator().manual_seed(0), dtype=dtype)
    V *= torch.tensor([1.0, 4.0, 0.5, 2.0, 3.0])[:, None]
    expected = np.sqrt(np.square(V.double().numpy()).sum(1))
    # The rounding of as many sums, as a random walk.
    np.testing.assert_allclose(norms(V).numpy(), expected, rtol=100_000**0.5 * 2.2e-16)
    assert torch.equal(norms(V)[3:], norms(V[3:]))
    few = torch.tensor([[1.0, -8.0], [3.0, 2.0], [0.0, 0.0], [-0.25, -0.125]], dtype=dtype)
    assert exponents(few).tolist() == [4, 2, 0, -1]
