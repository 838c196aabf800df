"""What users' models are made of that no textbook shows: each with a plain twin, which the oracle differentiates."""

import functools
from collections import OrderedDict, deque, namedtuple
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

D = torch.float64


@dataclass
class Case:
    """A model as it comes, its plain twin with the same parameters in the same order, and what must happen.

    ``must`` is None where the answer must be right, else words that the error must have.
    """

    model: Any
    twin: Any
    X: Any
    y: Any
    loss: Any = "cross_entropy"
    summed: Any = None
    must: str | None = None
    settings: Any = None


def data(n=40):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, dtype=D, generator=generator), torch.randint(3, (n,), generator=generator)


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


class Net(nn.Module):
    """An MLP of named layers."""

    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.c(torch.tanh(self.a(x)))


def net():
    return Net().double()


def classified(model, twin=None, must=None, **settings):
    X, y = data()
    return Case(model, model if twin is None else twin, X, y, must=must, settings=settings)


# -- bound to the old object -------------------------------------------------------------------------------------------


def compiled():
    inner = mlp()
    return classified(torch.compile(inner, backend="eager"), inner)


def compiled_in_place():
    model, twin = mlp(), mlp()
    twin.load_state_dict(model.state_dict())
    model.compile(backend="eager")
    return classified(model, twin)


def compiled_layer():
    model, twin = net(), net()
    twin.load_state_dict(model.state_dict())
    model.a = torch.compile(model.a, backend="eager")
    return classified(model, twin)


def replaced_forward():
    """As accelerate's ``prepare`` does: forward becomes a wrapper over the bound method."""
    model, twin = net(), net()
    twin.load_state_dict(model.state_dict())
    inner = model.forward

    @functools.wraps(inner)
    def forward(*args, **kwargs):
        return inner(*args, **kwargs)

    model.forward = forward
    return classified(model, twin, must="right or told")


def partial_forward():
    """As accelerate's hooks do: a partial over the module, on one layer."""
    model, twin = net(), net()
    twin.load_state_dict(model.state_dict())

    def hooked(module, *args, **kwargs):
        return module._old_forward(*args, **kwargs)

    model.a._old_forward = model.a.forward
    model.a.forward = functools.partial(hooked, model.a)
    return classified(model, twin, must="right or told")


def bound_forward():
    model, twin = net(), net()
    twin.load_state_dict(model.state_dict())
    model.forward = model.forward
    return classified(model, twin)


class Lambda(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Linear(4, 5), nn.Linear(5, 3)
        self.f = lambda x: self.c(torch.tanh(self.a(x)))

    def forward(self, x):
        return self.f(x)


def lambda_over_self():
    model, twin = Lambda().double(), net()
    twin.load_state_dict(model.state_dict())
    return classified(model, twin, must="right or told")


class BoundMethod(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Linear(4, 5), nn.Linear(5, 3)
        self.f = self.inner

    def inner(self, x):
        return self.c(torch.tanh(self.a(x)))

    def forward(self, x):
        return self.f(x)


def bound_method():
    model, twin = BoundMethod().double(), net()
    twin.load_state_dict(model.state_dict())
    return classified(model, twin)


Pair = namedtuple("Pair", "a c")


class Held(nn.Module):
    """Layers registered, and reached through a container beside."""

    def __init__(self, hold):
        super().__init__()
        self.a, self.c = nn.Linear(4, 5), nn.Linear(5, 3)
        self.held = hold(self.a, self.c)

    def forward(self, x):
        a, c = self.held.values() if isinstance(self.held, dict) else self.held
        return c(torch.tanh(a(x)))


def held(hold):
    def build():
        model, twin = Held(hold).double(), net()
        twin.load_state_dict(model.state_dict())
        return classified(model, twin)

    return build


class Parameters(nn.Module):
    """Weights reached through a plain list and a dict."""

    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Linear(4, 5), nn.Linear(5, 3)
        self.weights, self.biases = [self.a.weight, self.c.weight], {"a": self.a.bias, "c": self.c.bias}

    def forward(self, x):
        x = torch.tanh(F.linear(x, self.weights[0], self.biases["a"]))
        return F.linear(x, self.weights[1], self.biases["c"])


def parameters_in_containers():
    model = Parameters()
    for tensor in model.parameters():
        tensor.data = tensor.data.double()
    twin = net()
    twin.load_state_dict(model.state_dict())
    return classified(model, twin, must="right or told")


def hook_bound_to_the_original():
    model, twin = net(), net()
    twin.load_state_dict(model.state_dict())
    model.a.register_forward_hook(lambda module, args, out: out + 0 * model.c.bias.sum())
    return classified(model, twin, must="right or told")


def data_parallel():
    inner = mlp()
    return classified(nn.DataParallel(inner), inner)


def fx_graph():
    inner = mlp()
    traced = torch.fx.symbolic_trace(inner)
    return classified(traced, inner)


def exported():
    inner = mlp().eval()
    X, _ = data()
    batch = torch.export.Dim("batch", min=2)
    model = torch.export.export(inner, (X,), dynamic_shapes=({0: batch},)).module()
    twin = mlp()
    twin.load_state_dict(inner.state_dict())
    return classified(model, twin, must="right or told")


# -- penalties in the loss ---------------------------------------------------------------------------------------------


def penalty_in_the_loss():
    model = mlp()

    def loss(f, y):
        return F.cross_entropy(f, y) + 0.1 * sum(t.square().sum() for t in model.parameters())

    case = classified(model, must="weight_decay")
    case.loss = loss
    return case


def loss_of_a_layer():
    model = mlp()

    def loss(f, y):
        return F.cross_entropy(f, y) + 0.1 * model[0].weight.square().mean()

    case = classified(model, must="weight_decay")
    case.loss = loss
    return case


# -- second derivatives ------------------------------------------------------------------------------------------------


class OwnWeightNorm(nn.Module):
    """g v / ‖v‖ in plain operations."""

    def __init__(self, bias=True):
        super().__init__()
        layer = parametrizations.weight_norm(nn.Linear(4, 5, bias=bias))
        self.bias = layer.bias
        self.g, self.v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1

    def forward(self, x):
        return F.linear(x, self.g * self.v / self.v.norm(dim=1, keepdim=True), self.bias)


def weight_norm(bias):
    def build():
        model = nn.Sequential(
            parametrizations.weight_norm(nn.Linear(4, 5, bias=bias)), nn.Tanh(), nn.Linear(5, 3)
        ).double()
        twin = nn.Sequential(OwnWeightNorm(bias), nn.Tanh(), nn.Linear(5, 3)).double()
        for mine, other in zip(twin.parameters(), model.parameters(), strict=True):
            mine.data = other.data
        return classified(model, twin)

    return build


def spectral_norm():
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        model(data()[0])
    return classified(model.eval())


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.x = x.detach()
        return x**3

    @staticmethod
    def backward(ctx, g):
        return g * 3 * ctx.x**2


class OnceCube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * 3 * x**2


class WithCube(Net):
    def __init__(self, cube):
        super().__init__()
        self.cube = cube

    def forward(self, x):
        return self.c(self.cube(self.a(x)))


def custom_function(cube):
    def build():
        model, twin = WithCube(cube).double(), WithCube(lambda x: x**3).double()
        twin.load_state_dict(model.state_dict())
        return classified(model, twin, must="right or told")

    return build


# -- rows, classes, coupling -------------------------------------------------------------------------------------------


def prelu_rows_are_classes():
    X, y = data(23)
    model = nn.Sequential(nn.Linear(4, 5), nn.PReLU(5), nn.Linear(5, 3)).double()
    return Case(model, model, X, y, settings={"batch_size": 3})


class Recurrent(nn.Module):
    def __init__(self, kind, batch_first):
        super().__init__()
        self.rnn, self.out = kind(4, 3, batch_first=batch_first), nn.Linear(3, 3)

    def forward(self, x):
        return self.out(self.rnn(x)[0][:, -1])


def recurrent(kind, batch_first, n=12):
    def build():
        generator = torch.Generator().manual_seed(1)
        X, y = torch.randn(n, 5, 4, dtype=D, generator=generator), torch.randint(3, (n,), generator=generator)
        model = Recurrent(kind, batch_first).double()
        return Case(model, model, X, y, must=None if batch_first else "row")

    return build


def coupled_with_a_first_batch_of_one_row():
    case = recurrent(nn.GRU, False)()
    return Case(case.model, case.twin, [(case.X[:1], case.y[:1]), (case.X[1:], case.y[1:])], None, must="row")


# -- dtypes ------------------------------------------------------------------------------------------------------------


class Autocast(Net):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x)


def autocast_inside():
    return classified(Autocast(), must="dtype|autocast|float")


class AutocastAndBack(Net):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = super().forward(x)
        return x.float()


def autocast_hidden():
    return classified(AutocastAndBack(), must="dtype|autocast|float")


class Floats(Net):
    def forward(self, x):
        return super().forward(x).float()


def float_at_the_end():
    return classified(Floats(), must="dtype|float", dtype=D)


class Fourier(nn.Module):
    """Complex weights, and an odd number of parameters: every other row of a matrix starts at an odd place."""

    def __init__(self):
        super().__init__()
        self.w, self.a, self.c = nn.Parameter(torch.randn(3, 2)), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        waves = torch.fft.rfft(torch.tanh(self.a(x)), dim=1) * torch.view_as_complex(self.w)
        return self.c(torch.fft.irfft(waves, n=4, dim=1))


class Waves(Fourier):
    """The same, written out in real numbers."""

    def forward(self, x):
        h, angle = torch.tanh(self.a(x)), torch.arange(4.0, dtype=D)[:, None] * torch.arange(3) * (torch.pi / 2)
        re, im = h @ angle.cos(), -h @ angle.sin()
        u, v = self.w.mT
        counted = torch.tensor([0.25, 0.5, 0.25], dtype=D)
        result = ((re * u - im * v) * counted) @ angle.cos().mT - ((re * v + im * u) * counted) @ angle.sin().mT
        return self.c(result)


def complex_weights():
    model, twin = Fourier().double(), Waves().double()
    twin.load_state_dict(model.state_dict())
    return classified(model, twin)


class PlainTensor(Net):
    def __init__(self):
        super().__init__()
        self.mix = torch.eye(5) + 0.1

    def forward(self, x):
        return self.c(torch.tanh(self.a(x)) @ self.mix)


def plain_tensor_attribute():
    model, twin = PlainTensor(), PlainTensor().double()
    twin.load_state_dict(model.state_dict())
    twin.mix = model.mix.double()
    return classified(model, twin, must="right or told", dtype=D)


# -- what cannot be ----------------------------------------------------------------------------------------------------


class Writes(Net):
    def forward(self, x):
        x += 1
        return super().forward(x)


class WritesNot(Net):
    def forward(self, x):
        return super().forward(x + 1)


def writes_into_its_input():
    model, twin = Writes().double(), WritesNot().double()
    twin.load_state_dict(model.state_dict())
    return classified(model, twin, must="right or told")


def lazy():
    X, y = data()
    return Case(nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.Linear(5, 3)), None, X, y, must="Lazy|initialis")


class TwoOutputs(Net):
    def forward(self, x):
        return super().forward(x), x


def returns_a_tuple():
    return classified(TwoOutputs().double(), must="per_sample_loss")


def bag():
    generator = torch.Generator().manual_seed(1)
    X, y = torch.randint(7, (30, 3), generator=generator), torch.randint(3, (30,), generator=generator)
    model = nn.Sequential(nn.EmbeddingBag(7, 4), nn.Tanh(), nn.Linear(4, 3)).double()

    class Gathered(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.out = model[0].weight, model[2]

        def forward(self, x):
            return self.out(torch.tanh(self.weight[x].mean(1)))

    return Case(model, Gathered(), X, y, must="right or told")


def frequency_scaled():
    X = torch.arange(30).reshape(15, 2) % 7
    model = nn.Sequential(nn.Embedding(7, 2, scale_grad_by_freq=True), nn.Flatten(), nn.Linear(4, 3)).double()
    return Case(model, None, X, torch.arange(15) % 3, must="scale_grad_by_freq")


CASES = {
    "torch.compile": compiled,
    "compile in place": compiled_in_place,
    "a compiled layer": compiled_layer,
    "replaced forward": replaced_forward,
    "partial as forward": partial_forward,
    "bound method as forward": bound_forward,
    "lambda over self": lambda_over_self,
    "bound method as attribute": bound_method,
    "layers in a list": held(lambda a, c: [a, c]),
    "layers in a tuple": held(lambda a, c: (a, c)),
    "layers in a dict": held(lambda a, c: {"a": a, "c": c}),
    "layers in an ordered dict": held(lambda a, c: OrderedDict(a=a, c=c)),
    "layers in a deque": held(lambda a, c: deque([a, c])),
    "layers in a namedtuple": held(lambda a, c: Pair(a, c)),
    "parameters in containers": parameters_in_containers,
    "hook bound to the original": hook_bound_to_the_original,
    "DataParallel": data_parallel,
    "torch.fx": fx_graph,
    "torch.export": exported,
    "penalty in the loss": penalty_in_the_loss,
    "penalty of one layer in the loss": loss_of_a_layer,
    "weight_norm": weight_norm(True),
    "weight_norm without bias": weight_norm(False),
    "spectral_norm": spectral_norm,
    "custom function, detached": custom_function(Cube.apply),
    "custom function, once differentiable": custom_function(OnceCube.apply),
    "PReLU, rows = classes": prelu_rows_are_classes,
    "LSTM": recurrent(nn.LSTM, True),
    "LSTM, rows second": recurrent(nn.LSTM, False),
    "GRU, rows second": recurrent(nn.GRU, False),
    "RNN, rows second": recurrent(nn.RNN, False),
    "coupled rows, first batch of one": coupled_with_a_first_batch_of_one_row,
    "autocast inside": autocast_inside,
    "autocast inside, and back": autocast_hidden,
    "float() at the end": float_at_the_end,
    "complex weights": complex_weights,
    "plain tensor attribute": plain_tensor_attribute,
    "writes into its input": writes_into_its_input,
    "Lazy": lazy,
    "returns a tuple": returns_a_tuple,
    "EmbeddingBag": bag,
    "scale_grad_by_freq": frequency_scaled,
}
