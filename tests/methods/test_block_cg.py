"""Block and preconditioned conjugate gradients: fewer products, the same solutions, each row judged on its own."""

from functools import cache

import numpy as np
import pytest
import torch
from scipy.linalg import LinAlgWarning
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from torch import nn

from skinvert import HessianInverter, PerSampleGradient
from skinvert.methods import CG, Diagonal, Nystroem
from skinvert.methods.spectral_inverse import SpectralInverse
from skinvert.operators import Dense, StandardBasis


def spd(p, condition=1e3, seed=0):
    vectors = np.linalg.qr(np.random.default_rng(seed).standard_normal((p, p)))[0]
    matrix = (vectors * np.geomspace(1, 1 / condition, p)) @ vectors.T
    return (matrix + matrix.T) / 2


def rows(k, p, seed=1):
    return np.random.default_rng(seed).standard_normal((k, p))


def solved(matrix, b, shift=0.0, **settings):
    inverse = CG(**settings).invert(Dense(torch.from_numpy(matrix)), shift)
    return inverse.solve(torch.from_numpy(b))


def worst(x, expected):
    return float((np.linalg.norm(x.numpy() - expected, axis=1) / np.linalg.norm(expected, axis=1)).max())


@pytest.mark.parametrize("preconditioner", [None, "jacobi", Nystroem(rank=20)])
@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("k", [1, 40, 305])
def test_solves(k, block, preconditioner):
    matrix, b = spd(300), rows(k, 300)
    expected = np.linalg.solve(matrix + 0.01 * np.eye(300), b.T).T
    x, info = solved(matrix, b, 0.01, block=block, preconditioner=preconditioner, rtol=1e-11)
    assert worst(x, expected) <= 1e-9
    assert info["converged"].all()


def test_many_rows_of_many_parameters_share_directions_by_default():
    matrix, b = spd(300), rows(32, 300)
    expected = solved(matrix, b, block=True).info["n_products"]
    received = solved(matrix, b).info["n_products"]
    assert received == expected < solved(matrix, b, block=False).info["n_products"] / 3


def test_dependent_and_zero_rows_break_nothing():
    matrix, b = spd(300), np.repeat(rows(5, 300), 8, axis=0)
    b[3] = 0
    b[4] *= 1e-8
    expected = np.linalg.solve(matrix, b.T).T
    x, info = solved(matrix, b, block=True, rtol=1e-10)
    assert info["converged"].all() and not x[3].any()
    kept = np.arange(40) != 3
    assert worst(x[kept], expected[kept]) <= 1e-6
    # Five directions at a time instead of 39.
    assert info["n_products"] <= solved(matrix, b, block=False, rtol=1e-10).info["n_products"] / 4


def test_rows_are_judged_on_their_own():
    matrix, b = spd(300), rows(40, 300)
    # An eigenvector is solved in one iteration; the others are not.
    b[7] = np.linalg.eigh(matrix)[1][:, -1]
    with pytest.warns(ConvergenceWarning, match="39 of 40"):
        x, info = solved(matrix, b, block=True, maxiter=2)
    residual = np.linalg.norm(x.numpy() @ matrix - b, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(info["residual"], residual, rtol=1e-6, atol=1e-14)
    assert info["converged"].tolist() == (residual <= 1e-8).tolist()
    assert info["converged"][7]


def test_an_indefinite_matrix_is_named_and_never_converged():
    matrix = spd(300) - 0.1 * np.eye(300)
    with pytest.warns(ConvergenceWarning, match="hessian_perturbation must be > 0.0988") as caught:
        _, info = solved(matrix, rows(40, 300), block=True)
    assert not info["converged"][info["residual"] > 1e-8].any()
    assert info["negative_curvature"].any()
    shift = float(str(caught[0].message).split("Try hessian_perturbation=")[1].split(",")[0])
    assert solved(matrix, rows(40, 300), shift, block=True).info["converged"].all()


@cache
def digits():
    """An MLP on digits, trained for a while; data, gradients as right-hand sides."""
    X, y = load_digits(return_X_y=True)
    X, y = torch.tensor(X[:600] / 16), torch.tensor(y[:600])
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(X), y).backward()
        optimizer.step()
    return net, (X, y), PerSampleGradient(net, loss="cross_entropy").fit_transform(X[:256], y[:256])


@pytest.mark.slow
def test_block_form_takes_a_third_of_the_products_on_digits():
    net, data, g = digits()
    infos = []
    for block in (False, True):
        method = CG(rtol=1e-4, block=block)
        inverter = HessianInverter(method, 1e-2, curvature="ggn", loss="cross_entropy").fit(net, data)
        x, info = inverter.solve(g)
        assert info["converged"].all() and inverter.residual(g, x).max() <= 1e-4
        infos.append(info)
    assert infos[1]["n_products"] <= infos[0]["n_products"] / 3


@pytest.mark.slow
def test_nystroem_preconditioner_takes_a_quarter_of_the_iterations_on_digits():
    net, data, g = digits()
    iterations = []
    for preconditioner in (None, Nystroem(rank=200)):
        method = CG(rtol=1e-6, block=False, preconditioner=preconditioner)
        inverter = HessianInverter(method, 1e-4, curvature="ggn", loss="cross_entropy").fit(net, data)
        x, info = inverter.solve(g[:4])
        assert info["converged"].all() and inverter.residual(g[:4], x).max() <= 1e-6
        iterations.append(int(info["n_iter"].max()))
    assert iterations[1] <= iterations[0] / 4


def test_the_exact_inverse_as_preconditioner_needs_one_iteration():
    # Were it dropped in silence, there would be dozens.
    _, info = solved(spd(60), rows(3, 60), 0.1, preconditioner=Nystroem(rank=60))
    assert int(info["n_iter"].max()) <= 2
    diagonal = np.diag(np.geomspace(1, 1e-4, 60))
    assert int(solved(diagonal, rows(3, 60), preconditioner="jacobi").info["n_iter"].max()) == 1
    assert int(solved(diagonal, rows(3, 60)).info["n_iter"].max()) > 20


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_kronecker_factors_precondition_the_hessian(name):
    net, data, g = digits()
    iterations = []
    for preconditioner in (None, name):
        method = CG(block=False, preconditioner=preconditioner)
        # Of the Hessian's own Gauss–Newton matrix: the Hessian is positive definite at this λ, and no more.
        inverter = HessianInverter(method, 0.02, loss="cross_entropy").fit(net, data)
        assert inverter.curvature_name_ == "hessian"
        _, info = inverter.solve(g[:3])
        assert info["converged"].all()
        iterations.append(int(info["n_iter"].max()))
    assert iterations[1] < 0.9 * iterations[0]


def test_another_perturbation_keeps_the_sketch():
    matrix, b = spd(80), rows(2, 80)
    inverse = CG(preconditioner=Nystroem(rank=40), rtol=1e-11).invert(Dense(torch.from_numpy(matrix)), 0.1).at(0.5)
    expected = np.linalg.solve(matrix + 0.5 * np.eye(80), b.T).T
    assert worst(inverse.solve(torch.from_numpy(b)).x, expected) <= 1e-9


@pytest.mark.parametrize(
    ("preconditioner", "match"),
    [("ilu", "one of 'jacobi'"), (3, "preconditioner"), ("kfac", "kronecker_factors")],
)
def test_refuses_a_wrong_preconditioner(preconditioner, match):
    with pytest.raises(ValueError, match=match):
        solved(spd(5), rows(1, 5), preconditioner=preconditioner)


def test_refuses_an_indefinite_preconditioner():
    match = "positive definite.*hessian_perturbation=0.* Try a larger one"
    with pytest.warns(LinAlgWarning), pytest.raises(ValueError, match=match):
        solved(np.diag([1.0, -1.0, 2.0]), rows(1, 3), preconditioner=Diagonal())


def test_nystroem_preconditions_a_hessian_that_is_not_semi_definite_by_its_ggn():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    data = (torch.randn(60, 5).double(), torch.randint(3, (60,)))
    H = HessianInverter("direct", 1.0, loss="cross_entropy").fit(net, data).curvature_.to_dense().numpy()
    lowest = np.linalg.eigvalsh(H)[0]
    assert lowest < -1e-3
    shift, b = -1.3 * lowest, rows(3, len(H))
    expected = np.linalg.solve(H + shift * np.eye(len(H)), b.T).T
    for preconditioner in ("nystroem", Nystroem(rank=30)):
        method = CG(preconditioner=preconditioner, rtol=1e-10)
        inverter = HessianInverter(method, shift, loss="cross_entropy").fit(net, data)
        x, info = inverter.solve(b)
        assert info["converged"].all() and worst(torch.from_numpy(x), expected) <= 1e-7
        np.testing.assert_allclose(inverter.path(b, [shift])[0], x)
    # An operator with no companion is sketched itself, and refused where it is indefinite.
    with pytest.raises(ValueError, match="positive semi-definite"):
        solved(np.diag([1.0, -0.1, 2.0]), rows(1, 3), 0.2, preconditioner="nystroem")
    # So is a Hessian whose loss has no GGN.
    loss = lambda output, target: (output - target).square().sqrt().sum(1).sqrt().mean()  # noqa: E731
    odd = HessianInverter(CG(), 0.1, loss=loss).fit(net, (data[0], torch.randn(60, 3).double())).curvature_
    assert odd.psd_companion() is None


@pytest.mark.parametrize("loss", ["mse", "bce_with_logits"])
def test_columns_of_very_different_units_in_float32(loss):
    # A salary beside a rate: the units divide out of the solution in units of the diagonal's roots.
    units, generator = np.array([6e4, 1.0, 0.03]), np.random.default_rng(0)
    X = ((generator.standard_normal((200, 3)) + 0.5) * units).astype(np.float32)
    y = (generator.random((200, 1)) > 0.5).astype(np.float32)
    net = nn.Linear(3, 1)
    with torch.no_grad():
        net.weight.copy_(torch.from_numpy(0.3 / units))
    exact = nn.Linear(3, 1).double()
    exact.load_state_dict({name: value.double() for name, value in net.state_dict().items()})
    data = (torch.from_numpy(X), torch.from_numpy(y))
    fit = HessianInverter("direct", 1e-3, curvature="ggn", loss=loss).fit(exact, tuple(part.double() for part in data))
    H = fit.curvature_.to_dense().numpy() + 1e-3 * np.eye(4)
    roots = np.sqrt(np.diag(H))
    b = (rows(3, 4) * roots).astype(np.float32)
    inverter = HessianInverter(CG(preconditioner="jacobi"), 1e-3, curvature="ggn", loss=loss).fit(net, data)
    expected = np.linalg.solve(H, b.astype(float).T).T * roots
    x, info = inverter.solve(b)
    assert info["converged"].all()
    assert worst(torch.from_numpy(x * roots), expected) <= 0.02
    assert worst(torch.from_numpy(inverter.path(b, [1e-3])[0] * roots), expected) <= 0.02
    # The eigenvectors of float32 hold no digit of the small columns: a small residual is all that is left.
    _, info = HessianInverter(CG(preconditioner="nystroem"), 1e-3, curvature="ggn", loss=loss).fit(net, data).solve(b)
    assert info["residual"].max() <= 1e-5


def test_a_preconditioner_that_rounding_makes_indefinite_is_left_aside():
    class Odd(SpectralInverse):
        def precondition(self, R):
            return R * torch.tensor([1.0, -1.0, 1.0, 0.0]).double()

    class Indefinite(Diagonal):
        def invert(self, A, hessian_perturbation, verbose=0):
            return Odd(StandardBasis(A.size), A.diagonal(), hessian_perturbation, name="diagonal")

    b = np.diag([1.0, 1.0, 0.0, 1.0])
    for block in (False, True):
        x, info = solved(np.diag([1.0, 2.0, 3.0, 4.0]), b, preconditioner=Indefinite(), block=block)
        assert info["converged"].all()
        np.testing.assert_allclose(x, b / [1, 2, 3, 4], rtol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_directions_of_long_rows_are_dropped_by_rounding_alone(dtype):
    from skinvert.solvers.block_cg import orthonormal_rows

    rng = np.random.default_rng(0)
    rows = rng.standard_normal(100_000) + 5e-3 * rng.standard_normal((4, 100_000))
    # Their smallest singular value is 5e-3 of the largest, below p·eps in float32: all are needed. A fifth is not.
    Z = torch.from_numpy(np.concatenate([rows, rows[:1] - 2 * rows[1:2]])).to(dtype)
    P = orthonormal_rows(Z).double()
    assert P.shape == (4, 100_000)
    torch.testing.assert_close(P @ P.mT, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-5)
    left = Z.double() - (Z.double() @ P.mT) @ P
    assert float(left.norm()) <= 1e-4 * float(Z.norm())
