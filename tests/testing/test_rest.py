"""The kit for operators, curvatures, losses and inverters, and faults that each must tell."""

import pytest
import torch
from torch import nn

from skinvert import HessianInverter, InverseHvpResult
from skinvert.curvature import CURVATURES
from skinvert.models import DiagonalHessian, Loss
from skinvert.operators import Dense, DiagonalMatrix, LowRank
from skinvert.testing import check_curvature, check_inverter, check_loss, check_operator, registered_methods


@pytest.mark.parametrize("name", list(CURVATURES))
def test_curvatures(name):
    check_curvature(name)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("method", registered_methods().values(), ids=lambda method: method.name)
def test_inverters(method):
    curvature = "empirical_fisher" if method.default_curvature == "empirical_fisher" else "ggn"
    check_inverter(HessianInverter(method, 1.0, curvature=curvature))


class Faulty(LowRank):
    """FᵀF + diag(penalty) of seeded numbers, with one fault."""

    def __init__(self, fault=None):
        generator = torch.Generator().manual_seed(0)
        super().__init__(
            torch.randn(3, 5, dtype=torch.float64, generator=generator), torch.ones(5, dtype=torch.float64)
        )
        self.fault = fault
        self.is_psd = True

    def apply(self, V):
        product = super().apply(V)
        if self.fault == "asymmetric":
            product = product + V.roll(1, 1)
        if self.fault == "affine":
            product = product + 1e-3
        if self.fault == "rows":
            product = product + 1e-3 * V.mean(0)
        if self.fault == "negative":
            product = product - 3 * V
        return product

    def to_dense(self, verbose=0):
        return super().to_dense() * (1.01 if self.fault == "dense" else 1.0)

    def diagonal(self):
        return super().diagonal() + (0.1 if self.fault == "diagonal" else 0.0)

    def factor(self, verbose=0):
        return super().factor() * (2 if self.fault == "factor" else 1)

    n_samples = 3

    def minibatch(self, rows):
        scale = 1 if self.fault == "minibatch" else (3 / len(rows)) ** 0.5
        return LowRank(scale * self.rows[rows], self.penalty)


def test_a_right_operator_passes():
    check_operator(Faulty())
    check_operator(Dense(torch.tensor([[2.0, 1.0], [1.0, 3.0]])), [[2.0, 1.0], [1.0, 3.0]])


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("asymmetric", "uᵀ"),
        ("affine", "products are linear"),
        ("rows", "rows together are as alone"),
        ("negative", "is_psd is true"),
        ("dense", "to_dense is made of the products"),
        ("diagonal", "diagonal is that of the matrix"),
        ("factor", "FᵀF . diag.penalty. is the matrix"),
        ("minibatch", "the mean over 3 minibatches is the matrix"),
    ],
)
def test_a_fault_of_an_operator_is_told(fault, told):
    with pytest.raises(AssertionError, match=told):
        check_operator(Faulty(fault))


def test_another_matrix_is_told():
    with pytest.raises(AssertionError, match="products are those of the matrix given"):
        check_operator(DiagonalMatrix(torch.ones(2)), [[1.0, 0.0], [0.0, 2.0]])


OUTPUTS = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
CLASSES = torch.tensor([0, 1, 2, 1, 0])


@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        ("cross_entropy", CLASSES),
        (nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=2, reduction="sum"), CLASSES),
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)), CLASSES),
        ("mse", OUTPUTS + 1),
        ("bce_with_logits", OUTPUTS.sigmoid()),
        ("huber", OUTPUTS + 0.3),
        ("poisson_nll", OUTPUTS.exp()),
        (lambda f, y: (f - y).pow(4).sum(1), OUTPUTS + 1),
        (lambda f, y: (f - y).pow(4).mean(), OUTPUTS + 1),
    ],
)
def test_losses(loss, targets):
    check_loss(loss, OUTPUTS, targets)


class Quartic(Loss):
    """Σ (f − y)⁴ of a row, with one fault."""

    def __init__(self, fault=None):
        self.fault = fault

    def per_sample(self, output, target):
        values = (output - target).pow(4).sum(1)
        if self.fault == "rows":
            values = values + values.mean()
        if self.fault == "detached":
            return values.detach() + 0 * output.sum(1)
        return values

    def mass(self, output, target):
        return -super().mass(output, target) if self.fault == "mass" else super().mass(output, target)

    def output_hessian(self, output, target):
        return DiagonalHessian((6 if self.fault == "hessian" else 12) * (output - target).square())


def test_a_right_loss_passes():
    check_loss(Quartic(), OUTPUTS, 0.5 * OUTPUTS + 1)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("rows", "row 0 alone has the value"),
        ("detached", "the gradient is that of differences"),
        ("mass", "no share is negative"),
        ("hessian", "the output Hessian is that of differences"),
    ],
)
def test_a_fault_of_a_loss_is_told(fault, told):
    with pytest.raises(AssertionError, match=told):
        check_loss(Quartic(fault), OUTPUTS, 0.5 * OUTPUTS + 1)


class Faulted(HessianInverter):
    """An inverter with one fault, named by ``verbose``'s place: settings are those of its base."""

    fault = ""

    def transform(self, X):
        x = super().transform(X)
        # Less than a method stops at which promises three digits.
        return (1 + 1e-6) * x if self.fault == "transform" else x

    def solve(self, b):
        x, info = super().solve(b)
        if self.fault == "converged":
            x, info = 1.001 * x, {**info, "residual": torch.full_like(info["residual"], 1e-3)}
        if self.fault == "batch":
            x = (1 + 1e-3 * (self.batch_size or 0)) * x
        return InverseHvpResult(x, info)

    def fit(self, X, y=None, sample_weight=None):
        if self.fault == "mode":
            X.eval()
        if self.fault == "seed" and self.random_state is not None:
            random_state, self.random_state = self.random_state, None
            super().fit(X, y, sample_weight)
            self.random_state = random_state
            return self
        return super().fit(X, y, sample_weight)


@pytest.mark.parametrize(
    ("fault", "method", "told"),
    [
        ("transform", "direct", "`solve` and `transform` give the same x"),
        ("batch", "kfac", "batch_size=1 gives the same x"),
        ("converged", "cg", "converged rows solve the system"),
        ("mode", "direct", "the model is left as it was"),
        ("seed", "arnoldi", "the method's random_state is 7"),
    ],
)
def test_a_fault_of_an_inverter_is_told(fault, method, told, monkeypatch):
    monkeypatch.setattr(Faulted, "fault", fault)
    with pytest.raises(AssertionError, match=told):
        check_inverter(Faulted(method, 1.0, curvature="ggn"))
