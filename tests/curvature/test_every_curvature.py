"""What holds for every registered curvature, a stranger's included: one file that registers, and nothing else."""

import dataclasses
import importlib.util
import re
from functools import cache, partial

import numpy as np
import pytest
import sklearn
import torch
from definitions import EXACT_TO, SETTINGS, definition_of
from facts import KINDS, serving
from oracles import Oracle, held_out_quadratic, matrix_error, oracle_matrix, relative_error, solution
from problems import problem
from sklearn.model_selection import GridSearchCV

from skinvert import HessianInverter, HessianInverterCV, TorchTwiceDifferentiable, TwiceDifferentiable, solve_hvp
from skinvert.curvature import CURVATURES, Curvature, Factored, build_curvature, register_curvature
from skinvert.data import as_batches

MODULE = '''
"""Curvatures of someone else's."""

from functools import partial

import torch

from skinvert.curvature import Curvature, EmpiricalFisher, Factored, Layered, Share, register_curvature

CLASSES = torch.tensor([2.0, 0.5, 1.0], dtype=torch.float64)


class ByClass(Layered):
    """The empirical Fisher, each row weighted by its class too."""

    def __init__(self, objective):
        super().__init__(objective)
        self.empirical = EmpiricalFisher(objective)

    def factor_of(self, batch, weights):
        return (self.objective.gradients(batch) * (weights * CLASSES[batch[1]]).sqrt()[:, None])[:, None]

    def signals(self, batch, weights):
        return self.empirical.signals(batch, weights * CLASSES[batch[1]])


class Pair(Factored):
    """Two rows of F a sample."""

    rank = 2

    def factor_of(self, batch, weights):
        g = weights.sqrt()[:, None] * self.objective.gradients(batch)
        return torch.stack([g, 0.5 * g.flip(1)], dim=1)


class Loaded(Curvature):
    """The empirical Fisher with δI a row, by products alone."""

    is_psd = True

    def __init__(self, objective, delta):
        super().__init__(objective)
        self.delta = delta

    def graph(self, batch, weights):
        g = self.objective.gradients(batch)

        def products(V):
            return self.delta * weights.sum() * V + ((V @ g.mT) * weights) @ g

        return Share(products, g.nbytes)


register_curvature("by_class", ByClass)
register_curvature("pair", Pair)
register_curvature("loaded", partial(Loaded, delta=0.3))
'''
STRANGERS = ("by_class", "pair", "loaded")
FACTORED = ("ggn", "fisher", "empirical_fisher", "by_class", "pair")
EVERY = pytest.mark.parametrize("name", ["hessian", "ggn", "fisher", "empirical_fisher", *STRANGERS])
EVERY_FACTORED = pytest.mark.parametrize("name", FACTORED)
STRANGE = pytest.mark.parametrize("name", STRANGERS)


@pytest.fixture(scope="module", autouse=True)
def strangers(tmp_path_factory):
    path = tmp_path_factory.mktemp("strangers") / "their_curvatures.py"
    path.write_text(MODULE, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("their_curvatures", path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    yield
    for name in STRANGERS:
        del CURVATURES[name]


# -- the oracle ----------------------------------------------------------------------------------------------------


def case_of(weighted=True, **settings):
    return problem("mlp", "cross_entropy", 0.1, weighted, **settings)


def own_terms(case, name):
    """Every row's hᵢ (n, p, p), rows repeated by their weights."""
    oracle = Oracle(case)
    g = oracle.gradient_rows()
    outer = np.einsum("ip,iq->ipq", g, g)
    return {
        "ggn": oracle.ggn_rows,
        "by_class": lambda: np.array([2.0, 0.5, 1.0])[oracle.y][:, None, None] * outer,
        "pair": lambda: outer + 0.25 * outer[:, ::-1, ::-1],
        "loaded": lambda: outer + 0.3 * np.eye(oracle.p),
    }[name]()


@cache
def expected_matrix(case, name):
    if name not in STRANGERS:
        # The Fisher of cross-entropy is the GGN.
        return oracle_matrix(case, "ggn" if name == "fisher" else name)
    return own_terms(case, name).mean(0) + np.diag(Oracle(case).penalty.numpy())


def curvature_of(case, name, **batches):
    model = TorchTwiceDifferentiable(case.module, case.loss, case.weight_decay).at_point()
    settings = {"batch_size": case.batch_size, "sample_weight": case.sample_weight, **batches}
    return build_curvature(name, model, as_batches(case.data, dtype=model.dtype, device=model.device, **settings))


# -- the operator --------------------------------------------------------------------------------------------------


@EVERY
def test_faces_agree_with_the_oracle(name):
    case = case_of()
    A, expected = curvature_of(case, name), expected_matrix(case, name)
    dense = A.to_dense()
    assert torch.equal(dense, dense.mT)
    assert matrix_error(dense, expected) <= 1e-12
    assert matrix_error(A.apply(torch.eye(A.size, dtype=A.dtype)), expected) <= 1e-12
    assert matrix_error(A.diagonal(), np.diag(expected)) <= 1e-12
    columns = case.right_hand_sides(3).T
    assert matrix_error(A.aslinearoperator() @ columns, expected @ columns) <= 1e-12


@EVERY
def test_declares_what_a_curvature_of_a_model_declares(name):
    case = case_of()
    A = curvature_of(case, name)
    assert isinstance(A, Curvature) and A.n_samples == len(case.X) and A.unreached == ()
    assert A.gradient_norm == pytest.approx(np.linalg.norm(Oracle(case).gradient()))
    assert A.is_psd is (name != "hessian") and bool(A.hint) is (name == "hessian")
    assert A.scores_itself is (name in FACTORED)


@EVERY
@pytest.mark.parametrize("working_memory", [0.01, 1024])
def test_batches_and_memory_change_nothing(name, working_memory):
    case = case_of()
    V = torch.from_numpy(case.right_hand_sides(3))
    expected = expected_matrix(case, name)
    with sklearn.config_context(working_memory=working_memory):
        for batch_size in (1, 5, None):
            A = curvature_of(case, name, batch_size=batch_size)
            # Twice: from what is kept of the first product.
            for _ in range(2):
                assert matrix_error(A.apply(V), V.numpy() @ expected) <= 1e-12
            assert matrix_error(A.to_dense(), expected) <= 1e-12


@EVERY
@pytest.mark.parametrize("kept", [False, True])
def test_the_mean_of_minibatches_is_the_curvature(name, kept):
    case = case_of()
    A = curvature_of(case, name)
    if kept:
        A.apply(torch.zeros(1, A.size, dtype=A.dtype))
    n = A.n_samples
    parts = torch.randperm(n).split([5, n - 5])
    received = sum(len(rows) / n * A.minibatch(rows).to_dense() for rows in parts)
    assert matrix_error(received, expected_matrix(case, name)) <= 1e-12


@EVERY_FACTORED
def test_factors(name):
    case = case_of()
    A = curvature_of(case, name)
    F, R = A.factor(), np.diag(A.penalty.numpy())
    assert F.shape == A.factor_shape == (A.n_samples * A.rank, A.size)
    assert matrix_error(F.mT.numpy() @ F.numpy() + R, expected_matrix(case, name)) <= 1e-12
    rows, weights = torch.cat(list(A.sample_factors())), torch.from_numpy(case.counts).double()
    received = torch.einsum("m,mrp,mrq->pq", weights / weights.sum(), rows, rows).numpy()
    assert matrix_error(received + R, expected_matrix(case, name)) <= 1e-12


@pytest.mark.parametrize("name", ["ggn", "fisher", "empirical_fisher", "by_class"])
def test_the_diagonal_at_some_parameters(name):
    case = case_of()
    A, names = curvature_of(case, name), ["0.bias", "2.weight"]
    layout = A.objective.layout
    assert set(names) < set(layout.names)
    places = np.concatenate([np.arange(case.p)[layout.slices[one]] for one in layout.names if one in names])
    assert matrix_error(A.diagonal_at(names), np.diag(expected_matrix(case, name))[places]) <= 1e-12


def test_the_eigenvalues_of_ekfac_are_the_exact_diagonal_for_a_stranger_too():
    case = case_of()
    H = torch.from_numpy(expected_matrix(case, "by_class") - 0.1 * np.eye(case.p))
    factors = curvature_of(case, "by_class").kronecker_factors()
    bases = [block.decompose()[0] for block in factors.blocks]
    assert sum(block.index.numel() for block in factors.blocks) == case.p
    for block, basis, received in zip(factors.blocks, bases, factors.refit(bases), strict=True):
        Q, index = torch.kron(basis.left.contiguous(), basis.right.contiguous()), block.index.reshape(-1)
        expected = (Q.mT @ H[index[:, None], index] @ Q).diagonal()
        torch.testing.assert_close(received.reshape(-1), expected, rtol=1e-9, atol=1e-13)


# -- the estimators ------------------------------------------------------------------------------------------------


@STRANGE
@pytest.mark.parametrize("method", serving(Curvature.faces))
def test_inverts_by_name(name, method):
    case = case_of(weighted=False)
    b, H = case.right_hand_sides(2), expected_matrix(case, name)
    settings = case.settings(curvature=name, random_state=0)
    inverter = HessianInverter(KINDS[method](**SETTINGS[method]), 1.0, **settings).fit(case.module, case.data)
    assert inverter.curvature_name_ == name
    expected = definition_of(method)(case, name, H, 1.0, b)
    assert relative_error(inverter.transform(b), expected) <= EXACT_TO.get(method, 1e-8)


@STRANGE
def test_solve_hvp(name):
    case = case_of(weighted=False)
    b = case.right_hand_sides(2)
    model = TorchTwiceDifferentiable(case.module, case.loss, case.weight_decay)
    x, _ = solve_hvp("direct", model, case.data, b, hessian_perturbation=0.5, curvature=name)
    assert relative_error(x, solution(expected_matrix(case, name), 0.5, b)) <= 1e-10


@STRANGE
def test_blocks_are_the_blocks_of_the_matrix(name):
    if name == "pair":
        pytest.skip("its row reversed is another one within a block")
    case = case_of(weighted=False)
    b = case.right_hand_sides(2)
    inverter = HessianInverter("direct", 0.5, **case.settings(curvature=name, blocks="parameter"))
    inverter.fit(case.module, case.data)
    H, kept = expected_matrix(case, name), np.zeros((case.p, case.p), dtype=bool)
    for place in inverter._layout.slices.values():
        kept[place, place] = True
    assert relative_error(inverter.transform(b), solution(np.where(kept, H, 0.0), 0.5, b)) <= 1e-10


@STRANGE
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_held_out_scores_are_by_itself_where_it_has_factors(name, weight_decay):
    case, more = (problem("mlp", "cross_entropy", weight_decay, n=n) for n in (12, 21))
    test = dataclasses.replace(case, X=more.X[-9:], y=more.y[-9:])
    g, h = Oracle(test).gradient_rows(), own_terms(test, name if name in FACTORED else "ggn")
    Z = solution(expected_matrix(case, name), 0.5, g)
    expected = held_out_quadratic(Z, g, h, np.full(case.p, weight_decay), np.ones(len(g)))
    inverter = HessianInverter("direct", 0.5, **case.settings(curvature=name)).fit(case.module, case.data)
    assert inverter.score(test.data) == pytest.approx(expected, rel=1e-9)


@STRANGE
def test_a_search_scores_as_the_cross_validation_does(name):
    case = case_of(weighted=False)
    shifts = [0.03, 0.3, 3.0]
    settings = case.settings(curvature=name, model=case.module, method="direct")
    X, y = case.X.numpy(), case.y.numpy()
    search = GridSearchCV(HessianInverter(**settings), {"hessian_perturbation": shifts}, cv=3).fit(X, y)
    chosen = HessianInverterCV(shifts, cv=3, **settings).fit(X, y)
    np.testing.assert_allclose(chosen.cv_results_["mean_test_score"], search.cv_results_["mean_test_score"], rtol=1e-7)


# -- the registry --------------------------------------------------------------------------------------------------


def test_an_unknown_name_lists_the_registered_ones():
    case = case_of()
    with pytest.raises(
        ValueError, match="'empirical_fisher', 'by_class', 'pair', 'loaded', 'sampled_ggn', 'sampled_fisher'"
    ):
        HessianInverter(curvature="typo", **case.settings()).fit(case.module, case.data)


def test_the_first_is_kept_unless_it_is_to_be_overwritten():
    class Other(CURVATURES["pair"]):
        pass

    kept = CURVATURES["pair"]
    with pytest.warns(UserWarning, match=r"'pair' is already registered: the first is kept.*overwrite=True"):
        register_curvature("pair", Other)
    assert CURVATURES["pair"] is kept
    try:
        register_curvature("pair", Other, overwrite=True)
        assert CURVATURES["pair"] is Other
    finally:
        CURVATURES["pair"] = kept


class Incomplete(Factored):
    pass


@pytest.mark.parametrize(
    ("name", "kind", "error", "match"),
    [
        (3, Factored, TypeError, "A curvature's name must be a string"),
        ("", Factored, ValueError, "another than ''"),
        ("auto", Factored, ValueError, "auto, gram, sampled_ggn, sampled_fisher"),
        ("mine", dict, TypeError, "subclass of Curvature, or a function"),
        ("mine", 3, TypeError, "subclass of Curvature, or a function"),
        ("mine", Incomplete, TypeError, "does not define factor_of"),
        ("mine", Curvature, TypeError, "does not define graph"),
    ],
)
def test_what_cannot_be_registered(name, kind, error, match):
    with pytest.raises(error, match=match):
        register_curvature(name, kind)
    assert "mine" not in CURVATURES


def test_what_a_function_builds_must_be_a_curvature(monkeypatch):
    monkeypatch.setitem(CURVATURES, "mine", lambda objective: objective.gradient)
    with pytest.raises(TypeError, match="registered as 'mine' must be what builds a Curvature. Got Tensor"):
        curvature_of(case_of(), "mine")


def test_a_factor_of_another_shape_is_told(monkeypatch):
    class Flat(Factored):
        def factor_of(self, batch, weights):
            return self.objective.gradients(batch)

    monkeypatch.setitem(CURVATURES, "mine", Flat)
    with pytest.raises(ValueError, match=re.escape("Flat.factor_of must be of shape (7, 1, 43), (m, rank, p)")):
        curvature_of(case_of(), "mine").to_dense()


class Quadratic(TwiceDifferentiable):
    """½ mean (θᵀx)²."""

    num_params, parameters = 2, [torch.zeros(2, dtype=torch.float64)]

    def grad(self, x, y, create_graph=False):
        return x if create_graph else x.mT @ x @ self.parameters[0] / len(x)

    def hessian(self, x, y):
        return x.mT @ x / len(x)

    @staticmethod
    def mvp(grad_xy, v, backprop_on, *, progress=False):
        return v @ grad_xy.mT @ grad_xy / len(grad_xy)

    @classmethod
    def tensor_type(cls):
        return torch.Tensor


@pytest.mark.parametrize("weights", [None, np.array([2.0, 0.0, 1.0, 1.0, 3.0])])
def test_the_hessian_of_grad_and_mvp_is_a_curvature_like_any_other(weights):
    X = torch.from_numpy(np.random.default_rng(0).standard_normal((5, 2)))
    settings = {"dtype": torch.float64, "device": torch.device("cpu"), "batch_size": 2, "sample_weight": weights}
    A = build_curvature("hessian", Quadratic(), as_batches((X, torch.zeros(5)), **settings))
    w = np.ones(5) if weights is None else weights
    expected = (X.numpy().T * w / w.sum()) @ X.numpy()
    assert isinstance(A, Curvature) and (A.n_samples, A.unreached, A.gradient_norm) == (5, (), 0.0)
    assert matrix_error(A.to_dense(), expected) <= 1e-14
    parts = [torch.tensor([4, 0, 2]), torch.tensor([1, 3])]
    received = sum(len(rows) / 5 * A.minibatch(rows).to_dense() for rows in parts)
    assert matrix_error(received, expected) <= 1e-14


def test_a_stranger_needs_a_torch_model():
    batches = as_batches((torch.ones(3, 2), torch.zeros(3)), dtype=torch.float64, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="curvature for Quadratic must be 'hessian'. Got 'pair'"):
        build_curvature("pair", Quadratic(), batches)


class Closed(Curvature):
    """Nothing that autograd saves, and nothing that it says of itself."""

    def graph(self, batch, weights):
        return lambda V: weights.sum() * V + 0.0 * batch[0].sum()


def test_graphs_that_hold_batches_are_not_kept_where_the_data_are_not(monkeypatch):
    monkeypatch.setitem(CURVATURES, "mine", Closed)
    case = case_of()
    for working_memory, kept in [(1024, True), (1e-4, False)]:
        with sklearn.config_context(working_memory=working_memory):
            A = curvature_of(case, "mine")
            A.apply(torch.zeros(1, A.size, dtype=A.dtype))
            assert (A.objective.batches.kept is not None) is kept and (A._graphs is not None) is kept


def test_a_builder_is_not_a_class(monkeypatch):
    monkeypatch.setitem(CURVATURES, "mine", partial(CURVATURES["pair"]))
    assert isinstance(curvature_of(case_of(), "mine"), CURVATURES["pair"])
