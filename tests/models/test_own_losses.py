"""A loss of the user's, by name: its curvatures and solutions against closed forms in numpy."""

import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from torch import nn

import skinvert
from skinvert import HessianInverter, Loss, PerSampleGradient, TorchTwiceDifferentiable, register_loss, solve_hvp
from skinvert.curvature import SampledFisher
from skinvert.models import LOSSES, DiagonalHessian, IndependentLabels

N, D, NU = 13, 3, 12.0


class LogCosh(Loss):
    def per_sample(self, output, target):
        return (output - target).cosh().log().sum(1)

    def output_hessian(self, output, target):
        return DiagonalHessian(1 - (output - target).tanh() ** 2)


class StudentT(Loss):
    """½ (ν + 1) log(1 + r² / ν), convex where r² < ν."""

    def per_sample(self, output, target):
        return (0.5 * (NU + 1) * torch.log1p((output - target) ** 2 / NU)).sum(1)


class StudentTLabels(IndependentLabels):
    """Through the ratio of a Gaussian and a root of a χ² it would take two uniforms: here by the inverse function."""

    def fisher(self):
        return DiagonalHessian(torch.full_like(self.f, (NU + 1) / (NU + 3)))

    def score(self, f, u):
        import scipy.stats

        r = torch.from_numpy(scipy.stats.t.ppf(u.numpy(), NU))
        return (NU + 1) * r / (NU + r**2)


class Likelihood(StudentT):
    def predictive(self, output, target):
        return StudentTLabels(output)


class Weighed(Loss):
    """A squared error with a tensor, which weighs its rows and counts in the mean."""

    def __init__(self):
        self.by_sign = torch.tensor([1.0, 3.0], dtype=torch.float64)

    def weight(self, target):
        return self.by_sign[(target[:, 0] > 0).long()]

    def per_sample(self, output, target):
        return self.weight(target) * (output - target).square().sum(1)

    def mass(self, output, target):
        return self.weight(target)


# Of residuals r: ∂ℓ/∂f, ∂²ℓ/∂f².
DERIVATIVES = {
    "own_log_cosh": (np.tanh, lambda r: 1 / np.cosh(r) ** 2),
    "own_student_t": (
        lambda r: (NU + 1) * r / (NU + r**2),
        lambda r: (NU + 1) * (NU - r**2) / (NU + r**2) ** 2,
    ),
}


@pytest.fixture(autouse=True)
def names():
    before = dict(LOSSES)
    register_loss("own_log_cosh", LogCosh)
    register_loss("own_student_t", lambda: StudentT())
    register_loss("own_likelihood", Likelihood)
    register_loss("own_weighed", Weighed)
    yield
    LOSSES.clear()
    LOSSES.update(before)


def problem():
    """A softplus of a linear form: f' and f'' in it are a logistic function and its derivative."""
    generator = np.random.default_rng(3)
    w, X, y = 0.4 * generator.normal(size=D), generator.normal(size=(N, D)), 0.5 * generator.normal(size=N)
    net = nn.Sequential(nn.Linear(D, 1, bias=False), nn.Softplus()).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.from_numpy(w)[None])
    z = X @ w
    slope = 1 / (1 + np.exp(-z))
    return net, (torch.from_numpy(X), torch.from_numpy(y)[:, None]), np.log1p(np.exp(z)) - y, slope, X


def matrices(name):
    """Hessian, GGN and rows of gradients, by hand."""
    _, _, r, slope, X = problem()
    first, second = (derivative(r) for derivative in DERIVATIVES[name])
    ggn = X.T @ ((second * slope**2)[:, None] * X) / N
    hessian = ggn + X.T @ ((first * slope * (1 - slope))[:, None] * X) / N
    return hessian, ggn, (first * slope)[:, None] * X


def worst(received, expected):
    return np.abs(np.asarray(received) - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("batch_size", [1, 4, None])
@pytest.mark.parametrize("name", DERIVATIVES)
def test_curvatures_and_influence(name, batch_size):
    net, data, *_ = problem()
    hessian, ggn, rows = matrices(name)
    gradients = PerSampleGradient(net, loss=name, batch_size=batch_size).fit_transform(*data)
    assert worst(gradients, rows) <= 1e-13
    for curvature, expected in (("hessian", hessian), ("ggn", ggn)):
        for method in ("direct", "cg"):
            inverter = HessianInverter(method, 2.0, loss=name, curvature=curvature, batch_size=batch_size)
            inverter.fit(net, data)
            assert worst(inverter.curvature_.to_dense(), expected) <= 1e-13
            # Influence of each row on each other's loss.
            received = inverter.transform(gradients) @ gradients.T
            assert worst(received, np.linalg.solve(expected + 2 * np.eye(D), rows.T).T @ rows.T) <= 1e-7


def test_the_name_is_taken_everywhere():
    net, data, *_ = problem()
    hessian, _, rows = matrices("own_log_cosh")
    expected = np.linalg.solve(hessian + 2 * np.eye(D), rows.T).T
    x, _ = solve_hvp("direct", net, data, torch.from_numpy(rows), hessian_perturbation=2.0, loss="own_log_cosh")
    assert worst(x, expected) <= 1e-12
    assert worst(TorchTwiceDifferentiable(net, "own_log_cosh").hessian(*data), hessian) <= 1e-13
    inverter = clone(HessianInverter("direct", 2.0, loss="own_log_cosh")).fit(net, data)
    assert worst(pickle.loads(pickle.dumps(inverter)).transform(rows), expected) <= 1e-12
    with pytest.raises(ValueError, match="'own_log_cosh'"):
        HessianInverter(loss="log_cosh").fit(net, data)
    assert skinvert.Loss is Loss and skinvert.register_loss is register_loss


def test_the_fisher_of_a_users_likelihood():
    net, data, _, slope, X = problem()
    expected = (NU + 1) / (NU + 3) * X.T @ (slope[:, None] ** 2 * X) / N

    def of(curvature, loss="own_likelihood"):
        return HessianInverter("direct", 1.0, loss=loss, curvature=curvature).fit(net, data).curvature_.to_dense()

    assert worst(of("fisher"), expected) <= 1e-13
    assert worst(of(SampledFisher(20_000)), expected) <= 0.02
    with pytest.raises(ValueError, match="known distribution: cross_entropy.* or own_likelihood. Got a StudentT"):
        of("fisher", "own_student_t")


def test_a_likelihood_without_a_closed_form_is_sampled():
    class Labels(StudentTLabels):
        fisher = IndependentLabels.fisher

    class Own(StudentT):
        def predictive(self, output, target):
            return Labels(output)

    net, data, *_ = problem()
    HessianInverter("direct", 1.0, loss=Own(), curvature=SampledFisher(2)).fit(net, data)
    with pytest.raises(ValueError, match=r"no `fisher`.*Try curvature=SampledFisher"):
        HessianInverter("direct", 1.0, loss=Own(), curvature="fisher").fit(net, data)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("batch_size", [1, 5, None])
def test_shares_of_the_denominator_and_tensors_of_the_loss(batch_size, dtype):
    net, data, r, slope, X = problem()
    c = np.where(data[1][:, 0].numpy() > 0, 3.0, 1.0)
    expected = X.T @ ((2 * c * (slope**2 + r * slope * (1 - slope)))[:, None] * X) / c.sum()
    loss = Weighed()
    inverter = HessianInverter("direct", 9.0, loss=loss, batch_size=batch_size, dtype=dtype).fit(net, data)
    assert worst(inverter.curvature_.to_dense(), expected) <= (1e-13 if dtype == "float64" else 1e-5)
    assert loss.by_sign.dtype == torch.float64
    assert loss.to(torch.float32, torch.device("cpu")).by_sign.dtype == torch.float32


def test_a_loss_that_is_not_convex_has_no_ggn():
    net, (X, y), *_ = problem()
    with pytest.raises(ValueError, match="convex in the outputs"):
        HessianInverter("direct", 1.0, loss="own_student_t", curvature="ggn").fit(net, (X, y - 30))


class Halved(LogCosh):
    def output_hessian(self, output, target):
        return DiagonalHessian(0.5 * (1 - (output - target).tanh() ** 2))


class Clipped(StudentT):
    def output_hessian(self, output, target):
        r = (output - target) ** 2
        return DiagonalHessian((NU + 1) * (NU - r) / (NU + r) ** 2)


class OfOneOutput(LogCosh):
    def output_hessian(self, output, target):
        return DiagonalHessian(torch.ones(len(output), 2).double())


class Mixed(Loss):
    def per_sample(self, output, target):
        return (output - target).square().sum(1) / output.abs().mean()


class Elements(Loss):
    def per_sample(self, output, target):
        return (output - target).square()


class Mean(Loss):
    def per_sample(self, output, target):
        return (output - target).square().mean()


class Detached(Loss):
    def per_sample(self, output, target):
        return (output.detach() - target).square().sum(1)


class Array(Loss):
    def per_sample(self, output, target):
        return (output - target).square().sum(1).detach().numpy()


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (Halved, "Halved.output_hessian must be the second derivative"),
        (Clipped, "Clipped.output_hessian must be the second derivative .* convex"),
        (OfOneOutput, "of 8 rows and 1 outputs"),
        (Mixed, "Mixed.per_sample must be of each row alone"),
        (Elements, "one value per row.*flatten"),
        (Mean, "one value per row"),
        (Detached, "differentiable in the outputs"),
        (Array, "a tensor. Got ndarray"),
    ],
)
def test_what_cannot_be_right_is_told(loss, match):
    net, (X, y), *_ = problem()
    with pytest.raises((ValueError, TypeError), match=match):
        HessianInverter("direct", 1.0, loss=loss()).fit(net, (X, y - 8))


def test_a_row_that_depends_on_others_is_told_of_on_any_batch():
    class Later(Loss):
        def per_sample(self, output, target):
            values = (output - target).square().sum(1)
            return values / output.detach().abs().mean() if bool((target > 50).any()) else values

    net, (X, y), *_ = problem()
    y = y.clone()
    y[-1] = 60
    with pytest.raises(ValueError, match="of each row alone"):
        HessianInverter("direct", 1.0, loss=Later(), batch_size=6).fit(net, (X, y))


def test_targets_that_would_be_broadcast():
    net, (X, y), *_ = problem()
    with pytest.raises(ValueError, match="never broadcast"):
        HessianInverter("direct", 1.0, loss="own_log_cosh").fit(net, (X, y[:, 0]))


def test_a_closed_form_is_all_that_there_is_of_first_derivatives_alone():
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, r):
            ctx.save_for_backward(r)
            return r**2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, along):
            return 2 * along * ctx.saved_tensors[0]

    class Own(Loss):
        def per_sample(self, output, target):
            return Square.apply(output - target).sum(1)

        def output_hessian(self, output, target):
            return DiagonalHessian(torch.full_like(output, 2.0))

    net, data, _, slope, X = problem()
    A = HessianInverter("direct", 1.0, loss=Own(), curvature="ggn").fit(net, data).curvature_
    assert worst(A.to_dense(), 2 * X.T @ (slope[:, None] ** 2 * X) / N) <= 1e-13


def test_a_taken_name_keeps_the_first():
    with pytest.warns(UserWarning, match="'own_log_cosh' is already registered: the first is kept"):
        register_loss("own_log_cosh", StudentT)
    assert LOSSES["own_log_cosh"] is LogCosh
    with pytest.warns(UserWarning, match="overwrite=True"):
        register_loss("mse", StudentT)
    register_loss("own_log_cosh", StudentT, overwrite=True)
    assert LOSSES["own_log_cosh"] is StudentT


def test_a_name_of_a_torch_module():
    register_loss("own_huber", lambda: nn.HuberLoss(delta=0.3))
    net, data, *_ = problem()
    expected, received = (
        HessianInverter("direct", 9.0, loss=loss).fit(net, data).curvature_.to_dense()
        for loss in (nn.HuberLoss(delta=0.3), "own_huber")
    )
    assert torch.equal(received, expected)


class Lacking(Loss):
    pass


@pytest.mark.parametrize(
    ("name", "loss", "match", "kind"),
    [
        ("", LogCosh, "name must be a str", TypeError),
        (3, LogCosh, "name must be a str", TypeError),
        ("margin", LogCosh, "another than 'margin'", ValueError),
        ("x", LogCosh(), "lambda: loss", TypeError),
        ("x", nn.MSELoss(), "lambda: loss", TypeError),
        ("x", "mse", "without arguments", TypeError),
        ("x", lambda f, y: (f - y).mean(), "takes more.*lambda: loss", TypeError),
        ("x", Lacking, "lacks `per_sample`", TypeError),
    ],
)
def test_what_is_no_maker_of_losses(name, loss, match, kind):
    with pytest.raises(kind, match=match):
        register_loss(name, loss)


@pytest.mark.parametrize("made", [None, "mse", LogCosh])
def test_a_maker_that_makes_no_loss(made):
    register_loss("x", lambda: made)
    net, data, *_ = problem()
    with pytest.raises(TypeError, match="registered as the loss 'x' must be"):
        HessianInverter(loss="x").fit(net, data)
