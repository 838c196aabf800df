"""nystroem against the dense formula Ĥ = (HΩ)(ΩᵀHΩ)⁺(HΩ)ᵀ, made with numpy."""

import numpy as np
import pytest
import torch
from sklearn.base import clone

from skinvert import HessianInverter
from skinvert.methods import Nystroem
from skinvert.operators import Dense, DiagonalMatrix, LowRank

# What is tested here is what an approximate method is by definition; tests/methods/test_truth.py holds what it says.
pytestmark = pytest.mark.filterwarnings("ignore:.* is worse than x = 0:sklearn.exceptions.ConvergenceWarning")

DECAYING = 10.0 * np.arange(1, 151) ** -1.5


def symmetric(eigenvalues, seed=0):
    vectors = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(eigenvalues),) * 2))[0]
    matrix = (vectors * eigenvalues) @ vectors.T
    return (matrix + matrix.T) / 2


def rows(k, p, seed=1):
    return np.random.default_rng(seed).standard_normal((k, p))


class PSD(Dense):
    """A matrix that is positive semi-definite by construction, and counts its products."""

    is_psd = True
    products = 0

    def apply(self, V):
        self.products += len(V)
        return super().apply(V)


def psd(matrix, dtype=torch.float64):
    return PSD(torch.from_numpy(matrix).to(dtype))


def dense_nystroem(matrix, r, seed=0):
    generator = torch.Generator().manual_seed(seed)
    Omega = torch.stack([torch.randn(len(matrix), dtype=torch.float64, generator=generator) for _ in range(r)])
    Omega = np.linalg.qr(Omega.numpy().T)[0]
    Y = matrix @ Omega
    return Y @ np.linalg.pinv(Omega.T @ Y, rcond=1e-14, hermitian=True) @ Y.T


def dense_solution(matrix, shift, b):
    return np.linalg.solve(matrix + shift * np.eye(len(matrix)), b.T).T


@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("r", [1, 10, 40, 150])
def test_is_the_dense_formula(r, seed):
    matrix, b = symmetric(DECAYING), rows(7, 150)
    A = psd(matrix)
    inverse = Nystroem(rank=r, random_state=seed).invert(A, 0.1)
    expected = dense_solution(dense_nystroem(matrix, r, seed), 0.1, b)
    x, info = inverse.solve(torch.from_numpy(b))
    assert np.abs(x.numpy() - expected).max() <= 1e-8 * np.abs(expected).max()
    # The sketch, and the true residual.
    assert A.products == r + 7
    assert info["approximate"] is (r < 150)
    assert info["residual_of_approximation"].max() <= 1e-10
    assert info["converged"].all() or r < 150
    assert inverse.positive_definite


def test_sketch_of_a_low_rank_matrix_is_exact():
    F, b = rows(6, 90), rows(3, 90, 2)
    inverse = Nystroem(rank=20).invert(LowRank(torch.from_numpy(F)), 1e-3)
    expected = dense_solution(F.T @ F, 1e-3, b)
    received = inverse.solve(torch.from_numpy(b)).x.numpy()
    assert np.abs(received - expected).max() <= 1e-8 * np.abs(expected).max()


def test_mean_error_is_within_the_bound_of_the_paper():
    # Prop. 2.2: E‖A − Â‖ ≤ min over q of (1 + 2(l−q)/(q−1)) λ_{l−q+1} + 2e²l/(q²−1) Σ_{j>l−q} λ_j.
    matrix, length = symmetric(DECAYING), 30
    errors = []
    for seed in range(20):
        operator = Nystroem(rank=length, random_state=seed).invert(psd(matrix), 0.5).operator.to_dense().numpy()
        gap = matrix + 0.5 * np.eye(150) - operator
        # Â ≼ A.
        assert np.linalg.eigvalsh(gap)[0] >= -1e-10
        errors.append(np.linalg.norm(gap, 2))
    bound = min(
        (1 + 2 * (length - q) / (q - 1)) * DECAYING[length - q]
        + 2 * np.e**2 * length / (q**2 - 1) * DECAYING[length - q :].sum()
        for q in range(2, length - 1)
    )
    standard_error = np.std(errors) / np.sqrt(len(errors))
    assert np.mean(errors) <= bound + 3 * standard_error
    # No approximation of this rank is better than the eigenvalue that comes next.
    assert np.min(errors) >= DECAYING[length]


@pytest.mark.parametrize("shift", [1.0, 0.1, 0.01])
def test_adaptive_rank_keeps_its_promise(shift):
    matrix, b = symmetric(np.exp(-np.arange(300) / 10)), rows(5, 300)
    A = psd(matrix)
    inverse = Nystroem(tol=0.1).invert(A, shift)
    gap = matrix + shift * np.eye(300) - inverse.operator.to_dense().numpy()
    # The power method comes from below: 20 iterations reach ‖A − Â‖ within some percent.
    assert np.linalg.norm(gap, 2) <= 1.2 * 0.1 * shift
    assert inverse.basis.rank in (16, 32, 64, 128)
    exact = dense_solution(matrix, shift, b)
    error = np.linalg.norm(inverse.apply(torch.from_numpy(b)).numpy() - exact, axis=1)
    assert (error <= 1.2 * 0.1 * np.linalg.norm(exact, axis=1)).all()
    # What was sketched is kept: r products, and those of the power method, which ends early where the rank is too low.
    assert A.products <= inverse.basis.rank + 20 + 3 * 10


def test_adaptive_rank_grows_as_the_shift_falls():
    A = psd(symmetric(np.exp(-np.arange(300) / 10)))
    ranks = [Nystroem().invert(A, shift).basis.rank for shift in (10.0, 0.1, 1e-4)]
    assert ranks == sorted(ranks)
    assert ranks[0] < ranks[2]
    assert Nystroem(tol=10.0).invert(A, 0.1).basis.rank < ranks[1]


def test_adaptive_of_few_parameters_is_exact():
    b = rows(3, 20)
    matrix = symmetric(np.linspace(0, 1, 20))
    x, info = Nystroem(tol=1e-12).invert(psd(matrix), 1e-3).solve(torch.from_numpy(b))
    np.testing.assert_allclose(x, dense_solution(matrix, 1e-3, b), rtol=1e-8, atol=1e-8)
    assert not info["approximate"]


def test_preconditions_as_in_the_paper():
    # P⁻¹ = (λ_r + λ) U (Λ + λ)⁻¹ Uᵀ + (I − UUᵀ)
    matrix, b, shift = symmetric(DECAYING), rows(4, 150), 1e-3
    values, vectors = np.linalg.eigh(dense_nystroem(matrix, 30))
    values, U = values[-30:], vectors[:, -30:]
    inner = b @ U
    expected = (values.min() + shift) * (inner / (values + shift)) @ U.T + b - inner @ U.T
    inverse = Nystroem(rank=30).invert(psd(matrix), 0.5).at(shift)
    np.testing.assert_allclose(inverse.precondition(torch.from_numpy(b)), expected, rtol=1e-8, atol=1e-8)


def test_preconditioned_condition_number_is_small():
    matrix, shift = symmetric(np.exp(-np.arange(150) / 5)), 1e-4
    inverse = Nystroem(rank=60).invert(psd(matrix), shift)
    P = inverse.precondition(torch.eye(150).double()).numpy()
    values = np.linalg.eigvals(P @ (matrix + shift * np.eye(150))).real
    assert values.max() / values.min() < 10
    assert np.linalg.cond(matrix + shift * np.eye(150)) > 5000


@pytest.mark.parametrize("least", [-1.0, -1e-3])
@pytest.mark.parametrize("p", [20, 150])
def test_an_indefinite_curvature_is_refused(p, least):
    matrix = symmetric(np.concatenate([[least], np.linspace(0, 5, p - 1)]))
    with pytest.raises(ValueError, match='positive semi-definite.*curvature="ggn"'):
        Nystroem(rank=10).invert(Dense(torch.from_numpy(matrix)), 0.1)


def test_an_indefinite_curvature_that_claims_otherwise_is_refused():
    matrix = symmetric(np.linspace(-5, 5, 50))
    with pytest.raises(ValueError, match='curvature="ggn"'):
        Nystroem(rank=10).invert(psd(matrix), 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [30, 120])
def test_rounding_is_no_negative_curvature(dtype, rank):
    # Rank 5: the other eigenvalues are zero, that is ± rounding.
    F = torch.from_numpy(rows(5, 120)).to(dtype)
    matrix = F.mT @ F
    for A in (Dense(matrix), Dense(matrix - 10 * torch.finfo(dtype).eps * matrix.norm() * torch.eye(120).to(dtype))):
        inverse = Nystroem(rank=rank).invert(A, 0.1)
        assert inverse.eigenvalues.min() >= 0


def test_of_a_model():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    data = (torch.randn(40, 5).double(), torch.randint(3, (40,)))
    b = rows(6, 75)
    with pytest.raises(ValueError, match='curvature="ggn"'):
        HessianInverter("nystroem", 0.1, loss="cross_entropy").fit(net, data)
    settings = {"curvature": "ggn", "loss": "cross_entropy"}
    exact = HessianInverter("direct", 0.1, **settings).fit(net, data).curvature_.to_dense().numpy()
    received = HessianInverter(Nystroem(rank=12), 0.1, **settings).fit(net, data).transform(b)
    expected = dense_solution(dense_nystroem(exact, 12), 0.1, b)
    assert np.abs(received - expected).max() <= 1e-8 * np.abs(expected).max()


@pytest.mark.parametrize("rank", [5, "adaptive"])
def test_needs_a_shift(rank):
    with pytest.raises(ValueError, match="hessian_perturbation for nystroem must be > 0"):
        Nystroem(rank=rank).invert(psd(symmetric(DECAYING)), 0.0)


def test_rank_p_needs_no_shift():
    matrix, b = symmetric(np.linspace(1, 2, 30)), rows(3, 30)
    x = Nystroem(rank=30).invert(psd(matrix), 0.0).solve(torch.from_numpy(b)).x
    np.testing.assert_allclose(x, dense_solution(matrix, 0.0, b), rtol=1e-8)


@pytest.mark.parametrize(
    ("settings", "kind"),
    [({"rank": 0}, ValueError), ({"rank": "most"}, ValueError), ({"rank": 2.5}, TypeError), ({"tol": -1}, ValueError)],
)
def test_refuses_wrong_settings(settings, kind):
    with pytest.raises(kind, match=next(iter(settings))):
        Nystroem(**settings).invert(psd(np.eye(20)), 0.1)


def test_draws_in_fit_and_shares_the_sketch():
    A, b = psd(symmetric(DECAYING)), torch.from_numpy(rows(3, 150))
    inverse = Nystroem(rank=20).invert(A, 0.1).unjudged()
    again = clone(Nystroem(rank=20)).invert(psd(symmetric(DECAYING)), 1e-2)
    products = A.products
    assert torch.equal(inverse.solve(b).x, inverse.solve(b).x)
    assert torch.equal(inverse.at(1e-2).solve(b).x, again.solve(b).x)
    torch.testing.assert_close(inverse.path(b, [0.1, 1e-2])[1], again.solve(b).x, rtol=1e-12, atol=1e-12)
    assert A.products == products


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_and_one_parameter(dtype):
    b = torch.ones(2, 60, dtype=dtype)
    A = DiagonalMatrix(torch.zeros(60, dtype=dtype))
    torch.testing.assert_close(Nystroem(rank=3).invert(A, 0.5).solve(b).x, 2 * b)
    one = DiagonalMatrix(torch.full((1,), 3.0, dtype=dtype))
    torch.testing.assert_close(Nystroem().invert(one, 1.0).solve(b[:, :1]).x, b[:, :1] / 4)
