"""Solutions in autograd's graph: the derivative of A⁻¹b by b is A⁻¹, against a dense inverse."""

import numpy as np
import pytest
import torch
from facts import APPROXIMATE, EXACT, SEMIDEFINITE, TIGHT
from torch import nn

from skinvert import HessianInverter, InverseHvpResult, InversionRegistry, TorchTwiceDifferentiable, solve_hvp

# Of `torch.func`'s own forward mode.
FORWARD_MODE = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
LAMBDA = 0.2


def problem():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    X, y = torch.randn(20, 3, dtype=torch.float64), torch.randint(0, 2, (20,))
    b = torch.randn(3, 14, dtype=torch.float64)
    return net, (X, y), b


def fitted(method="direct", **settings):
    net, data, _ = problem()
    return HessianInverter(method, LAMBDA, **{"loss": "cross_entropy", "curvature": "ggn", **settings}).fit(net, data)


def dense(shift=LAMBDA):
    """Return A, by J of one backward pass for each output and the softmax's own Hessian."""
    net, (X, _), _ = problem()
    H = torch.zeros(14, 14, dtype=torch.float64)
    for x in X:
        f = net(x[None])[0]
        rows = [torch.autograd.grad(each, list(net.parameters()), retain_graph=True) for each in f]
        J = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])
        prob = f.softmax(0).detach()
        H += J.T @ (prob.diag() - prob[:, None] * prob) @ J / len(X)
    return H + shift * torch.eye(14, dtype=torch.float64)


@pytest.mark.parametrize("method", EXACT)
def test_the_gradient_through_transform_is_a_solve(method):
    _, _, b = problem()
    b.requires_grad_()
    weights = torch.randn(3, 14, dtype=torch.float64)
    x = fitted(TIGHT[method]).transform(b)
    received = torch.autograd.grad((weights * x.square()).sum(), b)[0]
    A = dense()
    solution = torch.linalg.solve(A, b.detach().T).T
    expected = torch.linalg.solve(A, (2 * weights * solution).T).T
    # Of a method with fewer digits, by as many as it lacks.
    less = TIGHT[method].accuracy / 1e-8
    torch.testing.assert_close(x.detach(), solution, rtol=1e-6 * less, atol=1e-8 * less)
    torch.testing.assert_close(received, expected, rtol=1e-5 * less, atol=1e-7 * less)


@pytest.mark.parametrize("method", APPROXIMATE)
def test_an_approximate_inverse_is_differentiated_as_it_is(method):
    _, _, b = problem()
    # The residual of an approximation may be large: its derivative is what counts here.
    inverter = fitted(method, curvature=SEMIDEFINITE[method])
    assert torch.autograd.gradcheck(inverter.transform, (b[:1].requires_grad_(),))


def test_second_derivatives_and_solve_s_own_x():
    inverter, b = fitted(), problem()[2][:1]
    assert torch.autograd.gradcheck(lambda rows: inverter.solve(rows).x, (b.requires_grad_(),))
    assert torch.autograd.gradgradcheck(lambda rows: inverter.transform(rows).square(), (b,))


def test_paths_and_products_are_differentiable():
    inverter, b = fitted(), problem()[2][:1]
    b.requires_grad_()
    assert torch.autograd.gradcheck(lambda rows: inverter.path(rows, [0.1, 1.0]), (b,))
    assert torch.autograd.gradgradcheck(lambda rows: inverter.path(rows, [0.1, 1.0]).square(), (b,))
    received = torch.autograd.grad(inverter.inverse_transform(b).square().sum() / 2, b)[0]
    torch.testing.assert_close(received, b.detach() @ dense() @ dense())
    inverter.path(b, []).sum().backward()
    assert not b.grad.any()


@FORWARD_MODE
def test_torch_func_sees_the_map():
    inverter, (_, _, b) = fitted(), problem()
    inverse = torch.linalg.inv(dense())
    expected = torch.einsum("ij,pq->ipjq", torch.eye(3, dtype=torch.float64), inverse)
    torch.testing.assert_close(torch.func.jacrev(inverter.transform)(b), expected)
    torch.testing.assert_close(torch.func.jacfwd(inverter.transform)(b), expected)
    several = torch.stack([b, 2 * b])
    torch.testing.assert_close(torch.func.vmap(inverter.transform)(several), several @ inverse)
    received = torch.func.vmap(lambda rows: inverter.path(rows, [0.1, 1.0]))(several)
    torch.testing.assert_close(received[1, 0], 2 * b @ torch.linalg.inv(dense(0.1)))


def test_a_hypergradient():
    # d/ds of a validation loss at θ*(s): −g_valᵀ A⁻¹ ∂g/∂s, with the training gradient s·g.
    net, (X, y), _ = problem()
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    inverter = fitted()
    loss = nn.functional.cross_entropy(net(X), y)
    g = torch.cat([part.reshape(-1) for part in torch.autograd.grad(loss, list(net.parameters()))])[None]
    value = (inverter.transform(scale * g) * g).sum()
    value.backward()
    assert scale.grad.item() == pytest.approx((g @ torch.linalg.inv(dense()) @ g.T).item(), rel=1e-8)


def test_no_graph_without_gradients():
    inverter, (_, _, b) = fitted(), problem()
    assert not inverter.transform(b).requires_grad
    b.requires_grad_()
    with torch.no_grad():
        assert not inverter.transform(b).requires_grad
    with torch.inference_mode():
        x = inverter.transform(b)
    assert not x.requires_grad
    assert not x.is_inference()
    info = inverter.solve(b).info
    assert not any(value.requires_grad for value in info.values() if isinstance(value, torch.Tensor))


def test_the_dtype_of_b_is_that_of_its_gradient():
    inverter, (_, _, b) = fitted(), problem()
    b = b.float().requires_grad_()
    inverter.transform(b).sum().backward()
    assert b.grad.dtype == torch.float32


def test_the_functional_face_is_differentiable():
    net, data, b = problem()
    model, b = TorchTwiceDifferentiable(net, "cross_entropy"), b.requires_grad_()
    x, info = solve_hvp("cg", model, data, b, hessian_perturbation=LAMBDA, curvature="ggn")
    received = torch.autograd.grad(x.sum(), b)[0]
    expected = torch.linalg.solve(dense(), torch.ones(14, 3, dtype=torch.float64)).T
    torch.testing.assert_close(received, expected, rtol=1e-6, atol=1e-8)
    assert info["converged"].all()


def test_a_function_of_one_s_own_is_differentiated_as_symmetric():
    @InversionRegistry.register(TorchTwiceDifferentiable, "a third", overwrite=True)
    def third(model, training_data, b, hessian_perturbation=0.0):
        assert not (isinstance(b, torch.Tensor) and b.requires_grad)
        return InverseHvpResult(b / 3, {})

    net, data, b = problem()
    inverter = HessianInverter("a third", loss="cross_entropy").fit(net, data)
    received = torch.autograd.grad(inverter.transform(b.requires_grad_()).sum(), b)[0]
    torch.testing.assert_close(received, torch.full_like(b, 1 / 3))
    np.testing.assert_array_equal(inverter.transform(np.ones((1, 14))), np.ones((1, 14)) / 3)


def test_a_function_that_returns_no_result_is_told():
    @InversionRegistry.register(TorchTwiceDifferentiable, "bare", overwrite=True)
    def bare(model, training_data, b, hessian_perturbation=0.0):
        return b

    net, data, b = problem()
    with pytest.raises(TypeError, match="must be an InverseHvpResult. Got a Tensor"):
        HessianInverter("bare", loss="cross_entropy").fit(net, data).transform(b)
