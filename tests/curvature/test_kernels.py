"""Operations whose own derivatives fail at zeros, or where they are recorded: held against autograd, row by row."""

import pytest
import torch
from oracles import matrix_error
from torch import nn

from skinvert import HessianInverter

N, D, C = 12, 4, 3


class Net(nn.Module):
    def __init__(self, inside):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last, self.inside = nn.Linear(D, D).double(), nn.Linear(D, C).double(), inside

    def forward(self, x):
        return self.last(self.inside(self.first(x)))


def determinant(z):
    # Repeated singular values.
    return (torch.eye(D, dtype=z.dtype) + z[:, :, None] * z[:, None]).det()[:, None] * z


def logcumsumexp(z):
    # Its backward pass takes the logarithm of the gradient.
    return z.logcumsumexp(-1)


def matrices(net, X, y):
    """Return the Hessian and the GGN of the mean cross-entropy, an entry of a gradient after the other."""
    theta = list(net.parameters())

    def rows(values, **kwargs):
        each = [torch.autograd.grad(value, theta, retain_graph=True, **kwargs) for value in values]
        return torch.stack([torch.cat([g.flatten() for g in one]) for one in each])

    f = net(X)
    loss = nn.functional.cross_entropy(f, y)
    gradient = rows([loss], create_graph=True)[0]
    J, p = rows(f.flatten()).reshape(N, C, -1), f.detach().softmax(1)
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    return {"hessian": rows(gradient), "ggn": torch.einsum("ncp,ncd,ndq->pq", J, middle, J) / N}


@pytest.mark.parametrize("inside", [determinant, logcumsumexp])
@pytest.mark.parametrize("curvature", ["hessian", "ggn"])
def test_products_are_those_of_autograd(curvature, inside):
    net, X, y = Net(inside), torch.randn(N, D, dtype=torch.float64), torch.randint(C, (N,))
    expected = matrices(net, X, y)[curvature].detach().numpy()
    A = HessianInverter("diagonal", 1.0, curvature=curvature, loss="cross_entropy", check_residual=False)
    A = A.fit(net, (X, y)).curvature_
    for k in (1, 2, 40):
        V = torch.randn(k, A.size, dtype=torch.float64)
        assert matrix_error(A.apply(V), V.numpy() @ expected) <= 1e-10
    assert matrix_error(A.to_dense(), expected) <= 1e-10
