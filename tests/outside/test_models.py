"""The table of outside models × methods: right against the twin's dense curvature, or an error that says what to do."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from outside.models import CASES

from skinvert import HessianInverter, PerSampleGradient

LAMBDA = {"direct": 2.0, "cg": 2.0, "ekfac": 0.5}


def gradient(value, theta, **settings):
    parts = torch.autograd.grad(value, theta, allow_unused=True, **settings)
    return torch.cat([(torch.zeros_like(t) if g is None else g).reshape(-1) for g, t in zip(parts, theta, strict=True)])


def twin_of(case):
    twin = copy.deepcopy(case.twin).double().eval()
    X = case.X.double() if case.X.is_floating_point() else case.X
    return twin, [t for t in twin.parameters() if t.requires_grad], X


def hessian(case):
    twin, theta, X = twin_of(case)
    g = gradient(F.cross_entropy(twin(X.clone()), case.y), theta, create_graph=True)
    H = torch.stack([gradient(e, theta, retain_graph=True) for e in g]).detach()
    return (H + H.mT) / 2


def ggn(case):
    twin, theta, X = twin_of(case)
    G = 0.0
    for i in range(len(X)):
        f = twin(X[i : i + 1].clone())
        J = torch.stack([gradient(e, theta, retain_graph=True) for e in f.reshape(-1)]).detach()
        p = f.detach().softmax(-1).reshape(-1)
        G = G + J.mT @ (torch.diag(p) - torch.outer(p, p)) @ J / len(X)
    return G


def attempt(case, method):
    """Fit, solve, and return b, x and the inverter."""
    inverter = HessianInverter(
        method,
        LAMBDA[method],
        curvature="hessian" if method != "ekfac" else "ggn",
        loss=case.loss,
        **(case.settings or {}),
    )
    data = case.X if case.y is None else (case.X, case.y)
    inverter.fit(case.model, data)
    b = torch.from_numpy(np.random.default_rng(0).standard_normal((3, inverter.n_features_in_)))
    return b, inverter.transform(b), inverter


@pytest.mark.parametrize("method", ["direct", "cg", "ekfac"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_right_or_told(name, method):
    torch.manual_seed(0)
    case = CASES[name]()
    try:
        b, x, inverter = attempt(case, method)
    except (ValueError, TypeError) as error:
        assert "must be" in str(error) and ("Try" in str(error) or case.must), error
        if case.must not in (None, "right or told"):
            assert any(word in str(error) for word in case.must.split("|")), error
        # A method may refuse a layer by name; the exact methods refuse nothing that can be served.
        assert case.must is not None or method == "ekfac", error
        return
    # The GGN needs no second derivative of the model.
    assert case.must in (None, "right or told")
    if method != "ekfac":
        expected = torch.linalg.solve(hessian(case) + LAMBDA[method] * torch.eye(len(b[0]), dtype=b.dtype), b.mT).mT
        tolerance = 1e-3 if next(case.model.parameters()).dtype == torch.float32 and not case.settings else 1e-6
        assert float((x - expected).norm() / expected.norm()) < tolerance
    elif case.must is None:
        # Near the exact GGN's, in its own norm; wrong tensors are far.
        A = ggn(case) + LAMBDA[method] * torch.eye(len(b[0]), dtype=b.dtype)
        exact = torch.linalg.solve(A, b.mT).mT
        assert float((x.double() - exact).norm() / exact.norm()) < 0.6
        trace = inverter.curvature_.to_dense().double().trace()
        torch.testing.assert_close(trace, ggn(case).trace(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", [name for name in CASES if name != "coupled rows, first batch of one"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_gradients_are_right_or_told(name):
    torch.manual_seed(0)
    case = CASES[name]()
    settings = dict(case.settings or {})
    try:
        rows = PerSampleGradient(case.model, loss=case.loss, **settings).fit_transform(case.X, case.y)
    except (ValueError, TypeError) as error:
        assert "must be" in str(error) and case.must is not None, error
        return
    twin, theta, X = twin_of(case)
    expected = gradient(F.cross_entropy(twin(X.clone()), case.y), theta)
    torch.testing.assert_close(rows.double().mean(0), expected, rtol=1e-4, atol=1e-6)
