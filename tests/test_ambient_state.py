"""Answers do not depend on the caller's autograd state: what was computed inside a context is what is outside."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from facts import EVERY, SEMIDEFINITE
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from torch import nn

from skinvert import (
    HessianInverter,
    HessianInverterCV,
    PerSampleGradient,
    TorchTwiceDifferentiable,
    make_quadratic_scorer,
    solve_hvp,
)

N, P = 24, 27


@contextmanager
def grad_disabled():
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    yield
    torch.set_grad_enabled(before)


@contextmanager
def float64_default():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


CONTEXTS = {
    "no_grad": torch.no_grad,
    "grad_disabled": grad_disabled,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64_default": float64_default,
}


def net():
    generator = torch.Generator().manual_seed(3)
    module = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).float()
    for tensor in module.parameters():
        tensor.data = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
    return module


def data():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(N, 4, generator=generator, dtype=torch.float32), torch.randint(3, (N,), generator=generator)


def rows(k=2):
    return torch.randn(k, P, generator=torch.Generator().manual_seed(7), dtype=torch.float32)


def hvp_by_hand(module, X, y, V):
    """Return the rows V times the Hessian of the mean cross-entropy, in float64."""
    theta = [t.detach().double() for t in module.parameters()]

    def loss(*parameters):
        a, b, c, d = parameters
        hidden = torch.tanh(X.double() @ a.T + b)
        return nn.functional.cross_entropy(hidden @ c.T + d, y)

    sizes = [t.numel() for t in theta]
    H = torch.autograd.functional.hessian(loss, tuple(theta))
    H = torch.cat([torch.cat([H[i][j].reshape(sizes[i], -1) for j in range(4)], dim=1) for i in range(4)])
    return V.double() @ H


def fitted(method="direct", curvature="hessian", **settings):
    settings = {"loss": "cross_entropy", "random_state": 0, **settings}
    return HessianInverter(method, 2.0, curvature=curvature, **settings).fit(net(), data())


def solved(name):
    return fitted(name, SEMIDEFINITE[name]).transform(rows())


# What a user calls, each on freshly made inputs.
CALLS = {
    **{name: partial(solved, name) for name in EVERY},
    "of the hessian": lambda: fitted().transform(rows()),
    "solve": lambda: fitted("cg").solve(rows()).x,
    "ggn": lambda: fitted("cg", "ggn").transform(rows()),
    "fisher": lambda: fitted("direct", "fisher").transform(rows()),
    "empirical_fisher": lambda: fitted("cg", "empirical_fisher").transform(rows()),
    "callable": lambda: fitted(loss=lambda f, y: nn.functional.cross_entropy(f, y)).transform(rows()),
    "blocks": lambda: fitted("cg", blocks="layer").transform(rows()),
    "path": lambda: fitted().path(rows(), [1.0, 2.0]),
    "spectrum": lambda: fitted().spectrum().eigenvalues,
    "score": lambda: fitted("direct", "ggn").score(data()),
    "inverse_transform": lambda: fitted().inverse_transform(rows()),
    "residual": lambda: fitted().residual(rows(), rows()),
    "aslinearoperator": lambda: fitted().aslinearoperator() @ rows()[0].numpy(),
    "curvature_.apply": lambda: fitted().curvature_.apply(rows()),
    "curvature_.aslinearoperator": lambda: fitted().curvature_.aslinearoperator() @ rows()[0].numpy(),
    "curvature_.to_dense": lambda: fitted("direct", "ggn").curvature_.to_dense(),
    "curvature_.factor_chunks": lambda: next(fitted("direct", "ggn").curvature_.factor_chunks()),
    "inverse_.solve": lambda: fitted("cg").inverse_.solve(rows()).x,
    "gram": lambda: HessianInverter("direct", 1.0).fit_transform(data()[0]),
    "gradients": lambda: PerSampleGradient(net(), loss="cross_entropy").fit(*data()).transform(data()),
    "solve_hvp": lambda: solve_hvp("cg", adapted(), data(), rows(), hessian_perturbation=2.0).x,
    "grad": lambda: adapted().grad(*data()),
    "hessian": lambda: adapted().hessian(*data()),
    "mvp": lambda: mvp(adapted()),
    "cv": lambda: searched().transform(rows()),
    "grid": lambda: grid().cv_results_["mean_test_score"],
    "sklearn": lambda: of_sklearn().transform(rows(1)[:, :5].double()),
}


def adapted():
    return TorchTwiceDifferentiable(net(), "cross_entropy")


def mvp(model):
    return model.mvp(model.grad(*data(), create_graph=True), rows(), model.parameters)


def searched():
    inverter = HessianInverterCV([1.0, 2.0], method="direct", curvature="ggn", loss="cross_entropy", cv=2)
    return inverter.fit(net(), data())


def grid():
    inverter = HessianInverter("direct", curvature="ggn", model=net(), loss="cross_entropy")
    search = GridSearchCV(inverter, {"hessian_perturbation": [0.5, 1.0]}, cv=2, scoring=make_quadratic_scorer())
    X, y = (t.numpy() for t in data())
    return search.fit(X, y)


def of_sklearn():
    X, y = (t.numpy() for t in data())
    model = LogisticRegression().fit(X, y > 0)
    return HessianInverter("cg", 0.1).fit(model, (X, y > 0))


@pytest.fixture(scope="module")
def outside():
    found = {}
    return lambda call: found.setdefault(call, CALLS[call]())


@pytest.mark.one_in(3)
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("call", CALLS)
def test_everything_is_made_and_called_inside(call, context, outside):
    expected = outside(call)
    with CONTEXTS[context]():
        received = CALLS[call]()
    received, expected = torch.as_tensor(received), torch.as_tensor(expected)
    # Of a tensor that skinvert made: inference mode would show in it.
    assert not received.is_inference()
    torch.testing.assert_close(received.double(), expected.double(), rtol=1e-5, atol=1e-6)


def test_the_calls_outside_are_right(outside):
    # What the others are held against: one product with the Hessian, by a closed form of the network.
    expected = hvp_by_hand(net(), *data(), rows())
    torch.testing.assert_close(outside("curvature_.apply").double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["direct", "cg", "ekfac"])
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_fit_outside_serves_inside(method, context):
    inverter = fitted(method, "ggn")
    expected = inverter.transform(rows())
    with CONTEXTS[context]():
        torch.testing.assert_close(inverter.transform(rows()), expected, rtol=1e-6, atol=1e-7)


def test_a_fit_inside_serves_outside():
    with torch.inference_mode():
        inverter = fitted("cg", params="2.*")
    torch.testing.assert_close(inverter.transform(rows()[:, :12]), fitted("cg", params="2.*").transform(rows()[:, :12]))


@pytest.mark.parametrize("context", ["no_grad", "inference_mode", "autocast"])
def test_the_state_is_the_caller_s_again(context):
    with CONTEXTS[context]():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        for step in fitted("direct", "ggn").curvature_.factor_chunks():
            after = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
            assert after == before, step.shape


def test_a_failure_leaves_the_state_too():
    with torch.no_grad():
        with pytest.raises(ValueError, match="b must be"):
            fitted().transform(rows()[:, :3])
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("state", [torch.no_grad, nullcontext])
def test_in_a_thread(state):
    def work():
        with state():
            return fitted("cg").transform(rows())

    with ThreadPoolExecutor(2) as pool:
        for received in [job.result() for job in [pool.submit(work), pool.submit(work)]]:
            torch.testing.assert_close(received, fitted("cg").transform(rows()))


def test_the_user_s_functions_see_gradients():
    seen = []

    class Seeing(TorchTwiceDifferentiable):
        def outputs(self, module, batch):
            seen.append(torch.is_grad_enabled() and not torch.is_inference_mode_enabled())
            return super().outputs(module, batch)

    with torch.inference_mode():
        HessianInverter("cg", 1.0).fit(Seeing(net(), "cross_entropy"), data())
    assert seen[0]


def test_inference_buffers_and_frozen_weights():
    def build():
        module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)).float()
        for i, tensor in enumerate(module.state_dict().values()):
            if tensor.is_floating_point():
                tensor.copy_(torch.linspace(0.5, 1.5 + i, tensor.numel()).reshape(tensor.shape))
        module[0].requires_grad_(False)
        return module

    def solved():
        inverter = HessianInverter("cg", 1.0, curvature="ggn", loss="cross_entropy").fit(build(), data())
        return inverter.transform(rows()[:, :18])

    expected = solved()
    with torch.inference_mode():
        inside = solved()
        module = build()
    torch.testing.assert_close(inside, expected)
    weight = module[0].weight
    HessianInverter("cg", 1.0, loss="cross_entropy").fit(module, data())
    assert module[0].weight is weight
    assert np.isclose(float(weight[0, 0]), 0.5)


@pytest.mark.parametrize(
    ("method", "curvature"),
    [
        *SEMIDEFINITE.items(),
        *[(name, "hessian") for name in ("direct", "cg")],
        ("diagonal", "empirical_fisher"),
    ],
)
def test_the_default_device_is_the_user_s_own(method, curvature):
    # As `torch.set_default_device("cuda")` for a model on the CPU: nothing of ours may follow it.
    module, batch, b = net(), data(), rows()
    settings = {"curvature": curvature, "loss": "cross_entropy", "random_state": 0}
    expected = HessianInverter(method, 2.0, **settings).fit(module, batch).solve(b).x
    torch.set_default_device("meta")
    try:
        received = HessianInverter(method, 2.0, **settings).fit(module, batch).solve(b).x
    finally:
        torch.set_default_device(None)
    torch.testing.assert_close(received, expected)
