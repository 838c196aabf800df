"""The functional face: InversionRegistry, InversionMethod, solve_hvp and InverseHvpResult."""

import dataclasses

import numpy as np
import pytest
import torch

from skinvert import (
    HessianInverter,
    InverseHvpResult,
    InversionMethod,
    InversionRegistry,
    TorchTwiceDifferentiable,
    TwiceDifferentiable,
    solve_hvp,
)
from skinvert.methods import CG, Direct
from skinvert.methods.base import Method


@pytest.fixture(autouse=True)
def _restored_registry(monkeypatch):
    monkeypatch.setattr(InversionRegistry, "registry", dict(InversionRegistry.registry))


def least_squares():
    """Return a model whose H is the identity, its data and b."""
    model = TorchTwiceDifferentiable(torch.nn.Linear(2, 1, bias=False), "mse")
    return model, (torch.eye(2), torch.zeros(2, 1)), torch.tensor([[3.0, 6.0]])


def solve_by_nothing(model, training_data, b, hessian_perturbation=0.0, factor=1.0):
    return InverseHvpResult(factor * b, {"model": model, "data": training_data, "shift": hessian_perturbation})


class Reciprocal(Method):
    """A user's method class."""

    name = "reciprocal"

    def __init__(self, *, scale=1.0):
        self.scale = scale

    def invert(self, A, hessian_perturbation, verbose=0):
        return Direct().invert(A, hessian_perturbation + self.scale)


# -- InversionMethod and InverseHvpResult ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("member", "name"),
    [("Direct", "direct"), ("Cg", "cg"), ("Lissa", "lissa"), ("Arnoldi", "arnoldi")],
)
def test_inversion_method_is_a_string(member, name):
    assert isinstance(InversionMethod[member], str)
    assert InversionMethod[member] == InversionMethod(name) == name


def test_result_unpacks_as_x_and_info():
    x, info = InverseHvpResult("x", {"converged": True})
    assert (x, info) == ("x", {"converged": True})


def test_result_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        InverseHvpResult("x", {}).x = "y"


# -- register ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mine", InversionMethod.Lissa])
def test_register_returns_the_function_and_get_finds_it(name):
    received = InversionRegistry.register(TorchTwiceDifferentiable, name)(solve_by_nothing)
    assert received is solve_by_nothing
    assert InversionRegistry.get(TorchTwiceDifferentiable, name) is solve_by_nothing


def test_the_member_and_its_name_are_one_key():
    InversionRegistry.register(TwiceDifferentiable, "lissa", overwrite=True)(solve_by_nothing)
    assert InversionRegistry.get(TwiceDifferentiable, InversionMethod.Lissa) is solve_by_nothing


@pytest.mark.parametrize("inverter", [Reciprocal])
def test_register_takes_a_method_class(inverter):
    InversionRegistry.register(TwiceDifferentiable, "mine")(inverter)
    assert InversionRegistry.get(TwiceDifferentiable, "mine") is inverter


@pytest.mark.parametrize(
    ("model_type", "name", "words"),
    [
        ("TwiceDifferentiable", "mine", ("model_type", "must be", "a type", "Got 'TwiceDifferentiable'")),
        (3, "mine", ("model_type", "must be", "a type", "Got 3")),
        (TwiceDifferentiable, 3, ("inversion_method", "must be", "a string", "Got 3")),
        (TwiceDifferentiable, None, ("inversion_method", "must be", "a string", "Got None")),
    ],
)
def test_register_refuses_wrong_types_when_called(model_type, name, words):
    with pytest.raises(TypeError) as error:
        InversionRegistry.register(model_type, name)
    assert all(word in str(error.value) for word in words)


def swapped(model, training_data, hessian_perturbation, b):
    """Wrong order."""


def short(model, training_data, b):
    """Too few parameters."""


def renamed(model, data, b, hessian_perturbation=0.0):
    """A wrong name."""


@pytest.mark.parametrize("function", [swapped, short, renamed, lambda: None])
def test_register_refuses_a_wrong_signature_when_decorating(function):
    decorate = InversionRegistry.register(TwiceDifferentiable, "mine")
    with pytest.raises(ValueError, match=r"must be a function whose first parameters are .*'b'.* Got \("):
        decorate(function)
    with pytest.raises(ValueError, match="'mine'"):
        InversionRegistry.get(TwiceDifferentiable, "mine")


def test_annotations_do_not_matter():
    def annotated(
        model: TwiceDifferentiable,
        training_data: tuple,
        b: torch.Tensor,
        hessian_perturbation: float = 0.0,
        *,
        c: int = 3,
    ) -> InverseHvpResult:
        return InverseHvpResult(b, {})

    assert InversionRegistry.register(TwiceDifferentiable, "mine")(annotated) is annotated


def test_a_taken_pair_warns_and_keeps_the_first():
    with pytest.warns(UserWarning, match=r"'cg' is already registered for TwiceDifferentiable.*overwrite=True"):
        InversionRegistry.register(TwiceDifferentiable, "cg")(solve_by_nothing)
    assert InversionRegistry.get(TwiceDifferentiable, "cg") is CG


def test_overwrite_replaces_without_a_warning():
    InversionRegistry.register(TwiceDifferentiable, "cg", overwrite=True)(solve_by_nothing)
    assert InversionRegistry.get(TwiceDifferentiable, "cg") is solve_by_nothing


# -- get ---------------------------------------------------------------------------------------------------------------


def test_get_prefers_the_nearest_base():
    InversionRegistry.register(TorchTwiceDifferentiable, "cg")(solve_by_nothing)

    class Derived(TorchTwiceDifferentiable):
        pass

    assert InversionRegistry.get(Derived, "cg") is solve_by_nothing
    assert InversionRegistry.get(Derived, "direct") is Direct
    assert InversionRegistry.get(TwiceDifferentiable, "cg") is CG


def test_get_of_an_unknown_name_lists_the_names():
    InversionRegistry.register(TorchTwiceDifferentiable, "mine")(solve_by_nothing)
    with pytest.raises(ValueError) as error:
        InversionRegistry.get(TorchTwiceDifferentiable, "nope")
    for word in ("TorchTwiceDifferentiable", "must be one of", "'auto'", "'cg'", "'direct'", "'mine'", "Got 'nope'"):
        assert word in str(error.value)


@pytest.mark.parametrize(("model_type", "name"), [("nope", "cg"), (TwiceDifferentiable, 3)])
def test_get_refuses_wrong_types(model_type, name):
    with pytest.raises(TypeError, match="must be"):
        InversionRegistry.get(model_type, name)


# -- call and solve_hvp ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["direct", "cg", "auto", InversionMethod.Direct, InversionMethod.Cg])
@pytest.mark.parametrize("solve", [solve_hvp, InversionRegistry.call])
def test_solve_equals_the_closed_form(solve, method):
    model, data, b = least_squares()
    x, info = solve(method, model, data, b, hessian_perturbation=2.0)
    torch.testing.assert_close(x, b / 3.0)
    assert info["converged"].all()


def test_call_takes_the_perturbation_by_position():
    model, data, b = least_squares()
    x, _ = InversionRegistry.call("direct", model, data, b, 2.0)
    torch.testing.assert_close(x, b / 3.0)


def test_solve_hvp_takes_it_by_name_only():
    model, data, b = least_squares()
    with pytest.raises(TypeError, match="positional"):
        solve_hvp("direct", model, data, b, 2.0)


def test_solve_hvp_returns_arrays_for_arrays():
    model, data, b = least_squares()
    x, info = solve_hvp("direct", model, data, b.numpy().astype(np.float64))
    assert (type(x), x.dtype) == (np.ndarray, np.float64)
    assert all(isinstance(info[name], np.ndarray) for name in ("residual", "converged"))


def test_solve_hvp_equals_the_estimator():
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2).double()
    data = (torch.randn(10, 3).double(), torch.randint(0, 2, (10,)))
    b = torch.randn(4, 8).double()
    expected = HessianInverter("direct", 0.1, loss="cross_entropy").fit(net, data).transform(b)
    received = solve_hvp("direct", TorchTwiceDifferentiable(net, "cross_entropy"), data, b, hessian_perturbation=0.1).x
    torch.testing.assert_close(received, expected)


def test_kwargs_are_settings_and_curvature():
    model, data, b = least_squares()
    with pytest.warns(UserWarning, match="did not converge"):
        x, info = solve_hvp("cg", model, (torch.tensor([[1.0, 0.0], [1.0, 3.0]]), data[1]), b, rtol=1e-6, maxiter=1)
    assert info["n_iter"].tolist() == [1]
    # The residuals of the zero targets are θᵀx: another curvature, another answer.
    gradients = 2 * (data[0] @ model.theta[0].detach().T) * data[0]
    expected = torch.linalg.solve(gradients.T @ gradients / 2 + torch.eye(2), b.T).T
    x, _ = solve_hvp("direct", model, data, b, hessian_perturbation=1.0, curvature="empirical_fisher")
    torch.testing.assert_close(x, expected)


def test_a_registered_function_gets_the_arguments_as_they_are():
    InversionRegistry.register(TwiceDifferentiable, "mine")(solve_by_nothing)
    model, data, b = least_squares()
    x, info = solve_hvp("mine", model, data, b, hessian_perturbation=0.5, factor=2.0)
    torch.testing.assert_close(x, 2 * b)
    assert info["model"] is model
    assert info["data"] is data
    assert info["shift"] == 0.5


def test_a_registered_method_class_is_called_with_its_settings():
    InversionRegistry.register(TwiceDifferentiable, "reciprocal")(Reciprocal)
    model, data, b = least_squares()
    x, _ = solve_hvp("reciprocal", model, data, b, scale=2.0)
    torch.testing.assert_close(x, b / 3.0)


# -- names of one's own in the estimator -------------------------------------------------------------------------------


def test_the_estimator_calls_a_function_in_transform():
    calls = []

    @InversionRegistry.register(TwiceDifferentiable, "mine")
    def counted(model, training_data, b, hessian_perturbation=0.0):
        calls.append((type(model), training_data, hessian_perturbation))
        return solve_by_nothing(model, training_data, b, hessian_perturbation)

    _, data, b = least_squares()
    net = torch.nn.Linear(2, 1, bias=False)
    inverter = HessianInverter("mine", 0.5, loss="mse").fit(net, data)
    assert calls == []
    torch.testing.assert_close(inverter.transform(b), b)
    assert calls == [(TorchTwiceDifferentiable, data, 0.5)]


def test_the_estimator_takes_a_registered_class():
    InversionRegistry.register(TwiceDifferentiable, "reciprocal")(Reciprocal)
    X = np.eye(2) * np.sqrt(2)
    received = HessianInverter("reciprocal", 1.0).fit(X).transform(np.array([[3.0, 6.0]]))
    np.testing.assert_allclose(received, [[1.0, 2.0]])


def test_the_estimator_refuses_a_function_for_plain_arrays():
    InversionRegistry.register(TwiceDifferentiable, "mine")(solve_by_nothing)
    with pytest.raises(ValueError, match="method must be a Method for plain arrays. Got the function 'mine'"):
        HessianInverter("mine").fit(np.eye(2))


def test_a_function_has_no_operator():
    InversionRegistry.register(TwiceDifferentiable, "mine")(solve_by_nothing)
    _, data, _ = least_squares()
    fitted = HessianInverter("mine", loss="mse").fit(torch.nn.Linear(2, 1, bias=False), data)
    with pytest.raises(TypeError, match="Use `transform`"):
        fitted.aslinearoperator()


def test_a_lacking_operator_is_named_with_the_curvatures_that_serve():
    class NeedsFactor(Reciprocal):
        requires = ("factor",)

    model, data, b = least_squares()
    InversionRegistry.register(TwiceDifferentiable, "mine")(NeedsFactor)
    with pytest.raises(ValueError, match=r"`factor`. Got Hessian.*\['ggn', 'fisher', 'empirical_fisher'\]"):
        solve_hvp("mine", model, data, b)


# -- one system, whoever asks ------------------------------------------------------------------------------------------

SETTINGS = {
    "a curvature that draws": {"method": "direct", "curvature": "sampled_fisher"},
    "both draw": {"method": "nystroem", "curvature": "sampled_fisher"},
    "a method that draws": {"method": "arnoldi", "rank": 3},
    "weights, batches, parameters": {"method": "cg", "batch_size": 3, "params": "0.*", "weights": True},
    "blocks": {"method": "direct", "blocks": "layer"},
    "another dtype": {"method": "auto", "dtype": "float32"},
    "a method's own curvature": {"method": "ekfac"},
}


@pytest.mark.parametrize("seed", [3, np.random.RandomState], ids=["int", "generator"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_solve_hvp_and_the_estimator_are_one(settings, seed):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    data = (torch.randn(11, 3).double(), torch.randint(0, 2, (11,)))
    settings = dict(settings)
    name, weights = settings.pop("method"), np.arange(1.0, 12) if settings.pop("weights", False) else None
    own = {key: settings[key] for key in ("rank",) if key in settings}
    method = InversionRegistry.get(TwiceDifferentiable, name)(**own)
    shared = {key: value for key, value in settings.items() if key not in own} | {"loss": "cross_entropy"}
    seeds = [seed(7) if callable(seed) else seed for _ in range(2)]
    fitted = HessianInverter(method, 0.5, random_state=seeds[0], **shared).fit(net, data, sample_weight=weights)
    b = torch.randn(2, fitted.n_features_in_).double()
    expected, told = fitted.solve(b)
    drawn = {"random_state": seeds[1]} | settings | {"loss": "cross_entropy", "sample_weight": weights}
    x, info = solve_hvp(name, net, data, b, hessian_perturbation=0.5, **drawn)
    assert torch.equal(x, expected)
    assert torch.equal(info["residual"], told["residual"])
