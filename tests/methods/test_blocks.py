"""blocks=: the block-diagonal part of the curvature, inverted by any method."""

import pickle

import numpy as np
import pytest
import torch
from definitions import EXACT_TO, OF_SAMPLES, SETTINGS, definition_of
from facts import accepting
from oracles import oracle_matrix, relative_error, solution
from problems import problem

from skinvert import HessianInverter, InversionRegistry, TwiceDifferentiable
from skinvert.methods import CG, Arnoldi, Direct
from skinvert.methods.blocks import invert_blocks
from skinvert.operators import BlockDiagonal, Dense
from skinvert.parameters import split_blocks

# What is tested here is what an approximate method is by definition; tests/methods/test_truth.py holds what it says.
pytestmark = pytest.mark.filterwarnings("ignore:.* is worse than x = 0:sklearn.exceptions.ConvergenceWarning")

LAYERS = {"0": slice(0, 25), "2": slice(25, 43)}
PARAMETERS = {"0.weight": slice(0, 20), "0.bias": slice(20, 25), "2.weight": slice(25, 40), "2.bias": slice(40, 43)}
# Two blocks whose entries interleave.
MAPPING = {"weights": "*.weight", "biases": ["0.bias", "2.bias"]}


def places(blocks, p=43):
    index = np.arange(p)
    if blocks == "layer":
        return [index[part] for part in LAYERS.values()]
    if blocks == "parameter":
        return [index[part] for part in PARAMETERS.values()]
    parts = [index[part] for part in PARAMETERS.values()]
    return [np.concatenate(parts[::2]), np.concatenate(parts[1::2])]


def masked(H, blocks):
    """Return H with zeros outside the blocks."""
    kept = np.zeros_like(H)
    for part in places(blocks):
        kept[np.ix_(part, part)] = H[np.ix_(part, part)]
    return kept


def fitted(method, blocks, curvature="ggn", shift=0.1):
    case = problem("mlp", "cross_entropy", 0.1, True)
    inverter = HessianInverter(method, shift, blocks=blocks, curvature=curvature, **case.settings())
    return case, inverter.fit(case.module, case.data, case.sample_weight)


@pytest.mark.parametrize("curvature", ["hessian", "ggn", "fisher", "empirical_fisher"])
@pytest.mark.parametrize("blocks", ["layer", "parameter", MAPPING], ids=["layer", "parameter", "mapping"])
@pytest.mark.parametrize("method", [Direct(), CG(rtol=1e-12)], ids=["direct", "cg"])
def test_solves_each_block_alone(method, blocks, curvature):
    case, inverter = fitted(method, blocks, curvature, shift=3.0)
    H = masked(oracle_matrix(case, "ggn" if curvature == "fisher" else curvature), blocks)
    b = case.right_hand_sides(7)
    x, info = inverter.solve(b)
    assert relative_error(x, solution(H, 3.0, b)) <= 1e-10
    expected = np.linalg.norm(x @ (H + 3 * np.eye(43)) - b, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(info["residual_of_approximation"], expected, rtol=1e-3, atol=1e-14)
    np.testing.assert_allclose(info["residual"], inverter.residual(b, x), rtol=1e-10)
    assert info["approximate"] and not info["converged"].any()
    assert relative_error(inverter.inverse_transform(x), b) <= 1e-10


@pytest.mark.parametrize("name", accepting("empirical_fisher"))
def test_any_method_inside(name):
    curvature = "empirical_fisher"
    method = InversionRegistry.get(TwiceDifferentiable, name)(**SETTINGS.get(name, {}))
    case, inverter = fitted(method, "layer", curvature, shift=0.5)
    b = case.right_hand_sides(3)
    received = inverter.transform(b)
    for part in LAYERS.values():
        H = oracle_matrix(case, curvature)[part, part]
        if name in OF_SAMPLES:
            continue
        expected = definition_of(name)(case, curvature, H, 0.5, b[:, part])
        assert relative_error(received[:, part], expected) <= EXACT_TO.get(name, 1e-8)
    assert np.isfinite(received).all()


def test_residual_judges_against_the_whole():
    case, inverter = fitted("direct", "layer")
    b = case.right_hand_sides(2)
    x = inverter.transform(b)
    A = oracle_matrix(case, "ggn") + 0.1 * np.eye(43)
    expected = np.linalg.norm(x @ A - b, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(inverter.residual(b, x), expected, rtol=1e-8)
    assert (expected > 1e-3).all()


def test_a_path_and_a_pickle():
    case, inverter = fitted("direct", MAPPING)
    b = case.right_hand_sides(2)
    X = inverter.path(b, [0.1, 1.0])
    H = masked(oracle_matrix(case, "ggn"), MAPPING)
    assert relative_error(X[1], solution(H, 1.0, b)) <= 1e-10
    loaded = pickle.loads(pickle.dumps(inverter))
    np.testing.assert_array_equal(loaded.transform(b), inverter.transform(b))


def test_rank_is_of_each_block():
    _, inverter = fitted(Arnoldi(rank=5), "layer")
    assert [len(part.eigenvalues) for part in inverter.inverse_.inverses] == [5, 5]


@pytest.mark.parametrize(
    ("blocks", "error", "match"),
    [
        ("rows", ValueError, "'layer', 'parameter'"),
        (3, TypeError, "mapping"),
        ({"a": "*.weight"}, ValueError, "bias"),
        ({"a": "*", "b": "0.*"}, ValueError, "0.weight"),
        ({"a": "*", "b": "nothing"}, ValueError, "empty blocks"),
    ],
)
def test_refuses_what_is_no_partition(blocks, error, match):
    with pytest.raises(error, match=match):
        fitted("direct", blocks)


def test_refuses_plain_rows():
    with pytest.raises(ValueError, match="no layers"):
        HessianInverter("direct", 0.1, blocks="layer").fit(torch.eye(3))


def test_refuses_a_function(monkeypatch):
    monkeypatch.setattr(InversionRegistry, "registry", dict(InversionRegistry.registry))

    @InversionRegistry.register(TwiceDifferentiable, "a_function")
    def solve(model, training_data, b, hessian_perturbation=0.0):
        return b

    with pytest.raises(ValueError, match="blocks must be None for a method that is a function"):
        fitted("a_function", "layer")


def test_a_model_of_one_layer_is_one_block():
    assert split_blocks(["weight", "bias"], "layer") == {"": ["weight", "bias"]}


@pytest.mark.parametrize("rtol", [1e-3, 1e-8])
def test_converged_goes_by_the_tolerance_of_the_blocks(rtol):
    """What couples the blocks is left out: its share of the residual is between the two tolerances."""
    H = torch.eye(4, dtype=torch.float64)
    H[0, 3] = H[3, 0] = 1e-5
    blocks = BlockDiagonal([Dense(H[:2, :2].clone()), Dense(H[2:, 2:].clone())])
    inverse = invert_blocks(CG(rtol=rtol), blocks, 0.0).judged_by(Dense(H))
    info = inverse.solve(torch.eye(4, dtype=torch.float64)[:1]).info
    assert 1e-6 < float(info["residual"]) < 1e-4
    assert bool(info["converged"]) == (rtol == 1e-3)
