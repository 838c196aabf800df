"""Second derivatives that autograd gets wrong are told of, and served by differences or by the GGN; or refused."""

import pytest
import torch
from problems import tanh_with
from torch import nn

from skinvert import HessianInverter, TorchTwiceDifferentiable

N, P = 12, 27


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * (1 - ctx.saved_tensors[0].tanh().square())


class ThroughNumpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.slope = (1 - x.detach().tanh().square()).numpy()
        return x.tanh()

    @staticmethod
    def backward(ctx, g):
        return torch.from_numpy(g.detach().numpy() * ctx.slope)


def round_straight_through(x):
    return x + ((4 * x).round() / 4 - x).detach()


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.second, self.function = nn.Linear(4, 3), nn.Linear(3, 3), function

    def forward(self, x):
        return self.second(self.function(self.first(x)))


class Kinked(nn.Module):
    """ReLU, max pooling and a hard tanh over small convolutions."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Unflatten(1, (1, 8)),
            nn.Conv1d(1, 6, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool1d(2),
            nn.Flatten(),
            nn.Linear(24, 12),
            nn.Hardtanh(-0.3, 0.3),
            nn.Linear(12, 3),
        )

    def forward(self, x):
        return self.body(x)


def data(dtype=torch.float64, d=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(N, d, generator=generator, dtype=torch.float64).to(dtype)
    return X, torch.randint(3, (N,), generator=generator)


WRONG = {
    "all": tanh_with(1.0),
    "one_percent": tanh_with(0.01),
    "once": Once.apply,
    "numpy": ThroughNumpy.apply,
    "straight_through": round_straight_through,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["direct", "cg"])
@pytest.mark.parametrize("name", [name for name in WRONG if name != "straight_through"])
def test_the_hessian_is_told_of_and_taken_from_differences(name, method, dtype):
    net = Net(WRONG[name]).to(dtype)
    with pytest.warns(UserWarning, match="differences of gradients") as told:
        inverter = HessianInverter(method, 5.0, loss="cross_entropy", batch_size=5).fit(net, data(dtype))
    assert "in first" in str(told[0].message) or "twice differentiable" in str(told[0].message)
    assert 'Try curvature="ggn"' in str(told[0].message)
    assert told[0].filename == __file__
    plain = Net(torch.tanh).double()
    plain.load_state_dict(net.state_dict())
    X, y = data(dtype)
    expected = TorchTwiceDifferentiable(plain, "cross_entropy").hessian(X.double(), y)
    received = inverter.curvature_.apply(torch.eye(P, dtype=dtype)).double()
    torch.testing.assert_close(received, expected, rtol=0, atol=1e-8 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_no_gradient_is_refused(dtype):
    net = Net(round_straight_through).to(dtype)
    with pytest.raises(ValueError, match=r'no differences of gradients in first.*Try curvature="ggn"'):
        HessianInverter("direct", 5.0, loss="cross_entropy").fit(net, data(dtype))


def test_padding_rows_are_constants():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(5, 4, padding_idx=1), nn.Flatten(), nn.Linear(8, 3)).double()
    net[0].weight.data[1] = 0.3
    tokens, y = torch.arange(20).reshape(10, 2) % 5, torch.arange(10) % 3
    inverter = HessianInverter("direct", 1.0, loss="cross_entropy").fit(net, (tokens, y))
    assert inverter.curvature_.differenced is None
    assert not inverter.curvature_.to_dense()[4:8].any()


def test_the_dense_hessian_of_a_batch_is_refused():
    with pytest.raises(ValueError, match="no differences of gradients in first"):
        TorchTwiceDifferentiable(Net(WRONG["all"]), "cross_entropy").hessian(*data(torch.float32))


def test_only_parameters_that_are_touched_count():
    # The last layer's own block takes first derivatives of what lies before it alone.
    net = Net(WRONG["all"]).double()
    X, y = data()
    inverter = HessianInverter("direct", 1.0, loss="cross_entropy", params="second.*").fit(net, (X, y))
    features = torch.tanh(net.first(X)).detach()
    expected = TorchTwiceDifferentiable(net.second, "cross_entropy").hessian(features, y)
    torch.testing.assert_close(inverter.curvature_.to_dense(), expected)


@pytest.mark.parametrize("method", ["direct", "cg", "ekfac"])
@pytest.mark.parametrize("name", ["all", "once", "numpy"])
def test_the_ggn_takes_first_derivatives(name, method):
    X, y = data()
    net, right = Net(WRONG[name]).double(), Net(torch.tanh).double()
    right.load_state_dict(net.state_dict())
    b = torch.randn(2, P, dtype=torch.float64)
    settings = {"loss": "cross_entropy", "curvature": "ggn", "batch_size": 5}
    received = HessianInverter(method, 0.3, **settings).fit(net, (X, y)).transform(b)
    expected = HessianInverter(method, 0.3, **settings).fit(right, (X, y)).transform(b)
    torch.testing.assert_close(received, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["once", "numpy"])
def test_the_ggn_s_products_are_right(name):
    X, y = data()
    net = Net(WRONG[name]).double()
    ggn = HessianInverter("cg", 0.3, loss="cross_entropy", curvature="ggn").fit(net, (X, y)).curvature_
    theta = [t.detach() for t in net.parameters()]
    J = torch.autograd.functional.jacobian(lambda a, b, c, d: torch.tanh(X @ a.T + b) @ c.T + d, tuple(theta))
    J = torch.cat([part.reshape(N, 3, -1) for part in J], dim=2)
    p = net(X).detach().softmax(1)
    S = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    expected = torch.einsum("mcp,mcd,mdq->pq", J, S, J) / N
    torch.testing.assert_close(ggn.apply(torch.eye(P, dtype=torch.float64)), expected)


def test_a_function_without_a_second_derivative_says_so():
    class Powers(nn.Module):
        def __init__(self):
            super().__init__()
            self.centres = nn.Parameter(torch.randn(3, 4))

        def forward(self, x):
            return -torch.cdist(x, self.centres, p=3.0)

    class Plain(Powers):
        def forward(self, x):
            return -torch.linalg.vector_norm(x[:, None] - self.centres, ord=3.0, dim=2)

    net, plain = Powers(), Plain().double()
    plain.load_state_dict(net.state_dict())
    with pytest.warns(UserWarning, match=r"twice differentiable. Got the derivative for '_cdist_backward'"):
        inverter = HessianInverter("cg", 1.0, loss="cross_entropy").fit(net, data(torch.float32))
    X, y = data(torch.float32)
    expected = TorchTwiceDifferentiable(plain, "cross_entropy").hessian(X.double(), y)
    received = inverter.curvature_.to_dense().double()
    torch.testing.assert_close(received, expected, rtol=0, atol=1e-6)


def test_a_norm_at_zero_says_so():
    class Norm(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3, bias=False)

        def forward(self, x):
            return self.layer(x).norm(dim=1, keepdim=True) * torch.ones(3, dtype=x.dtype)

    net = Norm().double()
    nn.init.zeros_(net.layer.weight)
    with pytest.raises(ValueError, match="where the gradient is finite"):
        HessianInverter("cg", 1.0, loss="cross_entropy").fit(net, data())


@pytest.mark.parametrize("seed", range(30))
def test_kinks_are_no_fault(seed):
    torch.manual_seed(seed)
    TorchTwiceDifferentiable(Kinked(), "cross_entropy").verify_second_derivative(data(torch.float32, 8, seed))


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1e3])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.Hardswish])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flat_and_confident_networks_are_no_fault(dtype, activation, scale):
    # Softmax probabilities of exactly one: what is left of the second derivatives is rounding.
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12), activation(), nn.Linear(12, 12), activation(), nn.Linear(12, 3)).to(dtype)
    with torch.no_grad():
        for tensor in net.parameters():
            tensor.mul_(scale)
    TorchTwiceDifferentiable(net, "cross_entropy").verify_second_derivative(data(dtype, 8))


def test_a_model_that_holds_to_its_own_dtype():
    class Float32Inside(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.net, self.shift = Net(function), torch.full((3,), 0.1)

        def forward(self, x):
            return self.net(x) + self.shift @ torch.eye(3, dtype=torch.float32)

    class Strict(Float32Inside):
        def forward(self, x):
            return nn.functional.linear(super().forward(x), torch.eye(3, dtype=torch.float32))

    for kind in (Float32Inside, Strict):
        torch.manual_seed(0)
        HessianInverter("direct", 5.0, loss="cross_entropy").fit(kind(torch.tanh), data(torch.float32))
        with pytest.raises(ValueError, match="no differences of gradients"):
            HessianInverter("direct", 5.0, loss="cross_entropy").fit(kind(WRONG["all"]), data(torch.float32))


@pytest.mark.parametrize("seed", [0, 3])
def test_a_fault_is_seen_in_float32_alone(seed):
    torch.manual_seed(seed)

    class Cubic(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x):
            h = self.first(x)
            # In value and first derivative h³; the second takes the slope as a constant. No float64 passes the cast.
            slope = 3 * h.detach().square()
            return self.second((slope * h - 2 * h.detach() ** 3).float())

    net = Cubic()
    with pytest.raises(ValueError, match="no differences of gradients"):
        HessianInverter("cg", 100.0, loss="cross_entropy").fit(net, data(torch.float32))


def test_nothing_of_the_user_s_changes():
    net = Net(torch.tanh)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    TorchTwiceDifferentiable(net, "cross_entropy").verify_second_derivative(data(torch.float32))
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.dtype == torch.float32
    assert all(tensor.grad is None for tensor in net.parameters())


class Logistic(torch.autograd.Function):
    """log(1 + eᶠ) with a constant for its slope."""

    @staticmethod
    def forward(ctx, f):
        ctx.slope = f.detach().sigmoid()
        return nn.functional.softplus(f)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.slope


def logistic(softplus):
    return lambda f, y: (softplus(f) - y * f).sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["direct", "cg"])
def test_a_loss_s_own_second_derivatives(method, dtype):
    X, _ = data(dtype)
    y, net = torch.randint(2, (N, 3)).to(dtype), Net(torch.tanh).to(dtype)
    settings = {"curvature": "ggn"}
    with pytest.raises(ValueError, match=r"in the outputs must be those of its gradient.*in the loss"):
        HessianInverter(method, 1.0, loss=logistic(Logistic.apply), **settings).fit(net, (X, y))
    b = torch.randn(2, P, dtype=dtype)
    received = HessianInverter(method, 1.0, loss=logistic(nn.functional.softplus), **settings).fit(net, (X, y))
    expected = HessianInverter(method, 1.0, loss=nn.BCEWithLogitsLoss(reduction="none"), **settings).fit(net, (X, y))
    # BCEWithLogitsLoss means over the outputs too, as a callable that returns (m,) does not.
    torch.testing.assert_close(received.curvature_.apply(b) / 3, expected.curvature_.apply(b), rtol=1e-4, atol=1e-5)


def test_probabilities_at_their_edge_are_told():
    net = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid()).double()
    X, y = 1e3 * data(torch.float64)[0], torch.randint(2, (N, 3)).double()
    with pytest.raises(ValueError, match="inside of the loss's domain.*between 0 and 1.*bce_with_logits"):
        HessianInverter("direct", 1.0, loss=nn.BCELoss(), curvature="ggn").fit(net, (X, y))
