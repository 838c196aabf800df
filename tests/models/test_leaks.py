"""What still reaches the user's own tensors, or loses accuracy, is an error that names it."""

import copy
import functools

import pytest
import sklearn
import torch
import torch.nn.functional as F
from oracles import matrix_error, oracle_matrix
from problems import problem
from torch import nn

from skinvert import HessianInverter, PerSampleGradient, TorchTwiceDifferentiable

X, Y = torch.linspace(-1, 2, 48).sin().reshape(12, 4), torch.arange(12) % 3
NETS = {}


def fit(net, data=None, loss="cross_entropy", **settings):
    return HessianInverter("direct", 30.0, loss=loss, **settings).fit(net, data or (X, Y))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


# -- forward passes ------------------------------------------------------------------------------------------------


class Global(nn.Module):
    """Reaches itself through a global, wholly or in part."""

    def __init__(self, part):
        super().__init__()
        self.inner, self.part = network(), part
        NETS["global"] = self.inner

    def forward(self, x):
        through = self.inner if self.part else NETS["global"]
        return through(x) + (NETS["global"][0](x).sum(1, keepdim=True) if self.part else 0)


@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_global(part, frozen):
    net = Global(part).requires_grad_(not frozen)
    with pytest.raises(ValueError, match=r"forward pass must be .* inner\.0\.weight, inner\.0\.bias.*through `self`"):
        fit(net, params="*")
    with pytest.raises(ValueError, match=r"inner\.0\.weight"):
        PerSampleGradient(net, loss="cross_entropy", params="*").fit(X, Y)


def test_running_statistics_reached_through_a_global():
    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.out = nn.BatchNorm1d(4, affine=False), nn.Linear(4, 3)
            NETS["norm"] = self.norm

        def forward(self, x):
            return self.out(NETS["norm"](x))

    net = Normalised().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=r"norm\.num_batches_tracked"):
        fit(net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_leak_that_the_model_catches():
    class Catching(Global):
        def forward(self, x):
            try:
                return self.inner(x) + NETS["global"](x)
            except RuntimeError:
                return self.inner(x)

    with pytest.raises(ValueError, match=r"inner\.0\.weight"):
        fit(Catching(True))


@pytest.mark.filterwarnings("ignore:.*a global .NETS.:UserWarning")
def test_a_leak_in_a_later_batch():
    class Late(Global):
        def forward(self, x):
            return self.inner(x) + (NETS["global"](x) if bool(x[0, 0] > 0.9) else 0)

    with pytest.raises(ValueError, match=r"inner\.0\.weight"):
        fit(Late(True), (torch.cat([torch.zeros(4, 4), torch.ones(4, 4)]), Y[:8]), batch_size=4)


def test_a_tensor_made_once_from_parameters():
    class Stale(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.scale = network(), nn.Parameter(torch.ones(3))
            self.squared = self.scale.square()

        def forward(self, x):
            return self.inner(x) * self.squared * self.scale

    with pytest.raises(ValueError, match="your own model's squared"):
        fit(Stale())


@pytest.mark.parametrize("batch_size", [None, 4])
def test_a_tensor_kept_between_calls(batch_size):
    class Kept(nn.Linear):
        @functools.cached_property
        def squashed(self):
            return self.weight.tanh()

        def forward(self, x):
            return F.linear(x, self.squashed, self.bias)

    with pytest.raises(ValueError, match="cached_property"):
        fit(Kept(4, 3), batch_size=batch_size, curvature="hessian")


def test_outputs_that_take_the_users_model():
    class Own(TorchTwiceDifferentiable):
        def outputs(self, module, batch):
            return self.model(batch[0])

    with pytest.raises(ValueError, match="the `module` that `outputs` is given"):
        HessianInverter("direct", 30.0).fit(Own(network(), "cross_entropy"), (X, Y))


def test_what_is_asked_of_a_parameter_is_no_leak():
    class Asking(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()
            NETS["asking"] = self.inner[0].weight

        def forward(self, x):
            weight = NETS["asking"]
            return self.inner(x.to(weight.device)) + weight.new_zeros(3) + torch.zeros_like(weight)[0, 0] * weight.ndim

    net = Asking()
    expected = fit(net.inner).curvature_.to_dense()
    assert matrix_error(fit(net).curvature_.to_dense(), expected.numpy()) <= 1e-6


@pytest.mark.parametrize("memory", [1e-4, 1024])
def test_frozen_parameters_that_are_large_are_shared_without_an_alarm(memory):
    case = problem("mlp", "cross_entropy")
    net = copy.deepcopy(case.module)
    net[0].requires_grad_(False)
    with sklearn.config_context(working_memory=memory):
        inverter = fit(net, case.data)
    shared = dict(inverter._model.module.named_parameters())["0.weight"]
    assert (shared.data_ptr() == net[0].weight.data_ptr()) == (memory < 1)
    assert matrix_error(inverter.curvature_.to_dense(), oracle_matrix(case)[20 + 5 :, 20 + 5 :]) <= 1e-12


# -- losses --------------------------------------------------------------------------------------------------------


class Penalised(nn.Module):
    """A criterion that holds the network, under whatever name."""

    def __init__(self, net, in_list):
        super().__init__()
        self.held = [net] if in_list else net

    def forward(self, output, target):
        held = self.held[0] if isinstance(self.held, list) else self.held
        return F.cross_entropy(output, target) + squares(held)


def squares(net):
    return 0.1 * sum(tensor.square().sum() for tensor in net.parameters())


def with_net(output, target, net, reduction):
    return F.cross_entropy(output, target, reduction=reduction) + squares(net)


LOSSES = {
    "mean": lambda net: functools.partial(with_net, net=net, reduction="mean"),
    "sum": lambda net: functools.partial(with_net, net=net, reduction="sum"),
    "none": lambda net: functools.partial(with_net, net=net, reduction="none"),
    "closure": lambda net: lambda output, target: F.cross_entropy(output, target) + squares(net),
    "module": lambda net: Penalised(net, False),
    "module with a list": lambda net: Penalised(net, True),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("make", LOSSES.values(), ids=LOSSES.keys())
def test_a_penalty_in_the_loss(make, frozen):
    net = network().requires_grad_(not frozen)
    with pytest.raises(ValueError, match=r"The loss must be .* 0\.weight.*`weight_decay=`"):
        fit(net, loss=make(net), params="*")


def test_a_loss_with_parameters_of_its_own():
    temperature = nn.Parameter(torch.tensor(2.0))
    net = network()
    received = fit(net, loss=lambda output, target: F.cross_entropy(output / temperature, target))
    expected = fit(net, loss=lambda output, target: F.cross_entropy(output / 2.0, target))
    assert matrix_error(received.curvature_.to_dense(), expected.curvature_.to_dense().numpy()) <= 1e-6


def test_a_loss_that_reads_a_buffer():
    net = network()
    net.register_buffer("shares", torch.tensor([0.5, 1.0, 2.0]))
    received = fit(net, loss=lambda output, target: F.cross_entropy(output * net.shares, target))
    expected = fit(net, loss=lambda output, target: F.cross_entropy(output * torch.tensor([0.5, 1, 2]), target))
    assert matrix_error(received.curvature_.to_dense(), expected.curvature_.to_dense().numpy()) <= 1e-6


# -- precision -----------------------------------------------------------------------------------------------------


class Cast(nn.Module):
    """Computes its middle in another dtype, or by autocast, and comes back from it if told to."""

    def __init__(self, dtype, back, autocast=False):
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.dtype, self.back, self.autocast = dtype, back, autocast

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            h = self.last(self.first(x))
        h = h if self.autocast else h.to(self.dtype)
        return h.to(x.dtype) if self.back else h


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_inside(autocast, back):
    with pytest.raises(ValueError, match=r"must be in torch\.float32, as θ is\. Got torch\.bfloat16.*autocast"):
        fit(Cast(torch.bfloat16, back, autocast))


def test_a_cast_at_the_end():
    with pytest.raises(ValueError, match=r"output must be in torch\.float64, as θ is\. Got torch\.float32"):
        fit(Cast(torch.float32, back=False), dtype="float64")


def test_a_cast_inside_float64():
    with pytest.warns(UserWarning, match=r"must be in torch\.float64, as θ is\. Got torch\.float32") as caught:
        HessianInverter("direct", 30.0, loss="cross_entropy", dtype="float64").fit(Cast(torch.float32, True), (X, Y))
    assert len(caught) == 1 and caught[0].filename == __file__


def test_a_cast_to_the_model_s_own_dtype_is_no_loss(recwarn):
    # As `h.float()` in a norm is, of a model that is in float32: only a probe in float64 would see it lower.
    fit(Cast(torch.float32, True))
    assert not recwarn.list
    fit(Cast(torch.float32, True).double())
    assert len(recwarn.list) == 1


def test_outputs_in_a_higher_precision():
    net = Cast(torch.float64, back=False)
    plain = Cast(torch.float32, back=False)
    plain.load_state_dict(net.state_dict())
    received = fit(net).curvature_.to_dense()
    assert received.dtype == torch.float32
    assert matrix_error(received, fit(plain).curvature_.to_dense().numpy()) <= 1e-5


def test_constants_in_a_lower_precision_are_no_loss():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            return self.inner(x) * torch.ones(3)

    net = Masked()
    expected = fit(net.inner, dtype="float64").curvature_.to_dense()
    assert matrix_error(fit(net, dtype="float64").curvature_.to_dense(), expected.numpy()) <= 1e-12


def test_losses_in_a_lower_precision():
    class Seam(TorchTwiceDifferentiable):
        def per_sample_loss(self, outputs, batch):
            return F.cross_entropy(outputs.float(), batch[1], reduction="none")

    with pytest.raises(ValueError, match=r"per-sample losses must be in torch\.float64"):
        HessianInverter("direct", 30.0, dtype="float64").fit(Seam(network(), None), (X, Y))


def test_integer_outputs():
    class Argmax(nn.Linear):
        def forward(self, x):
            return super().forward(x).argmax(1)

    with pytest.raises(TypeError, match="output must be floating"):
        fit(Argmax(4, 3), loss="mse")
