"""What was mistaken for what: each error says what came and what to try, and settings do what they say."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from skinvert import (
    HessianInverter,
    HessianInverterCV,
    InverseHvpResult,
    PerSampleGradient,
    SharedModel,
    TorchTwiceDifferentiable,
    TwiceDifferentiable,
    load,
    solve_hvp,
)
from skinvert._check import all_finite, finite_rows
from skinvert.methods import CG, advice
from skinvert.operators import DiagonalMatrix


def problem(dtype=torch.float64):
    torch.manual_seed(0)
    net = nn.Linear(3, 2).to(dtype)
    return net, torch.randn(20, 3, dtype=dtype), torch.randint(0, 2, (20,))


def fitted(**settings):
    net, X, y = problem()
    return HessianInverter("direct", 0.1, loss="cross_entropy", **settings).fit(net, (X, y))


def parts_of_a_gradient():
    net, X, y = problem()
    return torch.autograd.grad(nn.functional.cross_entropy(net(X), y), list(net.parameters()))


# -- fit -----------------------------------------------------------------------------------------------------------

NET, INPUTS, LABELS = problem()
LOADER = DataLoader(TensorDataset(INPUTS, LABELS))


@pytest.mark.parametrize("kind", [HessianInverter, HessianInverterCV])
@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (((INPUTS, LABELS), NET), r"must be the model. Got a tuple, and the model second.*`fit\(model, \(X, y\)\)`"),
        ((LOADER, NET), "Got a DataLoader, and the model second"),
        ((INPUTS, NET), "Got a Tensor, and the model second"),
        (((INPUTS, LABELS), LogisticRegression()), "and the model second"),
        ((nn.functional.relu, (INPUTS, LABELS)), "model must be a torch.nn.Module, an init.*Got a function"),
        ((lambda x: x,), "model must be a torch.nn.Module, an init.*Got a function.*Wrap a function"),
        ((NET.state_dict(), (INPUTS, LABELS)), "Got a OrderedDict.*`state_dict` holds tensors alone"),
        (("net.pt", (INPUTS, LABELS)), "Got a str instead. Load it first"),
        ((None, (INPUTS, LABELS)), "Got a NoneType"),
        ((nn.Linear, (INPUTS, LABELS)), "the class Linear instead. Try an instance"),
        (((INPUTS, LABELS),), r"must be a model, or plain rows \(n, p\). Got data, a tuple.*`fit\(model, data\)`"),
        ((LOADER,), "Got data, a DataLoader"),
        ((LOADER.dataset,), "Got data, a TensorDataset"),
    ],
)
def test_what_fit_was_given(kind, arguments, match):
    with pytest.raises(TypeError, match=match):
        kind(loss="cross_entropy").fit(*arguments)


@pytest.mark.parametrize("settings", [{"loss": "cross_entropy"}, {"weight_decay": 0.1}, {"params": "fc.*"}])
def test_settings_of_a_model_that_was_forgotten(settings):
    with pytest.raises(ValueError, match="for plain rows must be .* is `model=` missing"):
        HessianInverter(**settings).fit(np.eye(3), np.arange(3))


def test_one_perturbation_is_no_path():
    with pytest.raises(TypeError, match="must be several λ. Got 1.0 instead. Try a list"):
        fitted().path(np.ones((1, 8)), 1.0)


@pytest.mark.parametrize("path", [None, 3, b"x", open])
def test_a_path_that_is_none(path):
    for call in (load, fitted().save):
        with pytest.raises(TypeError, match="path must be a str or a Path"):
            call(path)


def test_a_model_given_to_gradients():
    for arguments in ((NET, (INPUTS, LABELS)), ((INPUTS, LABELS), NET)):
        with pytest.raises(TypeError, match=r"must be \(X, y\). Got a Linear.*The model is a setting"):
            PerSampleGradient(loss="cross_entropy").fit(*arguments)


@pytest.mark.parametrize("kind", [HessianInverter, lambda method, *rest: HessianInverterCV(method=method)])
def test_a_model_in_the_place_of_the_method(kind):
    for method, rest in ((NET, "cross_entropy"), (LogisticRegression(), 0.1), (SharedModel(NET), 0.1)):
        with pytest.raises(
            TypeError, match=r"method must be a .*Got a model, a .*`HessianInverter\(loss=...\).fit\(model"
        ):
            kind(method, rest).fit(NET, (INPUTS, LABELS))
    with pytest.raises(TypeError, match=r"Try an instance of it: `CG\(\)`"):
        kind(CG).fit(NET, (INPUTS, LABELS))


@pytest.mark.parametrize("where", ["fit", "setting", "pipeline", "gradients", "solve_hvp"])
@pytest.mark.parametrize("fit", [True, False])
def test_a_search_is_no_model(where, fit):
    net, X, y = (part.numpy() if isinstance(part, torch.Tensor) else part for part in problem())
    search = GridSearchCV(LogisticRegression(), {"C": [1.0, 2.0]}, cv=2)
    search = search.fit(X, y) if fit else search
    calls = {
        "fit": lambda: HessianInverter().fit(search, (X, y)),
        "setting": lambda: HessianInverter(model=search).fit(X, y),
        "pipeline": lambda: HessianInverter().fit(make_pipeline(StandardScaler(), search), (X, y)),
        "gradients": lambda: PerSampleGradient(search).fit(X, y),
        "solve_hvp": lambda: solve_hvp("cg", search, (X, y), np.ones((1, 8))),
    }
    with pytest.raises(TypeError, match=r"Got a GridSearchCV, a search for one instead. Try its `.best_estimator_`"):
        calls[where]()
    if fit:
        HessianInverter(hessian_perturbation=0.1).fit(search.best_estimator_, (X, y))


class OfItsOwn(TwiceDifferentiable):
    """½‖θ‖², which has neither parameters to select nor a dtype to choose."""

    num_params = 2
    parameters = (torch.ones(2, requires_grad=True),)

    def grad(self, x, y, create_graph=False):
        return self.parameters[0] * 1.0

    def hessian(self, x, y):
        return torch.eye(2)

    @staticmethod
    def mvp(grad_xy, v, backprop_on, *, progress=False):
        return v

    @classmethod
    def tensor_type(cls):
        return torch.Tensor


@pytest.mark.parametrize("setting", [{"params": "x"}, {"dtype": torch.float64}, {"device": "cpu"}])
def test_settings_that_a_model_cannot_follow_are_not_dropped(setting):
    (name,) = setting
    data = (torch.ones(3, 1), torch.ones(3))
    with pytest.raises(ValueError, match=f"{name} must be None for a OfItsOwn"):
        HessianInverter("direct", **setting).fit(OfItsOwn(), data)
    with pytest.raises(ValueError, match=f"{name} must be None for a OfItsOwn"):
        solve_hvp("direct", OfItsOwn(), data, torch.ones(1, 2), **setting)


def test_a_model_without_forward_passes_has_no_autocast():
    inverter = HessianInverter("cg", 1.0, autocast="bfloat16")
    with pytest.raises(ValueError, match="The model for autocast must be a PyTorch module"):
        inverter.fit(OfItsOwn(), (torch.ones(3, 1), torch.ones(3)))


# -- λ -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1e39, 1e-39, 1e-46, 1e-320])
def test_a_shift_that_the_dtype_cannot_hold(shift):
    net, X, y = problem(torch.float32)
    b = torch.ones(1, 8)
    match = r"hessian_perturbation must be 0 or in the range \[1.18e-38, 3.4e\+38\] of torch.float32.*torch.float64"
    inverter = HessianInverter("direct", shift, loss="cross_entropy", curvature="ggn")
    with pytest.raises(ValueError, match=match):
        inverter.fit(net, (X, y))
    with pytest.raises(ValueError, match=match):
        inverter.set_params(hessian_perturbation=0.1).fit(net, (X, y)).path(b, [0.1, shift])
    with pytest.raises(ValueError, match=match):
        solve_hvp("cg", TorchTwiceDifferentiable(net, "cross_entropy"), (X, y), b, hessian_perturbation=shift)
    with pytest.raises(ValueError, match=match):
        HessianInverterCV([0.1, shift], loss="cross_entropy", curvature="ggn").fit(net, (X, y))


def test_float64_holds_it():
    net, X, y = problem()
    x = HessianInverter("direct", 1e39, loss="cross_entropy").fit(net, (X, y)).transform(torch.ones(1, 8).double())
    torch.testing.assert_close(x * 1e39, torch.ones(1, 8).double())


# -- right-hand sides ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("face", ["transform", "solve", "path", "solve_hvp"])
@pytest.mark.parametrize("form", ["tuple", "list", "dict", "values", "generator", "parameters", "module", "rows"])
def test_parts_in_the_place_of_rows(face, form):
    inverter, parts = fitted(), parts_of_a_gradient()
    net, X, y = problem()
    b = {
        "tuple": lambda: parts,
        "list": lambda: [part.numpy() for part in parts],
        "dict": lambda: dict(zip(inverter.parameter_names_, parts, strict=True)),
        "values": lambda: dict(enumerate(parts)).values(),
        "module": lambda: nn.ParameterList(parts),
        "generator": lambda: net.parameters(),
        "parameters": lambda: list(net.parameters()),
        "rows": lambda: [torch.ones(8), torch.ones(8)],
    }[form]()
    with pytest.raises(TypeError, match=r"b must be an array or tensor.*`inverter.flatten\(...\)`.*`torch.stack"):
        {
            "transform": inverter.transform,
            "solve": inverter.solve,
            "path": lambda b: inverter.path(b, [0.1]),
            "solve_hvp": lambda b: solve_hvp("direct", TorchTwiceDifferentiable(net, "cross_entropy"), (X, y), b),
        }[face](b)


def test_lists_of_rows_are_rows():
    inverter = fitted()
    expected = inverter.transform(np.ones((2, 8)))
    for b in ([[1.0] * 8] * 2, [np.ones(8)] * 2, (np.ones(8), np.ones(8))):
        np.testing.assert_array_equal(inverter.transform(b), expected)


def test_flatten_takes_a_gradient_as_torch_returns_it():
    inverter, parts = fitted(), parts_of_a_gradient()
    expected = torch.cat([part.reshape(-1) for part in parts])[None]
    named = dict(zip(inverter.parameter_names_, parts, strict=True))
    for form in (parts, list(parts), iter(parts), named, named.values()):
        assert torch.equal(inverter.flatten(form), expected)
    arrays = inverter.flatten([part.tolist() for part in parts])
    np.testing.assert_array_equal(arrays, expected.numpy())
    with pytest.raises(ValueError, match="or as many values. Got 1 values"):
        inverter.flatten(parts[:1])
    with pytest.raises(ValueError, match=r"missing \['bias'\]"):
        inverter.flatten((parts[0], None))
    with pytest.raises(TypeError, match="Got a Tensor"):
        inverter.flatten(expected)


def test_a_result_is_a_pair():
    x, info = result = fitted().solve(np.ones((2, 8)))
    assert len(result) == 2
    assert result[0] is result[-2] is x
    assert result[1] is result[np.int64(1)] is info
    assert result[:] == (x, info)
    with pytest.raises(IndexError):
        result[2]
    with pytest.raises(TypeError, match=r"Try `.info\['residual'\]`"):
        result["residual"]
    with pytest.raises(TypeError, match="Rows of x are those of `.x`"):
        InverseHvpResult(x, info)[:, 0]


@pytest.mark.parametrize("form", [np.asarray, lambda v: v.tolist(), lambda v: v.float()])
def test_mvp_takes_any_rows(form):
    net, X, y = problem()
    model = TorchTwiceDifferentiable(net, "cross_entropy")
    gradient = model.grad(X, y, create_graph=True)
    v = torch.randn(3, 8).double()
    received = model.mvp(gradient, form(v), model.parameters)
    torch.testing.assert_close(received, v @ model.hessian(X, y), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("v", "match"), [(np.ones(8), r"try `v.reshape\(1, -1\)`"), (np.ones((2, 7)), r"\(2, 7\)")])
def test_mvp_refuses_other_shapes(v, match):
    net, X, y = problem()
    model = TorchTwiceDifferentiable(net, "cross_entropy")
    with pytest.raises(ValueError, match=r"v must be of shape \(d, 8\).*" + match):
        model.mvp(model.grad(X, y, create_graph=True), v, model.parameters)


# -- solve_hvp -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 3},
        {"random_state": 0},
        {"sample_weight": np.arange(20.0)},
        {"params": "weight"},
        {"dtype": torch.float32},
        {"device": "cpu", "verbose": 0},
        {"curvature": "ggn", "sample_weight": np.arange(20.0), "batch_size": 7},
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["direct", "cg", "arnoldi"])
def test_settings_of_the_curvature(method, settings):
    net, X, y = problem()
    own = {name: value for name, value in settings.items() if name != "sample_weight"}
    inverter = HessianInverter(method, 0.1, loss="cross_entropy", **own)
    inverter.fit(net, (X, y), sample_weight=settings.get("sample_weight"))
    b = torch.ones(1, inverter.n_features_in_, dtype=torch.float64)
    model = TorchTwiceDifferentiable(net, "cross_entropy")
    received = solve_hvp(method, model, (X, y), b, hessian_perturbation=0.1, **settings)
    torch.testing.assert_close(received.x, inverter.transform(b), rtol=1e-6, atol=1e-6)


def test_a_bare_module_takes_its_loss_and_penalty():
    net, X, y = problem()
    settings = {"loss": "cross_entropy", "weight_decay": {"bias": 0.5}}
    expected = HessianInverter("direct", 0.1, **settings).fit(net, (X, y)).transform(torch.ones(1, 8).double())
    received = solve_hvp("direct", net, (X, y), torch.ones(1, 8).double(), hessian_perturbation=0.1, **settings).x
    torch.testing.assert_close(received, expected)


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        ("regularization", "hessian_perturbation"),
        ("hessian_regularization", "hessian_perturbation"),
        ("dampen", "hessian_perturbation"),
        ("damping", "hessian_perturbation"),
        ("rank_estimate", "rank"),
        ("progress", "verbose"),
        ("max_iterations", "maxiter"),
        ("seed", "random_state"),
    ],
)
def test_other_libraries_words_are_mapped(setting, hint):
    model = TorchTwiceDifferentiable(NET, "cross_entropy")
    match = rf"A setting of 'arnoldi' must be one of .*'complement', 'curvature'.*Got '{setting}'.*Try `{hint}`"
    with pytest.raises(TypeError, match=match):
        solve_hvp("arnoldi", model, (INPUTS, LABELS), torch.ones(1, 8), **{setting: 1})


def test_a_word_that_the_method_has_no_use_for_is_not_suggested():
    model = TorchTwiceDifferentiable(NET, "cross_entropy")
    with pytest.raises(TypeError, match="Got 'rank_estimate' instead.$"):
        solve_hvp("cg", model, (INPUTS, LABELS), torch.ones(1, 8), rank_estimate=3)


@pytest.mark.parametrize("setting", [{"loss": "mse"}, {"weight_decay": 0.5}])
def test_a_loss_beside_a_model_s_own_is_told_as_given(setting):
    model = TorchTwiceDifferentiable(NET, "cross_entropy")
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"{name} must be left at its default. Got {value!r}.*brings its own"):
        solve_hvp("cg", model, (INPUTS, LABELS), torch.ones(1, 8), **setting)


# -- gradients -----------------------------------------------------------------------------------------------------


class Arrays(Dataset):
    """Items as arrays, which a loader turns into tensors."""

    def __len__(self):
        return len(LABELS)

    def __getitem__(self, i):
        return INPUTS[i].numpy(), int(LABELS[i])


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (TensorDataset(INPUTS, LABELS), torch.Tensor),
        (LOADER, torch.Tensor),
        ([(INPUTS[:9], LABELS[:9]), (INPUTS[9:], LABELS[9:])], torch.Tensor),
        ((INPUTS, LABELS), torch.Tensor),
        ((INPUTS, LABELS.numpy()), torch.Tensor),
        (DataLoader(Arrays(), batch_size=6), torch.Tensor),
        (Arrays(), np.ndarray),
        ((INPUTS.numpy(), LABELS.numpy()), np.ndarray),
        ([(INPUTS.numpy(), LABELS.numpy())], np.ndarray),
    ],
)
def test_tensors_give_tensors(data, kind):
    transformer = PerSampleGradient(NET, loss="cross_entropy").fit(INPUTS, LABELS)
    received = transformer.transform(data)
    assert isinstance(received, kind)
    np.testing.assert_allclose(received, transformer.transform((INPUTS, LABELS)).numpy(), rtol=1e-12)


def test_targets_may_be_a_second_argument():
    transformer = PerSampleGradient(NET, loss="cross_entropy").fit(INPUTS, LABELS)
    assert torch.equal(transformer.transform(INPUTS, LABELS), transformer.transform((INPUTS, LABELS)))


@pytest.mark.parametrize("X", [INPUTS, INPUTS.numpy()])
def test_rows_without_targets_are_told_so(X):
    transformer = PerSampleGradient(NET, loss="cross_entropy").fit(INPUTS, LABELS)
    match = r"data must be \(X, y\). Got X of shape \(20, 3\) alone.*`transform\(\(X, y\)\)`"
    for call in (transformer.fit, transformer.fit_transform, transformer.transform):
        with pytest.raises(TypeError, match=match):
            call(X)


def test_a_model_is_a_setting_of_the_gradients():
    with pytest.raises(TypeError, match=r"`PerSampleGradient\(model, loss=...\).fit\(X, y\)`"):
        PerSampleGradient().fit(NET, (INPUTS, LABELS))


# -- advice --------------------------------------------------------------------------------------------------------


def test_direct_is_advised_where_it_fits(monkeypatch):
    A = DiagonalMatrix(torch.ones(100))
    assert advice.advise(A, "a", "b") == 'Try a, b, or method="direct".'
    monkeypatch.setattr(advice, "available_memory", lambda device: 6 * 100**2 * 4)
    assert advice.advise(A, "a", "b") == "Try a, or b."
    assert advice.advise(A, "a") == "Try a."


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_numbers_whose_sum_overflows_are_finite(dtype):
    largest = torch.full((4,), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(largest) and all_finite(torch.empty(0, 3, dtype=dtype))
    for bad in (torch.nan, torch.inf, -torch.inf):
        assert not all_finite(torch.tensor([1.0, bad, 2.0], dtype=dtype))
    assert not all_finite(torch.tensor([torch.inf, -torch.inf], dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_are_finite(dtype):
    largest = torch.finfo(dtype).max
    rows = [[largest, largest], [-largest, 1.0], [torch.inf, 1.0], [torch.inf, -torch.inf], [1.0, torch.nan]]
    assert finite_rows(torch.tensor(rows, dtype=dtype)).tolist() == [True, True, False, False, False]
    assert finite_rows(torch.empty(0, 3, dtype=dtype)).tolist() == []
    assert finite_rows(torch.empty(2, 0, dtype=dtype)).tolist() == [True, True]
