"""No bound of a quadratic form is violated: every method × every curvature with a known bound × dtypes."""

import copy
import pickle

import numpy as np
import pytest
import torch
from facts import KINDS, SEMIDEFINITE, accepting
from oracles import Oracle, oracle_matrix
from problems import problem
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, PoissonRegressor, Ridge
from torch import nn

import skinvert
from skinvert import HessianInverter, PerSampleGradient
from skinvert.curvature import CURVATURES, Curvature, Gram
from skinvert.methods import CG, EKFAC, KFAC, MINRES, Arnoldi, Diagonal, Direct, Nystroem
from skinvert.methods.quadratic import Certificate, SolvedRows, rounding_of
from skinvert.models.affine_outputs import has_affine_outputs
from skinvert.operators import Dense, DiagonalMatrix, LowRank, Shifted

MODELS = {"softmax": "cross_entropy", "mlp": "cross_entropy", "linear": "mse"}
DTYPES = (torch.float64, torch.float32)
DECAY = 0.01
# Settings with which a solve leaves something.
ROUGH = {"cg": {"rtol": 0.05}, "minres": {"rtol": 0.05}, "arnoldi": {"rank": 6}, "nystroem": {"rank": 6}}
quiet = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


def semidefinite(name):
    return [c for c in accepting_classes(name) if CURVATURES[c].is_psd]


def accepting_classes(name):
    return [c for c in CURVATURES if isinstance(CURVATURES[c], type) and name in accepting(c)]


TABLE = [
    pytest.param(name, curvature, model, dtype, id=f"{name}-{curvature}-{model}-{str(dtype)[6:]}")
    for name in KINDS
    for curvature in semidefinite(name)
    for model in MODELS
    for dtype in DTYPES
]


def rounded(case, dtype):
    """The problem with the numbers that a dtype holds, in float64."""
    other = copy.copy(case)
    other.module = copy.deepcopy(case.module).to(dtype).double()
    other.X = case.X.to(dtype).to(case.X.dtype)
    other.y = case.y.to(dtype).to(case.y.dtype) if case.y.is_floating_point() else case.y
    return other


def exact_forms(A, G, B):
    """gᵀA⁻¹b by LU, refined by residuals in the longest floats that there are."""
    long = A.astype(np.longdouble)
    X = np.linalg.solve(A, B.T).astype(np.longdouble)
    for _ in range(3):
        X = X + np.linalg.solve(A, (B.T.astype(np.longdouble) - long @ X).astype(np.float64))
    return G.astype(np.longdouble) @ X


def rows(k, p, seed):
    """Gaussian rows of scales from 1e-3 to 1e3."""
    generator = np.random.default_rng(seed)
    return generator.standard_normal((k, p)) * 10 ** generator.uniform(-3, 3, (k, 1))


def check_bounds(inverter, A, k):
    """Hold pairs, one-sided pairs and the diagonal of k rows to the dense A; return the bounds of the pairs."""
    G, B = rows(k, len(A), 1), rows(k, len(A), 2)
    exact = exact_forms(A, G, B)
    for one_sided in (False, True):
        forms = inverter.quadratic(G, B, one_sided=one_sided)
        assert (np.abs(forms.values - exact) <= forms.bounds).all()
    own = inverter.quadratic(B)
    exact = np.diagonal(exact_forms(A, B, B))
    assert ((own.lower <= exact) & (exact <= own.upper)).all()
    return inverter.quadratic(G, B)


def hold(name, curvature, model, dtype, shift, k):
    case = problem(model, MODELS[model], DECAY, True)
    inverter = HessianInverter(
        KINDS[name](**ROUGH.get(name, {})), shift, curvature=curvature, **case.settings(dtype=dtype)
    )
    inverter.fit(case.module, case.data, case.sample_weight)
    H = Oracle(rounded(case, dtype)).curvature("ggn" if curvature == "fisher" else curvature)
    forms = check_bounds(inverter, H + shift * np.eye(len(H)), k)
    assert np.isfinite(forms.bounds).all()


@pytest.mark.one_in(3)
@quiet
@pytest.mark.parametrize(("name", "curvature", "model", "dtype"), TABLE)
def test_no_bound_is_violated(name, curvature, model, dtype):
    hold(name, curvature, model, dtype, 0.1, 100)


@pytest.mark.slow
@quiet
@pytest.mark.parametrize("shift", [1e-3, 1.0])
@pytest.mark.parametrize(("name", "curvature", "model", "dtype"), [case for case in TABLE if case.values[2] == "mlp"])
def test_no_bound_is_violated_in_a_million_pairs(name, curvature, model, dtype, shift):
    if name == "lissa":
        shift = max(shift, 0.1)
    hold(name, curvature, model, dtype, shift, 1000)


@quiet
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", KINDS)
def test_plain_rows(name, dtype):
    if name not in accepting_rows():
        pytest.skip("it takes no plain rows")
    X = np.random.default_rng(0).standard_normal((9, 14)).astype(str(dtype)[6:])
    inverter = HessianInverter(KINDS[name](**ROUGH.get(name, {})), 0.05).fit(X)
    # What float32 holds of X/√n.
    F = (X * np.sqrt(np.ones(len(X), X.dtype) / X.dtype.type(len(X)))[:, None]).astype(np.float64)
    check_bounds(inverter, F.T @ F + 0.05 * np.eye(14), 60)


def accepting_rows():
    from facts import ON_ROWS

    return ON_ROWS


@pytest.mark.parametrize("curvature", [name for name in CURVATURES if CURVATURES[name].is_psd])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bound_is_tight_in_the_null_space(curvature, dtype):
    """There A + λI is λ + the penalty, and a row that is not solved has an error of ‖g‖‖b‖ over that."""
    case = rounded(problem("softmax", "cross_entropy", DECAY), dtype)
    inverter = HessianInverter("direct", 0.1, curvature=curvature, **case.settings(dtype=dtype))
    inverter.fit(case.module, case.data)
    H = Oracle(case).curvature("ggn" if curvature == "fisher" else curvature)
    v = np.linalg.eigh(H)[1][:, :1].T
    certificate = Certificate(inverter._certified("a test"))
    assert certificate.floor == pytest.approx(0.1 + DECAY, rel=1e-12)
    unsolved = SolvedRows.unsolved(torch.from_numpy(v))
    for forms in (certificate.pairs_of(unsolved, unsolved), certificate.own_of(unsolved)):
        assert float(forms.values.abs().max()) == 0
        assert float(forms.bounds.max()) == pytest.approx(1 / (0.1 + DECAY), rel=1e-9)
        assert float(forms.bounds.max()) >= float((v @ np.linalg.solve(H + 0.1 * np.eye(len(H)), v.T))[0, 0]) - 1e-9


# -- the bound of the eigenvalues -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("moved", [False, True])
def test_a_hessian_that_direct_inverts_has_a_proven_bound(dtype, moved):
    case = rounded(problem("mlp", "cross_entropy", DECAY), dtype)
    H = Oracle(case).curvature("hessian")
    shift = 0.05 - float(np.linalg.eigvalsh(H)[0])
    inverter = HessianInverter("direct", shift, **case.settings(dtype=dtype)).fit(case.module, case.data)
    inverter = inverter._at(shift) if moved else inverter
    inverse = inverter._certified("a test")
    assert not inverse.truth.is_psd
    assert 0.99 * 0.05 < inverse.lower_bound < 0.05
    forms = check_bounds(inverter, H + shift * np.eye(len(H)), 60)
    assert np.isfinite(forms.bounds).all()


def test_an_indefinite_hessian_has_no_bound():
    case = problem("mlp", "cross_entropy")
    with pytest.warns(match="indefinite"):
        inverter = HessianInverter("direct", 1e-3, **case.settings()).fit(case.module, case.data)
    forms = inverter.quadratic(case.right_hand_sides(3), case.right_hand_sides(2, 1))
    assert np.isnan(forms.bounds).all()
    exact = case.right_hand_sides(3) @ np.linalg.solve(
        oracle_matrix(case) + 1e-3 * np.eye(case.p), case.right_hand_sides(2, 1).T
    )
    np.testing.assert_allclose(forms.values, exact, rtol=1e-8)
    assert np.isnan(inverter.quadratic(case.right_hand_sides(3)).lower).all()


@pytest.mark.parametrize("method", [CG(), MINRES(), Arnoldi(rank=5), Diagonal()], ids=lambda m: m.name)
def test_an_estimate_is_no_bound(method):
    case = problem("mlp", "cross_entropy", DECAY)
    inverter = HessianInverter(method, 5.0, **case.settings()).fit(case.module, case.data)
    assert np.isnan(inverter.quadratic(case.right_hand_sides(3)).bounds).all()
    assert np.isnan(inverter.inverse_.lower_bound)


def test_the_curvature_of_blocks_is_the_whole():
    case = problem("mlp", "cross_entropy", DECAY)
    inverter = HessianInverter("direct", 0.1, curvature="ggn", blocks="layer", **case.settings())
    inverter.fit(case.module, case.data)
    check_bounds(inverter, oracle_matrix(case, "ggn") + 0.1 * np.eye(case.p), 50)


def test_at_zero_shift_a_definite_matrix_is_proven():
    X = np.random.default_rng(0).standard_normal((40, 6))
    inverter = HessianInverter("direct").fit(X)
    forms = check_bounds(inverter, X.T @ X / 40, 50)
    assert np.isfinite(forms.bounds).all()
    singular = HessianInverter("direct").fit(X[:3])
    assert np.isnan(singular.quadratic(X[:2]).bounds).all()


def test_each_operator_says_what_no_eigenvalue_is_below():
    F, r = torch.randn(2, 5, dtype=torch.float64), torch.tensor([0.5, 0.3, 0.4, 0.9, 1.0], dtype=torch.float64)
    assert LowRank(F, r).lower_bound == pytest.approx(0.3)
    assert Shifted(LowRank(F, r), 0.2).lower_bound == pytest.approx(0.5)
    assert DiagonalMatrix(r - 1).lower_bound == pytest.approx(-0.7)
    assert Gram(F).lower_bound == 0.0
    assert np.isnan(Dense(torch.eye(2)).lower_bound)


# -- what is not at hand ----------------------------------------------------------------------------------------------


@quiet
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["direct", "ekfac", "nystroem", "harmonic_mean", "diagonal"])
def test_a_loaded_inverse_is_certified_where_the_exact_curvature_is_at_hand(name, dtype):
    case = problem("mlp", "cross_entropy", DECAY)
    inverter = HessianInverter(KINDS[name](), 0.1, curvature=SEMIDEFINITE[name], **case.settings(dtype=dtype))
    loaded = pickle.loads(pickle.dumps(inverter.fit(case.module, case.data)))
    forms = loaded.quadratic(case.right_hand_sides(3))
    assert np.isfinite(forms.values).all()
    known = dtype == torch.float64 and name in ("direct", "harmonic_mean")
    assert np.isfinite(forms.bounds).all() == known


def test_a_model_that_casts_to_less_has_no_bounds():
    class Casting(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.out = nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.out(self.first(x).tanh().float().to(x.dtype))

    torch.manual_seed(0)
    data = torch.randn(12, 4), torch.arange(12) % 2
    inverter = HessianInverter("cg", 0.1, curvature="ggn", loss="cross_entropy").fit(Casting(), data)
    assert inverter.quadratic(torch.randn(2, inverter.n_features_in_)).bounds.isnan().all()


def test_training_goes_on_and_the_exact_curvature_stays():
    case = rounded(problem("mlp", "cross_entropy", DECAY), torch.float32)
    net = copy.deepcopy(case.module).float()
    inverter = HessianInverter("cg", 0.1, curvature="ggn", **case.settings()).fit(net, (case.X.float(), case.y))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1.0)
    check_bounds(inverter, oracle_matrix(case, "ggn") + 0.1 * np.eye(case.p), 30)


def test_the_twin_in_float64_is_made_once_and_never_pickled():
    case = problem("mlp", "cross_entropy", DECAY)
    inverter = HessianInverter("cg", 0.1, curvature="ggn", **case.settings(dtype=torch.float32))
    A = inverter.fit(case.module, case.data).curvature_
    assert isinstance(A, Curvature)
    assert A.in_float64() is A.in_float64()
    assert A.__getstate__()["_double"] is None
    assert A.minibatch(torch.arange(3))._double is None


# -- how near, how far ------------------------------------------------------------------------------------------------


def digits(n=400, m=100):
    X, y = load_digits(return_X_y=True)
    X, y = torch.from_numpy(X / 16), torch.from_numpy(y)
    torch.manual_seed(0)
    net = nn.Linear(64, 10).double()
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(X[:n]), y[:n]) + 5e-4 * sum(t.square().sum() for t in net.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)
    gradients = PerSampleGradient(net, loss="cross_entropy").fit(X[:n], y[:n])
    train, test = (X[:n], y[:n]), (X[n : n + m], y[n : n + m])
    return net, train, gradients.transform(train), gradients.transform(test)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bounds_of_influence_scores_on_digits_are_small(dtype):
    net, train, b, g = digits()
    inverter = HessianInverter(CG(rtol=1e-2), 1e-3, curvature="ggn", loss="cross_entropy", dtype=dtype)
    inverter.fit(net, train)
    forms = inverter.quadratic(g, b)
    assert float(forms.bounds.median()) <= 0.02 * float(forms.values.abs().median())


def test_the_correction_brings_the_score_nearer():
    net, train, b, g = digits()
    inverter = HessianInverter(CG(rtol=1e-2), 1e-3, curvature="ggn", loss="cross_entropy").fit(net, train)
    A = inverter.curvature_.to_dense().numpy() + 1e-3 * np.eye(650)
    exact = g.numpy() @ np.linalg.solve(A, b.numpy().T)
    corrected = np.abs(inverter.quadratic(g, b).values.numpy() - exact)
    plain = np.abs(inverter.transform(g).numpy() @ b.numpy().T - exact)
    assert np.median(corrected) < 0.02 * np.median(plain)


@quiet
@pytest.mark.parametrize("method", [EKFAC(), KFAC(), Diagonal(), Nystroem(rank=6)], ids=lambda m: m.name)
def test_a_bound_is_never_above_that_of_no_solution(method):
    case = problem("mlp", "cross_entropy", DECAY)
    inverter = HessianInverter(method, 1e-3, curvature="ggn", **case.settings()).fit(case.module, case.data)
    B = case.right_hand_sides(20)
    limit = np.outer(*[np.linalg.norm(B, axis=1)] * 2) / (1e-3 + DECAY)
    assert (inverter.quadratic(B, B).bounds <= limit * (1 + 1e-6)).all()


@pytest.mark.parametrize("model", ["softmax", "mlp", "linear"])
@pytest.mark.parametrize("curvature", ["ggn", "empirical_fisher", "hessian"])
def test_products_round_to_a_hundredth_of_what_is_allowed(model, curvature):
    """Against products with the oracle's matrix, which another program of another order made."""
    case = problem(model, MODELS[model], DECAY)
    inverter = HessianInverter("cg", 1.0, curvature=curvature, **case.settings()).fit(case.module, case.data)
    H, V = oracle_matrix(case, curvature), torch.from_numpy(case.right_hand_sides(200))
    gap = np.linalg.norm(inverter.curvature_.apply(V).numpy() - V.numpy() @ H, axis=1)
    assert (gap <= 0.1 * rounding_of(inverter.curvature_) * np.linalg.norm(V.numpy(), axis=1)).all()


def test_products_of_many_rows_round_to_a_tenth_of_what_is_allowed():
    X, V = np.random.default_rng(0).standard_normal((100_000, 5)), np.random.default_rng(1).standard_normal((4, 5))
    A = HessianInverter("cg", 1.0).fit(X).curvature_
    F = (X * np.sqrt(1 / len(X))).astype(np.longdouble)
    gap = np.linalg.norm((A.apply(torch.from_numpy(V)).numpy() - (V @ F.T) @ F).astype(float), axis=1)
    assert (gap <= 0.1 * rounding_of(A) * np.linalg.norm(V, axis=1)).all()


# -- refinement -------------------------------------------------------------------------------------------------------


@quiet
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["direct", "cg", "ekfac", "diagonal"])
def test_refined_reaches_its_target(name, dtype):
    case = rounded(problem("mlp", "cross_entropy", DECAY), dtype)
    inverter = HessianInverter(KINDS[name](), 1.0, curvature="ggn", **case.settings(dtype=dtype))
    inverter.fit(case.module, case.data)
    A = oracle_matrix(case, "ggn") if dtype == torch.float64 else Oracle(case).curvature("ggn")
    A = A + np.eye(case.p)
    B = torch.from_numpy(case.right_hand_sides(5))
    target = 1e-9 * torch.arange(1, 6).double()
    X, residual = inverter._certified("a test").refined(B, target=target)
    true = np.linalg.norm(B.numpy() - X.numpy() @ A, axis=1)
    assert (true <= residual.numpy()).all()
    assert (residual <= target).all()


def test_refined_stops_where_nothing_falls():
    A = Dense(torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64)))
    A.is_psd = True
    inverse = Direct().invert(A, 1.0)
    B = torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    X, residual = inverse.refined(B, target=0.0)
    np.testing.assert_allclose(X.numpy(), [[1 / 2, 1 / 3], [0.0, 0.0]], atol=1e-15)
    assert float(residual[0]) < 1e-12
    assert inverse.refined(B, X, target=1.0)[0].equal(X)


# -- kinds, scales, chunks --------------------------------------------------------------------------------------------


def test_kinds_and_scales():
    case = problem("softmax", "cross_entropy", DECAY)
    inverter = HessianInverter("direct", 0.1, curvature="ggn", **case.settings()).fit(case.module, case.data)
    B = case.right_hand_sides(4)
    forms, own = inverter.quadratic(B, B), inverter.quadratic(B)
    np.testing.assert_allclose(np.diagonal(forms.values), own.values, rtol=1e-12)
    tensors = inverter.quadratic(torch.from_numpy(B).float(), torch.from_numpy(B))
    assert tensors.values.dtype == tensors.bounds.dtype == torch.float64
    np.testing.assert_allclose(tensors.values.numpy(), forms.values, rtol=1e-5)
    far = inverter.quadratic(2.0**-300 * B, 2.0**450 * B)
    np.testing.assert_allclose(far.values, 2.0**150 * forms.values, rtol=1e-12)
    np.testing.assert_allclose(far.bounds, 2.0**150 * forms.bounds, rtol=1e-6)


@pytest.mark.parametrize("shape", [(3, 50), (50, 3)])
def test_chunks_do_not_matter(shape, monkeypatch):
    case = problem("softmax", "cross_entropy", DECAY)
    inverter = HessianInverter("direct", 0.1, curvature="ggn", **case.settings()).fit(case.module, case.data)
    G, B = (case.right_hand_sides(k, seed) for seed, k in enumerate(shape))
    whole, own = inverter.quadratic(G, B), inverter.quadratic(B)
    monkeypatch.setattr("skinvert.methods.quadratic.rows_within", lambda size, most: 7)
    parts = inverter.quadratic(G, B)
    np.testing.assert_allclose(parts.values, whole.values, rtol=1e-10)
    assert parts.bounds.shape == shape
    np.testing.assert_allclose(inverter.quadratic(B).values, own.values, rtol=1e-10)


def test_rows_of_another_width_are_refused():
    inverter = HessianInverter("direct", 0.1).fit(np.eye(3))
    with pytest.raises(ValueError, match="features"):
        inverter.quadratic(np.ones((1, 4)))
    with pytest.raises(ValueError, match="0 sample"):
        inverter.quadratic(np.ones((1, 3)), np.empty((0, 3)))


# -- Hessians that are semi-definite by construction ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["cg", "minres", "diagonal"])
@pytest.mark.parametrize("model", ["softmax", "linear"])
def test_the_hessian_of_a_linear_model_has_the_bound_of_its_penalty(model, name, dtype):
    case = rounded(problem(model, MODELS[model], DECAY), dtype)
    inverter = HessianInverter(KINDS[name](**ROUGH.get(name, {})), 0.1, **case.settings(dtype=dtype))
    inverter.fit(case.module, case.data)
    assert inverter._certified("a test").lower_bound == pytest.approx(0.1 + DECAY, rel=1e-12)
    forms = check_bounds(inverter, Oracle(case).hessian() + 0.1 * np.eye(case.p), 50)
    assert np.isfinite(forms.bounds).all()


@pytest.mark.parametrize(
    "model", [LogisticRegression(C=10.0), Ridge(), PoissonRegressor()], ids=lambda m: type(m).__name__
)
def test_scikit_learns_linear_models_have_bounds(model):
    X = np.random.default_rng(0).standard_normal((30, 4))
    y = (X[:, 0] > 0).astype(np.int64)
    inverter = HessianInverter(CG(rtol=0.1), 0.01).fit(model.fit(X, y), (X, y))
    A = inverter.curvature_.to_dense().numpy() + 0.01 * np.eye(5)
    assert np.isfinite(check_bounds(inverter, A, 50).bounds).all()


def test_only_what_is_affine_for_certain_is():
    body, head = nn.Linear(3, 3), nn.Linear(3, 3)
    last = list(head.parameters())
    assert has_affine_outputs(nn.Sequential(body, nn.Tanh(), head, nn.Flatten()), last)
    assert not has_affine_outputs(nn.Sequential(body, nn.Tanh(), head), [body.bias])
    assert not has_affine_outputs(nn.Sequential(head, nn.Tanh(), head), last)
    assert not has_affine_outputs(nn.Sequential(body, head, nn.Softmax(1)), last)

    class Other(nn.Linear):
        def forward(self, x):
            return super().forward(x).square()

    other = Other(3, 3)
    assert not has_affine_outputs(other, list(other.parameters()))
    head.register_forward_hook(lambda module, inputs, output: output**2)
    assert not has_affine_outputs(head, last)


def test_what_was_proven_goes_into_no_file(tmp_path):
    case = problem("mlp", "cross_entropy", DECAY)
    inverter = HessianInverter("direct", 5.0, **case.settings()).fit(case.module, case.data)
    B = case.right_hand_sides(3)
    forms = inverter.quadratic(B)
    assert list(inverter.inverse_.curvature.proven) == [5.0]
    loaded = pickle.loads(pickle.dumps(inverter))
    assert loaded.inverse_.curvature._proven is None
    inverter.save(tmp_path / "inverter")
    for other in (loaded, skinvert.load(tmp_path / "inverter")):
        # Against the matrix itself: with its own bound, as it was assembled in float64.
        np.testing.assert_allclose(other.quadratic(B).bounds, forms.bounds, rtol=0.5)
