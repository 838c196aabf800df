"""What the first pass refuses: rows that are coupled, losses that are not finite, embeddings that count."""

import pytest
import torch
from definitions import definition_of
from facts import LAYERED, LOOSE, accepting
from torch import nn

from skinvert import HessianInverter, PerSampleGradient, TorchTwiceDifferentiable


class Recurrent(nn.Module):
    """The mistake: a layer without ``batch_first`` takes the rows for its steps."""

    def __init__(self, kind, bidirectional=False):
        super().__init__()
        self.layer = getattr(nn, kind)(4, 3, bidirectional=bidirectional)
        self.head = nn.Linear(3 * (1 + bidirectional), 3)

    def forward(self, x):
        return self.head(self.layer(x.reshape(len(x), 2, 4))[0][:, -1])


class Encoder(nn.Module):
    def __init__(self, batch_first):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=batch_first)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.layer(x.reshape(len(x), 2, 4)).mean(1))


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.layer, self.function = nn.Linear(8, 3), function

    def forward(self, x):
        return self.function(self.layer(x))


def last_sees_first(f):
    return torch.cat([f[:-1], f[-1:] + f[:1]]) if len(f) > 1 else f


def middle_sees_first(f):
    middle = torch.arange(len(f), device=f.device) == len(f) // 2
    return f + f[:1] * middle[:, None] if len(f) > 1 else f


COUPLED = {
    "lstm": lambda: Recurrent("LSTM"),
    "gru": lambda: Recurrent("GRU"),
    "rnn": lambda: Recurrent("RNN"),
    "bidirectional": lambda: Recurrent("LSTM", bidirectional=True),
    "transformer": lambda: Encoder(batch_first=False),
    "batch_norm": lambda: Function(lambda f: nn.functional.batch_norm(f, None, None, training=True)),
    "softmax_over_rows": lambda: Function(lambda f: f.softmax(0)),
    "cumsum": lambda: Function(lambda f: f.cumsum(0)),
    "last": lambda: Function(last_sees_first),
    "middle": lambda: Function(middle_sees_first),
    "mean": lambda: Function(lambda f: f - f.mean()),
}
ALONE = {
    "transformer": lambda: Encoder(batch_first=True),
    "instance_norm": lambda: Function(lambda f: nn.functional.instance_norm(f[:, None])[:, 0]),
    "group_norm": lambda: Function(lambda f: nn.functional.group_norm(f, 1)),
}


def data(n=6):
    return torch.randn(n, 8), torch.randint(3, (n,))


# A first batch of one row shows nothing, and a method may join batches of one row.
@pytest.mark.parametrize("batches", ["one", "first_of_one_row", "all_of_one_row"])
@pytest.mark.parametrize("model", COUPLED)
def test_coupled_rows_are_refused(model, batches):
    X, y = data()
    sizes = {"one": [6], "first_of_one_row": [1, 5], "all_of_one_row": [1] * 6}[batches]
    parts = list(zip(X.split(sizes), y.split(sizes), strict=True))
    message = "must be (one row's own|able to take a batch of one row)|Expected more than 1 value"
    with pytest.raises(ValueError, match=message):
        HessianInverter("cg", 5.0, loss="cross_entropy", curvature="ggn").fit(COUPLED[model](), parts)


@pytest.mark.parametrize("model", ALONE)
def test_rows_alone_are_taken(model):
    HessianInverter("cg", 5.0, loss="cross_entropy", curvature="ggn").fit(ALONE[model](), data())


def test_the_hint_names_batch_first():
    with pytest.raises(ValueError, match=r"batch_first=True"):
        PerSampleGradient(Recurrent("LSTM"), loss="cross_entropy").fit(*data())


def test_a_squeeze_of_the_rows():
    with pytest.raises(ValueError, match=r"squeeze\(-1\)"):
        HessianInverter("cg", 1.0, loss="mse").fit(Function(lambda f: f[:, :1].squeeze()), (data()[0], torch.zeros(6)))


def test_a_program_of_one_batch_size():
    class OfTwelve(nn.Linear):
        def forward(self, x):
            # As the guards of an exported program do.
            assert len(x) == 12, "Guard failed: x.size()[0] == 12"
            return super().forward(x)

    with pytest.raises(ValueError, match="able to take a batch of one row.*Guard failed"):
        HessianInverter("cg", 1.0, loss="mse").fit(OfTwelve(4, 3), (torch.randn(12, 4), torch.randn(12, 3)))


def test_the_losses_of_a_subclass_are_held_alone_too():
    class Pairs(TorchTwiceDifferentiable):
        def outputs(self, module, batch):
            return {"logits": module(batch[0])}

        def per_sample_loss(self, outputs, batch):
            # Contrastive: each row against the mean of its batch.
            return (outputs["logits"] - outputs["logits"].mean(0)).square().sum(1)

    with pytest.raises(ValueError, match="one row's own"):
        HessianInverter("cg", 1.0).fit(Pairs(nn.Linear(8, 3), None), data())


# A branch on values may be taken late.
LATE = {
    "mean": lambda f, late: f - late * f.mean(0),
    "neighbour": lambda f, late: f + late * f.roll(1, 0),
    "random": lambda f, late: f + 0.1 * late * torch.randn_like(f),
}


class Late(Function):
    def forward(self, x):
        return self.function(self.layer(x), (x[:, :1] > 0.5).any())


def late(kind, sizes):
    """Return a model and batches, of whose twenty rows the last six make the model do what it did not before."""
    X, y = torch.randn(20, 8), torch.randint(3, (20,))
    X[:, 0] = torch.arange(20) >= 14
    return Late(LATE[kind]), list(zip(X.split(sizes), y.split(sizes), strict=True))


@pytest.mark.parametrize("kind", LATE)
@pytest.mark.parametrize("curvature", ["hessian", "ggn", "empirical_fisher"])
def test_rows_coupled_or_random_in_a_late_batch(kind, curvature):
    model, batches = late(kind, 4)
    with pytest.raises(ValueError, match=r"one row's own and the same on every call.*of the data, in batch 3"):
        HessianInverter("cg", 5.0, loss="cross_entropy", curvature=curvature).fit(model, batches)


def test_random_in_a_late_batch_of_one_row():
    model, batches = late("random", 1)
    with pytest.raises(ValueError, match=r"Row 14 of the data, in batch 14"):
        HessianInverter("cg", 5.0, loss="cross_entropy", curvature="ggn").fit(model, batches)


def test_late_coupling_in_per_sample_gradients():
    model, batches = late("mean", 4)
    with pytest.raises(ValueError, match="one row's own"):
        PerSampleGradient(model, loss="cross_entropy").fit(batches)


def test_one_row_at_a_jump_is_told():
    class Jump(Function):
        def forward(self, x):
            # As rounding may: one row goes the other way in a batch of its own size.
            return self.layer(x) + (x[:, :1] > 5) * (len(x) != 6)

    X, y = data(12)
    X[9, 0] = 9.0
    with pytest.warns(UserWarning, match=r"Row 9 of the data, in batch 1"):
        HessianInverter("cg", 5.0, loss="cross_entropy", curvature="ggn", batch_size=6).fit(Jump(None), (X, y))


# -- not finite ----------------------------------------------------------------------------------------------------


def overflowing():
    net = nn.Sequential(nn.Linear(8, 4), nn.Softplus(), nn.Linear(4, 3))
    X, y = data(12)
    X[7] = 1e38
    with torch.no_grad():
        net[0].weight.fill_(1.0)
    return net, X, y


@pytest.mark.parametrize("curvature", ["hessian", "ggn", "empirical_fisher"])
def test_an_overflow_names_batch_and_layer(curvature):
    net, X, y = overflowing()
    with pytest.raises(ValueError, match=r"batch 1 \(rows 5 to 9\): the first layer .* is 0 \(Linear\)"):
        HessianInverter("cg", 1.0, loss="cross_entropy", curvature=curvature, batch_size=5).fit(net, (X, y))


def test_an_overflow_in_per_sample_gradients():
    net, X, y = overflowing()
    with pytest.raises(ValueError, match=r"batch 0 \(rows 0 to 11\): the first layer .* is 0 \(Linear\)"):
        PerSampleGradient(net, loss="cross_entropy").fit(X, y)


def test_a_loss_that_overflows_names_the_row():
    X, y = data(12)[0], torch.zeros(12, 3)
    y[9] = 3e38
    with pytest.raises(ValueError, match=r"batch 1 \(rows 8 to 11\): that of row 9"):
        HessianInverter("cg", 1.0, loss="mse", batch_size=8).fit(nn.Linear(8, 3), (X, y))


def test_a_gradient_that_alone_is_not_finite():
    X, y = data()
    net = Function(lambda f: torch.where(f > 0, (f * 0).sqrt(), f * 0))
    with pytest.raises(ValueError, match="though the loss is finite"):
        HessianInverter("cg", 1.0, loss="cross_entropy").fit(net, (X, y))


def test_parameters_that_are_not_finite_are_named():
    net = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 3))
    with torch.no_grad():
        net[1].bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"Look at the parameters: 1\.bias is not finite"):
        HessianInverter("cg", 1.0, loss="cross_entropy").fit(net, data())


# -- embeddings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_scale_grad_by_freq_is_refused_by_name(kind):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = kind(9, 3, scale_grad_by_freq=True), nn.Linear(3, 3)

        def forward(self, x):
            f = self.words(x)
            return self.head(f if f.ndim == 2 else f.mean(1))

    with pytest.raises(ValueError, match=r"'words' must be without scale_grad_by_freq"):
        HessianInverter("cg", 1.0, loss="cross_entropy").fit(Words(), (torch.randint(9, (6, 4)), data()[1]))


def test_scale_grad_by_freq_in_a_function_is_refused():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(9, 3))

        def forward(self, x):
            return nn.functional.embedding(x, self.weight, scale_grad_by_freq=True).mean(1)

    with pytest.raises(ValueError, match="scale_grad_by_freq"):
        HessianInverter("cg", 1.0, loss="cross_entropy").fit(Words(), (torch.randint(9, (6, 4)), data()[1]))


# -- parameters that only some batches reach -----------------------------------------------------------------------


class Two(nn.Module):
    """Rows of one sign take one layer, the others the other; a third is never used."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.never = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        return torch.stack([self.a(row) if row[0] > 0 else self.b(row) for row in x])


# Its rows are modules of their own, which no Kronecker product takes.
METHODS = [name for name in accepting("hessian") if name not in LAYERED]


def two_and_data():
    torch.manual_seed(0)
    X = torch.randn(8, 2, dtype=torch.float64)
    X = X[X[:, 0].argsort()]
    return Two().double(), X, torch.randn(8, 2, dtype=torch.float64)


def matrix_of(X, params):
    """Return mse's H, 2 Σ xxᵀ / (n c) for each output, of the rows that reach a layer; the outputs are linear in θ."""
    total = torch.zeros(6, 6, dtype=torch.float64)
    for x in X if params == "a.*" else []:
        if x[0] > 0:
            for c in range(2):
                row = torch.zeros(6, dtype=torch.float64)
                row[2 * c : 2 * c + 2], row[4 + c] = x, 1.0
                total += torch.outer(row, row)
    return total / 8


@pytest.mark.parametrize("params", ["a.*", "never.*"])
@pytest.mark.parametrize("curvature", ["hessian", "ggn", "fisher"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:.*reach")
def test_parameters_of_some_batches(method, curvature, params):
    net, X, y = two_and_data()
    H, b = matrix_of(X, params), torch.randn(2, 6, dtype=torch.float64)
    settings = {"loss": "mse", "curvature": curvature, "params": params, "batch_size": 2, "random_state": 0}
    inverter = HessianInverter(method, 0.5, **settings).fit(net, (X, y))
    expected = torch.from_numpy(definition_of(method)(None, curvature, H.numpy(), 0.5, b.numpy()))
    tolerance = 0.05 if method in LOOSE else 1e-6
    torch.testing.assert_close(inverter.transform(b), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("curvature", ["hessian", "ggn", "fisher", "empirical_fisher"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:.*reach")
def test_blocks_of_some_batches(method, curvature):
    net, X, y = two_and_data()
    settings = {"loss": "mse", "curvature": curvature, "blocks": "layer", "batch_size": 2, "random_state": 0}
    inverter = HessianInverter(method, 0.5, **settings).fit(net, (X, y))
    assert torch.isfinite(inverter.transform(torch.ones(1, 18, dtype=torch.float64))).all()
