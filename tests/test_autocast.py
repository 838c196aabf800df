"""Products and factors under autocast: solutions of the exact system all the same, told where they are none."""

import pickle
import warnings

import numpy as np
import pytest
import torch
from definitions import SETTINGS_FLOAT32, definition_of
from facts import APPROXIMATE, EXACT, KINDS
from oracles import oracle_matrix, perturbation_for, relative_error, solution
from problems import LastState, problem
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from torch import nn

from skinvert import HessianInverter, HessianInverterCV, InfluenceFunction, solve_hvp
from skinvert.curvature import CURVATURES, faces_of
from skinvert.curvature.saved import counted
from skinvert.methods import CG, LiSSA
from skinvert.reasons import Reason

MODELS = {"linear": "mse", "softmax": "cross_entropy", "mlp": "cross_entropy", "cnn2d": "cross_entropy"}
# Of bfloat16 one number has 0.4 %.
HALF = 0.05
TABLE = [
    (name, curvature, model)
    for name in KINDS
    for curvature in CURVATURES
    for model in MODELS
    if set(KINDS[name].requires) <= faces_of(curvature)
]


def fitted(name, curvature, model, **other):
    """Return a case, its dense curvature, λ, and the fit under autocast."""
    case = problem(model, MODELS[model], 0.1, False, 7)
    H = oracle_matrix(case, "ggn" if curvature == "fisher" else curvature)
    shift = max(perturbation_for(H, 5.0 if name == "lissa" else 30.0), 0.05)
    method = KINDS[name](**SETTINGS_FLOAT32.get(name, {}))
    settings = {"autocast": "bfloat16", "dtype": torch.float32, "random_state": 0, **other}
    inverter = HessianInverter(method, shift, curvature=curvature, **case.settings(**settings))
    return case, H, shift, inverter.fit(case.module, case.data)


# Those of any rank are none under autocast: what they leave out is noise.
SOLVING = [name for name in EXACT if "rank" not in KINDS[name]().get_params()]


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("name", "curvature", "model"), [row for row in TABLE if row[0] in SOLVING])
def test_exact_methods_solve_the_exact_system(name, curvature, model):
    case, H, shift, inverter = fitted(name, curvature, model)
    b = case.right_hand_sides(5)
    x, info = inverter.solve(b)
    expected = solution(H, shift, b)
    residual = np.linalg.norm(x @ (H + shift * np.eye(len(H))) - b, axis=1) / np.linalg.norm(b, axis=1)
    assert info["converged"].all()
    assert np.abs(residual - info["residual"]).max() <= 1e-5
    assert relative_error(x, expected) <= 30 * inverter.inverse_.tolerance


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize(("name", "curvature", "model"), [row for row in TABLE if row[0] in APPROXIMATE])
def test_approximate_methods_are_their_definition_to_bfloat16(name, curvature, model):
    case, H, shift, inverter = fitted(name, curvature, model)
    b = case.right_hand_sides(5)
    x, info = inverter.solve(b)
    assert relative_error(x, definition_of(name)(case, curvature, H, shift, b)) <= HALF
    # Judged by the exact curvature.
    residual = np.linalg.norm(x @ (H + shift * np.eye(len(H))) - b, axis=1) / np.linalg.norm(b, axis=1)
    assert np.abs(residual - info["residual"]).max() <= 1e-4
    assert info["approximate"]


@pytest.mark.parametrize("curvature", list(CURVATURES))
@pytest.mark.parametrize("model", [name for name in MODELS if name != "linear"])
def test_products_are_of_bfloat16_passes_and_float32_sums(curvature, model):
    case, H, _, inverter = fitted("cg", curvature, model)
    V = torch.from_numpy(case.right_hand_sides(9)).float()
    exact, rough = inverter.curvature_.apply(V), inverter.curvature_.rough.apply(V)
    assert rough.dtype == torch.float32
    assert 1e-4 < relative_error(rough, V.double().numpy() @ H) < HALF
    assert relative_error(exact, V.double().numpy() @ H) < 1e-4


def test_sums_over_many_rows_do_not_lose_digits():
    # In bfloat16 a sum of equal terms stops growing at 256 of them.
    net = nn.Linear(1, 1, bias=False)
    data = torch.ones(5_000, 1), torch.ones(5_000, 1)
    for batch_size in (20, 5_000):
        inverter = HessianInverter("cg", loss="mse", autocast="bfloat16", batch_size=batch_size).fit(net, data)
        assert inverter.curvature_.rough.apply(torch.ones(1, 1)).item() == pytest.approx(2.0, rel=1e-2)


def test_graphs_hold_half():
    net = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 2))
    data = torch.randn(2_000, 256), torch.randn(2_000, 2)
    inverter = HessianInverter("cg", 1.0, loss="mse", curvature="ggn", autocast="bfloat16").fit(net, data)
    exact = inverter.curvature_
    (batch, weights), *_ = exact.objective.batches
    _, of_exact = counted(lambda: exact.graph(batch, weights))
    _, of_rough = counted(lambda: exact.rough.graph(batch, weights))
    assert of_rough < 0.8 * of_exact


@pytest.mark.parametrize("blocks", ["layer", "parameter"])
def test_blocks(blocks):
    case, _, _, inverter = fitted("cg", "ggn", "mlp", blocks=blocks)
    expected = clone(inverter).set_params(autocast=None).fit(case.module, case.data)
    b = case.right_hand_sides(3)
    assert relative_error(inverter.transform(b), expected.transform(b)) < 1e-3
    assert inverter.inverse_.inverses[0].inverse.curvature.eps > 1e-3


@pytest.mark.parametrize("name", ["cg", "direct", "minres"])
def test_path_start_and_pickle(name):
    case, H, shift, inverter = fitted(name, "ggn", "mlp")
    b = case.right_hand_sides(3)
    shifts = [shift, 10 * shift]
    for x, at in zip(inverter.path(b, shifts), shifts, strict=True):
        assert relative_error(x, solution(H, at, b)) < 2e-3
    assert np.array_equal(pickle.loads(pickle.dumps(inverter)).transform(b), inverter.transform(b))
    if name == "direct":
        with pytest.raises(ValueError, match="x0 must be None"):
            inverter.solve(b, b)
        return
    x, info = inverter.solve(b, solution(H, shift, b))
    assert relative_error(x, solution(H, shift, b)) < 1e-5
    assert "n_iter" not in info or not info["n_iter"].any()


def test_scales_of_b():
    case, H, shift, inverter = fitted("cg", "ggn", "mlp")
    b = case.right_hand_sides(4)
    b = b * np.array([[1.0], [1e-25], [1e25], [0.0]])
    x, info = inverter.solve(b)
    assert info["converged"].all()
    assert relative_error(x[:3], solution(H, shift, b[:3])) < 1e-4
    assert not x[3].any()


def test_what_a_dtype_cannot_hold_is_told():
    case, _, _, inverter = fitted("cg", "ggn", "mlp")
    b = 1e-40 * case.right_hand_sides(2)
    with pytest.warns(ConvergenceWarning, match="below the range"):
        _, info = inverter.solve(torch.from_numpy(b).float())
    assert not info["converged"].any() and (info["reason"] == int(Reason.OUT_OF_RANGE)).all()


def test_what_takes_a_factorisation_of_the_exact_curvature_says_so(tmp_path):
    _, _, _, inverter = fitted("direct", "ggn", "softmax")
    for ask in (inverter.log_det, lambda: inverter.sample(2), lambda: inverter.save(tmp_path / "fit")):
        with pytest.raises((TypeError, ValueError), match=r"Got Direct\(.*\) with autocast='bfloat16'"):
            ask()


def test_no_rows_and_more_rows_than_parameters():
    case, H, shift, inverter = fitted("cg", "ggn", "softmax")
    assert inverter.transform(torch.zeros(0, case.p)).shape == (0, case.p)
    b = case.right_hand_sides(case.p + 5)
    assert relative_error(inverter.transform(b), solution(H, shift, b)) < 1e-4


def test_what_is_not_solved_is_told():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    data = torch.randn(50, 8), torch.randint(0, 3, (50,))
    inverter = HessianInverter(CG(maxiter=4), 1e-4, curvature="ggn", loss="cross_entropy", autocast="bfloat16")
    b = torch.randn(2, sum(t.numel() for t in net.parameters()))
    with pytest.warns(ConvergenceWarning, match="autocast=None"):
        _, info = inverter.fit(net, data).solve(b)
    assert not info["converged"].any()
    assert (info["residual"] > 1e-5).all() and (info["residual"] <= 1).all()
    assert (info["reason"] == int(Reason.MAX_ITERATIONS)).all()


def test_an_indefinite_curvature_is_told():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    data = torch.randn(20, 4), torch.randint(0, 3, (20,))
    b = torch.randn(2, sum(t.numel() for t in net.parameters()))
    with pytest.warns(ConvergenceWarning, match="indefinite"):
        _, info = HessianInverter("cg", loss="cross_entropy", autocast="bfloat16").fit(net, data).solve(b)
    assert info["negative_curvature"].all() and not info["converged"].any()


def test_the_model_and_the_ambient_state_stay():
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 2)).train()
    before = [t.clone() for t in [*net.parameters(), *net.buffers()]]
    inverter = HessianInverter("ekfac", 1.0, loss="mse", autocast=torch.bfloat16)
    inverter.fit(net, (torch.randn(9, 4), torch.randn(9, 2))).transform(torch.randn(2, inverter.n_features_in_))
    assert net.training and not torch.is_autocast_enabled("cpu")
    assert all(torch.equal(a, b) for a, b in zip(before, [*net.parameters(), *net.buffers()], strict=True))
    assert all(t.grad is None for t in net.parameters())


def test_searches_influence_and_the_functional_face():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3))
    data = torch.randn(30, 4), torch.randint(0, 3, (30,))
    chosen = HessianInverterCV([0.1, 1.0], cv=3, model=net, loss="cross_entropy", autocast="bfloat16").fit(*data)
    plain = HessianInverterCV([0.1, 1.0], cv=3, model=net, loss="cross_entropy").fit(*data)
    assert chosen.hessian_perturbation_ == plain.hessian_perturbation_
    own = InfluenceFunction(HessianInverter("cg", 0.1, loss="cross_entropy", autocast="bfloat16")).fit(net, data)
    other = InfluenceFunction(HessianInverter("cg", 0.1, loss="cross_entropy")).fit(net, data)
    test = data[0][:5], data[1][:5]
    assert relative_error(own.transform(test), other.transform(test)) < 1e-4
    b = torch.randn(2, 15)
    x, _ = solve_hvp("cg", net, data, b, hessian_perturbation=0.1, loss="cross_entropy", autocast="bfloat16")
    assert relative_error(x, other.inverter_.transform(b)) < 1e-4


class Returned(nn.Module):
    """Gives its loss beside its logits, when it has labels."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(4, 3)

    def forward(self, x, labels=None):
        logits = self.out(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def test_an_approximate_method_is_judged_by_the_exact_curvature_in_the_functional_face():
    case, H, shift, _ = fitted("kfac", "ggn", "mlp")
    b = case.right_hand_sides(3)
    settings = {"curvature": "ggn", "loss": case.loss, "weight_decay": case.weight_decay, "dtype": torch.float32}
    x, info = solve_hvp("kfac", case.module, case.data, b, hessian_perturbation=shift, autocast="bfloat16", **settings)
    residual = np.linalg.norm(x @ (H + shift * np.eye(len(H))) - b, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(info["residual"], residual, atol=1e-5)


def test_the_hessians_diagonal_of_layers_that_see_bfloat16():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    data = torch.randn(6, 3), torch.randn(6, 1)
    # The layer below is in bfloat16, and nothing of it is selected.
    exact = HessianInverter("cg", 1.0, loss="mse", params="1.*").fit(net, data).curvature_
    rough = exact.in_autocast(torch.bfloat16)
    assert relative_error(rough.diagonal()[None], exact.to_dense().diagonal()[None]) < HALF


def test_models_that_return_mappings():
    torch.manual_seed(0)
    net = Returned()
    batches = [{"x": torch.randn(8, 4), "labels": torch.randint(0, 3, (8,))}]
    b = torch.randn(2, 15)
    own = HessianInverter("cg", 0.1, autocast="bfloat16").fit(net, batches).transform(b)
    assert relative_error(own, HessianInverter("cg", 0.1).fit(net, batches).transform(b)) < 1e-4


PLAIN = nn.Linear(2, 2), (torch.randn(4, 2), torch.randn(4, 2))


@pytest.mark.parametrize(
    ("settings", "model", "data", "match"),
    [
        ({"autocast": "float16"}, *PLAIN, "None or 'bfloat16'"),
        ({"autocast": True}, *PLAIN, "None or 'bfloat16'"),
        ({"autocast": "bfloat16", "dtype": torch.float64}, *PLAIN, "must be torch.float32"),
    ],
)
def test_what_has_no_autocast_says_so(settings, model, data, match):
    with pytest.raises(ValueError, match=match):
        HessianInverter("cg", 1.0, loss="mse", **settings).fit(model, data)


def test_a_layer_without_a_kernel_in_bfloat16_says_so():
    net, data = LastState(), (torch.randn(4, 5, 2), torch.randn(4, 3))
    inverter = HessianInverter("cg", 1.0, loss="mse", curvature="ggn")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            net(data[0])
    except RuntimeError:
        with pytest.raises(ValueError, match="must be one that runs in"):
            inverter.set_params(autocast="bfloat16").fit(net, data)
    else:
        # With the kernel that this machine has.
        b = torch.randn(2, sum(t.numel() for t in net.parameters()))
        expected = inverter.fit(net, data).transform(b)
        assert relative_error(inverter.set_params(autocast="bfloat16").fit(net, data).transform(b), expected) < 1e-4


def test_plain_rows_have_no_autocast():
    with pytest.raises(ValueError, match="autocast for plain rows must be None"):
        HessianInverter(autocast="bfloat16").fit(np.eye(3))


def test_lissa_keeps_its_start():
    case, H, shift, _ = fitted("cg", "ggn", "softmax")
    b = case.right_hand_sides(2)
    start = solution(H, shift, b)
    inverter = HessianInverter(LiSSA(h0=start), shift, curvature="ggn", **case.settings(autocast="bfloat16"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x, _ = inverter.set_params(dtype=torch.float32).fit(case.module, case.data).solve(b)
    assert relative_error(x, start) < 1e-5
