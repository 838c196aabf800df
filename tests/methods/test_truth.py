"""What a solve says of itself: residuals against the exact curvature, one cut for zero, and alike on every way."""

import pickle
import warnings

import numpy as np
import pytest
import scipy.linalg
import torch
from definitions import TRUNCATED
from facts import APPROXIMATE, FACTORISING, KINDS, SEMIDEFINITE, TIGHT, at_rest, serving
from sklearn.exceptions import ConvergenceWarning
from torch import nn

from skinvert import HessianInverter, HessianInverterCV
from skinvert.curvature import Gram
from skinvert.methods import CG, KFAC, Direct, HarmonicMean
from skinvert.methods.dense import CholeskyInverse, factorise
from skinvert.methods.sample_space import SampleSpaceInverse
from skinvert.methods.spectral_inverse import SpectralInverse
from skinvert.operators import (
    Dense,
    KroneckerBasis,
    KroneckerBlock,
    KroneckerFactors,
    LinearOperator,
    LowRank,
    zero_cut,
)

METHODS = {name: TIGHT[name] for name in APPROXIMATE} | {
    name: KINDS[name](**{**settings, "rank": 4}) for name, settings in TRUNCATED.items()
}
WORSE = "ignore:.* is worse than x = 0:sklearn.exceptions.ConvergenceWarning"


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return net, (torch.randn(20, 3, dtype=torch.float64), torch.randint(3, (20,)))


def matrix_of(net, data, curvature):
    """The GGN or the empirical Fisher by plain autograd."""
    X, y = data
    parameters = list(net.parameters())

    def gradient(scalar):
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(scalar, parameters, retain_graph=True)])

    out, p = net(X), sum(t.numel() for t in parameters)
    H = torch.zeros(p, p, dtype=torch.float64)
    for f, label in zip(out, y, strict=True):
        if curvature == "empirical_fisher":
            g = gradient(nn.functional.cross_entropy(f, label))
            H += torch.outer(g, g)
        else:
            J, q = torch.stack([gradient(value) for value in f]), f.softmax(0).detach()
            H += J.mT @ (torch.diag(q) - torch.outer(q, q)) @ J
    return (H / len(X)).numpy()


def fitted(name, shift, **settings):
    (net, data), curvature = network(), SEMIDEFINITE[name]
    inverter = HessianInverter(METHODS[name], shift, curvature=curvature, loss="cross_entropy", **settings)
    return inverter.fit(net, data), matrix_of(net, data, curvature)


# -- approximate methods -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(WORSE)
@pytest.mark.parametrize("shift", [1e-3, 0.1, 1e5])
@pytest.mark.parametrize("name", METHODS)
def test_residual_is_against_the_exact_curvature(name, shift):
    inverter, H = fitted(name, shift)
    b = np.random.default_rng(0).standard_normal((5, len(H)))
    x, info = inverter.solve(b)
    expected = np.linalg.norm(x @ (H + shift * np.eye(len(H))) - b, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(info["residual"], expected, rtol=1e-6)
    assert info["converged"].tolist() == (expected <= 1e-6).tolist()
    assert info["approximate"] is True
    if name != "harmonic_mean":
        gap = np.linalg.norm(inverter.inverse_transform(x) - b, axis=1) / np.linalg.norm(b, axis=1)
        np.testing.assert_allclose(info["residual_of_approximation"], gap, atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_worse_than_zero_is_said_once_a_call(name):
    inverter, H = fitted(name, 1e-6)
    b = np.random.default_rng(0).standard_normal((5, len(H)))
    for call in (inverter.solve, inverter.transform, lambda rows: inverter.path(rows, [1e-6])):
        with pytest.warns(ConvergenceWarning, match=rf"{name}.* worse than x = 0 on \d of 5.*Try") as record:
            call(b)
        assert len(record) == 1


@pytest.mark.parametrize("name", METHODS)
def test_the_product_is_not_spent_where_it_is_not_asked_for(name, monkeypatch):
    inverter, H = fitted(name, 1e-6, check_residual=False)
    monkeypatch.setattr(type(inverter.curvature_), "apply", None)
    info = inverter.solve(np.ones((2, len(H)))).info
    assert np.isnan(info["residual"]).all() and not info["converged"].any()
    assert HessianInverterCV(check_residual=False).get_params()["check_residual"] is False


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.filterwarnings(WORSE)
def test_a_loaded_one_does_not_claim_to_know(name):
    inverter, H = fitted(name, 1.0)
    b = np.ones((2, len(H)))
    expected = inverter.transform(b)
    for copied in (pickle.loads(pickle.dumps(inverter)), pickle.loads(pickle.dumps(inverter.inverse_))):
        x, info = copied.solve(b if isinstance(copied, HessianInverter) else torch.from_numpy(b))
        np.testing.assert_array_equal(x, expected)
        # The rows of E are the factorisation of the harmonic mean.
        assert np.isnan(np.asarray(info["residual"])).all() == (name != "harmonic_mean")
        assert not bool(info["converged"].any())


def test_a_wrong_setting_is_an_error():
    with pytest.raises(ValueError, match="check_residual must be one of True, False"):
        HessianInverter("diagonal", 1.0, check_residual="no").fit(np.eye(2))


@pytest.mark.filterwarnings(WORSE)
def test_blocks_are_judged_against_the_whole():
    net, data = network()
    H = matrix_of(net, data, "ggn")
    b = np.random.default_rng(0).standard_normal((4, len(H)))
    for method in ("direct", "kfac"):
        inverter = HessianInverter(method, 0.01, blocks="layer", curvature="ggn", loss="cross_entropy").fit(net, data)
        x, info = inverter.solve(b)
        expected = np.linalg.norm(x @ (H + 0.01 * np.eye(len(H))) - b, axis=1) / np.linalg.norm(b, axis=1)
        np.testing.assert_allclose(info["residual"], expected, rtol=1e-6)
        assert not info["converged"].any() and info["residual_of_approximation"].max() <= 1e-10


def test_harmonic_mean_at_the_smallest_shifts():
    # Samples e₁ and e₂: the mean of diag(1 / (1 + λ), 1 / λ) and its mirror image, 1 / 2λ to rounding.
    A = Gram(torch.eye(2))
    for shift in (1e-37, 1e-30, 1e-10):
        inverse = HarmonicMean().invert(A, shift)
        with pytest.warns(ConvergenceWarning, match="worse than x = 0"):
            x, info = inverse.solve(torch.tensor([[2 * shift, 4 * shift]]))
        np.testing.assert_allclose(x, [[1.0, 2.0]], rtol=1e-5)
        assert not bool(info["converged"])
        with pytest.warns(ConvergenceWarning, match="overflow torch.float32"):
            inverse.apply(torch.full((1, 2), 1e30))


# -- exact methods, on every way to a solution -------------------------------------------------------------------------


def ill_conditioned(decades, dtype, p=60):
    Q = np.linalg.qr(np.random.default_rng(0).standard_normal((p, p)))[0]
    return torch.from_numpy(Q * np.logspace(0, -decades / 2, p)).to(dtype)


@pytest.mark.parametrize("name", FACTORISING)
@pytest.mark.parametrize("decades", [2, 6])
def test_path_is_solve_and_warns_alike(name, decades):
    A = LowRank(ill_conditioned(decades, torch.float32).mT)
    H = A.rows.double().mT @ A.rows.double()
    b, shifts = torch.from_numpy(np.random.default_rng(1).standard_normal((3, 60))).float(), [1e-7, 1e-2]
    inverse = TIGHT[name].invert(A, 1.0)
    # Of direct, float32 has rounded the matrix itself.
    H = inverse.curvature.matrix.double() if isinstance(inverse, CholeskyInverse) else H
    said = []
    for way in (lambda: inverse.solve_path(b, shifts), lambda: [inverse.at(shift).solve(b) for shift in shifts]):
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            said.append((way(), [str(entry.message) for entry in record]))
    (path, of_path), (each, of_solve) = said
    assert of_path == of_solve
    failed = 0
    for shift, (x, info), other in zip(shifts, path, each, strict=True):
        assert torch.equal(x, other.x)
        true = ((x.double() @ H + shift * x.double() - b).norm(dim=1) / b.norm(dim=1)).numpy()
        # A product in float32 rounds as much as the residual of a float32 solution is large.
        np.testing.assert_allclose(info["residual"], true, rtol=0.7, atol=1e-5)
        failed += int((~info["converged"]).any())
    assert len(of_path) == failed


def test_the_path_of_a_float32_direct_is_refined():
    A = Dense((lambda F: F @ F.mT)(ill_conditioned(4, torch.float64)).float())
    b = torch.randn(2, 60, generator=torch.Generator().manual_seed(0))
    expected = np.linalg.solve(A.matrix.double().numpy(), b.double().numpy().T).T
    x = Direct().invert(A, 0.0).path(b, [0.0])[0].numpy()
    assert np.linalg.norm(x - expected) <= 1e-5 * np.linalg.norm(expected)


# -- one cut for zero --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.7, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", serving(LowRank.faces))
def test_one_eigenvalue_is_zero_to_all_or_said(name, dtype, share):
    d = torch.ones(50, dtype=dtype)
    d[-1] = share * zero_cut(d, 50)
    A, b = LowRank(torch.diag(d.sqrt())), torch.zeros(1, 50, dtype=dtype)
    b[0, -1] = d[-1]
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        x, info = at_rest(name).invert(A, 0.0).solve(b)
    right = abs(float(x[0, -1]) - 1) <= 0.1
    # Kept above the cut; below it kept, or left out with a word.
    assert right if share > 1 else (right or (len(record) == 1 and not bool(info["converged"])))
    assert bool(info["converged"]) == (float(info["residual"]) <= 1e-3) or len(record)


# Not Nyström, whose stabilising shift leaves rounding in a null eigenvalue; its residual says so.
@pytest.mark.parametrize("name", [name for name in FACTORISING if not KINDS[name].needs_psd])
@pytest.mark.parametrize("shift", [1e-30, 1e-14])
def test_nothing_is_cut_where_a_semi_definite_curvature_has_a_shift(name, shift):
    d = torch.tensor([0.0] + [1.0] * 8, dtype=torch.float64)
    A = LowRank(torch.diag(d.sqrt()))
    b = torch.zeros(1, 9, dtype=torch.float64)
    b[0, 0] = 1.0
    x, info = TIGHT[name].invert(A, shift).solve(b)
    assert float(x[0, 0]) == pytest.approx(1 / shift) and bool(info["converged"])


@pytest.mark.parametrize("name", [name for name in FACTORISING if not KINDS[name].needs_psd])
def test_a_negative_eigenvalue_just_below_the_cut_is_said(name):
    d = torch.ones(9, dtype=torch.float64)
    d[0] = -2 * zero_cut(d, 9)
    with pytest.warns(scipy.linalg.LinAlgWarning, match="indefinite"):
        TIGHT[name].invert(Dense(torch.diag(d)), 0.0)


def test_kfac_inverts_a_negative_eigenvalue_and_says_so():
    class Layered(Dense):
        def kronecker_factors(self, approx, unsupported, verbose=0):
            rest = torch.arange(1, 3), torch.tensor([2.0, -1.0])
            block = KroneckerBlock("fc", torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1), torch.ones(1, 1), None)
            return KroneckerFactors((block,), *rest, None)

    with pytest.warns(scipy.linalg.LinAlgWarning, match="indefinite.*-0.5"):
        inverse = KFAC().invert(Layered(torch.diag(torch.tensor([1.0, 2.0, -1.0]))), 0.5)
    x, info = inverse.solve(torch.tensor([[1.5, 2.5, -0.5]]))
    np.testing.assert_allclose(x, torch.ones(1, 3))
    assert bool(info["converged"]) and not inverse.positive_definite


def test_kfac_warns_of_rows_that_rounding_leaves_unsolved():
    basis, wrong = KroneckerBasis(torch.eye(2), None, 1), Dense(2 * torch.eye(2))
    with pytest.warns(ConvergenceWarning, match="ekfac did not converge on 1 of 1"):
        SpectralInverse(basis, torch.ones(2), 0.0, name="ekfac", source=wrong).solve(torch.ones(1, 2))


# -- the diagonal ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_a_salary_beside_a_rate_keeps_every_entry(shift):
    # A Hessian, float32: columns of 1e5, 1, 1e-3 and the intercept.
    rng = np.random.default_rng(0)
    X = torch.from_numpy(rng.standard_normal((50, 3)) * [1e5, 1.0, 1e-3]).float()
    net = nn.Linear(3, 1)
    inverter = HessianInverter("diagonal", shift, loss="mse", check_residual=False).fit(net, (X, torch.zeros(50, 1)))
    Z = np.hstack([X.double().numpy(), np.ones((50, 1))])
    expected = 1 / (2 * (Z**2).mean(0) + shift)
    received = inverter.transform(np.ones((1, 4), dtype=np.float32))[0]
    np.testing.assert_allclose(received, expected, rtol=1e-5)


def test_jacobi_takes_a_semi_definite_curvature_with_entries_of_rounding():
    # A column that no row uses, at λ = 0, and one that rounding left below zero.
    d = torch.tensor([1e6, 1.0, 0.0, -1e-3])
    A = Dense(torch.diag(d.clamp(min=0)))
    A.diagonal = lambda: d
    x, info = CG(preconditioner="jacobi").invert(A, 0.0).solve(torch.tensor([[1e6, 2.0, 0.0, 0.0]]))
    np.testing.assert_allclose(x, [[1.0, 2.0, 0.0, 0.0]], rtol=1e-5)
    assert bool(info["converged"])


# -- sample space, and the assembly ------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [None, torch.linspace(1e-13, 2e-13, 40, dtype=torch.float64)])
@pytest.mark.parametrize("shift", [1e-18, 1e-9])
def test_duplicate_rows_at_a_tiny_shift(shift, penalty):
    F = torch.randn(3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).repeat(2, 1)
    inverse = Direct().invert(LowRank(F, penalty), shift)
    assert isinstance(inverse, SampleSpaceInverse)
    # Inside the range of F, where the solution is that of the pseudo-inverse.
    b = torch.ones(2, 6, dtype=torch.float64) @ F
    x = inverse.solve(b).x.numpy()
    expected = b.numpy() @ np.linalg.pinv((F.mT @ F).numpy(), rcond=1e-10, hermitian=True)
    if shift > 1e-15 and penalty is None:
        # eps ‖F‖² / λ of the digits are lost.
        np.testing.assert_allclose(x, expected, atol=1e-4 * np.abs(expected).max())
    residual = np.linalg.norm(x @ (F.mT @ F).numpy() - b.numpy(), axis=1) / np.linalg.norm(b.numpy(), axis=1)
    assert residual.max() <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 7])
def test_sample_space_serves_gradients_at_every_shift(rows, dtype):
    # Cholesky solves them to 1e-6 and 5e-4 at the smallest of these, where `path` keeps all digits.
    F = torch.randn(rows, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    b = torch.ones(2, rows, dtype=dtype) @ F
    for shift in (1e-1, 1e-3, 1e-5) if dtype == torch.float32 else (1e-3, 1e-9, 1e-11, 1e-12):
        inverse = Direct().invert(LowRank(F), shift)
        assert isinstance(inverse, SampleSpaceInverse)
        x, info = inverse.solve(b)
        gap = x.double() @ F.double().mT @ F.double() + shift * x.double() - b.double()
        assert float((gap.norm(dim=1) / b.double().norm(dim=1)).max()) <= 0.2 * inverse.rtol
        assert bool(info["converged"].all())


class Assembled(LinearOperator):
    """An operator whose short cut to the matrix is another one."""

    def __init__(self, matrix, claimed):
        super().__init__(len(matrix), matrix.dtype, matrix.device)
        self.matrix, self.claimed = matrix, claimed

    def apply(self, V):
        return V @ self.matrix

    def to_dense(self, verbose=0):
        return self.claimed.clone()


def test_a_wrong_assembly_is_replaced_by_products():
    matrix = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    x, info = Direct().invert(Assembled(matrix, 2 * matrix), 0.0).solve(torch.ones(1, 3, dtype=torch.float64))
    np.testing.assert_allclose(x, [[1, 1 / 2, 1 / 3]])
    assert bool(info["converged"])


def test_products_that_are_not_symmetric_are_an_error():
    matrix = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    with pytest.raises(ValueError, match="by products with the identity and by a product must be the same"):
        Direct().invert(Assembled(matrix, (matrix + matrix.mT) / 2), 0.0)


def test_a_wrong_factor_is_an_error():
    class Wrong(LowRank):
        def apply(self, V):
            return 2 * super().apply(V)

    with pytest.raises(ValueError, match="by its factor and by a product"):
        Direct().invert(Wrong(torch.randn(2, 5)), 1.0)


def test_cholesky_is_kept_at_an_ordinary_condition_in_float32():
    # 10·p·eps would have sent p = 3,000 to an eigendecomposition at condition 280.
    d = torch.logspace(0, -3, 400)
    assert isinstance(factorise(Dense(torch.diag(d)), 0.0, 1e-3), CholeskyInverse)
