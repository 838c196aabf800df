"""Losses: callables are classified once, and what is no average of per-sample losses is refused."""

import pytest
import torch
import torch.nn.functional as F
from oracles import matrix_error, oracle_matrix
from problems import problem
from torch import nn

from skinvert import HessianInverter, PerSampleGradient
from skinvert.models.losses import Margin


def fitted(case, loss, batch_size=5):
    return HessianInverter("direct", 50.0, loss=loss, batch_size=batch_size).fit(case.module, case.data)


# Values that vmap cannot see: the callable is asked row by row.
def with_item(f, y):
    return F.cross_entropy(f, y) if f.sum().item() > -1e9 else f.sum()


class OwnMean(nn.Module):
    def forward(self, f, y):
        return F.cross_entropy(f, y)


CALLABLES = {"function": F.cross_entropy, "branching": with_item, "module": OwnMean()}


@pytest.mark.parametrize("loss", CALLABLES.values(), ids=CALLABLES.keys())
@pytest.mark.parametrize("batch_size", [1, 5, None])
def test_callable_mean(loss, batch_size):
    case = problem("mlp", "cross_entropy")
    received = fitted(case, loss, batch_size).curvature_.to_dense()
    assert matrix_error(received, oracle_matrix(case)) <= 1e-12


@pytest.mark.parametrize("batch_size", [1, 5, None])
def test_callable_of_one_value_a_row(batch_size):
    case = problem("mlp", "callable_each")
    received = fitted(case, case.loss, batch_size).curvature_.to_dense()
    assert matrix_error(received, oracle_matrix(case)) <= 1e-12


@pytest.mark.parametrize("batch_size", [1, 5, None])
def test_callable_sum(batch_size):
    case = problem("mlp", "callable_sum")
    received = fitted(case, case.loss, batch_size).curvature_.to_dense()
    assert matrix_error(received, oracle_matrix(case)) <= 1e-12


NEITHER = {
    "maximum": lambda f, y: F.cross_entropy(f, y, reduction="none").max(),
    "squared mean": lambda f, y: F.cross_entropy(f, y) ** 2,
    "mean by class weight": lambda f, y: F.cross_entropy(f, y, weight=torch.tensor([1.0, 5, 9], dtype=f.dtype)),
    "root of a sum": lambda f, y: F.cross_entropy(f, y, reduction="sum").sqrt(),
}


@pytest.mark.parametrize("loss", NEITHER.values(), ids=NEITHER.keys())
def test_neither_mean_nor_sum(loss):
    with pytest.raises(ValueError, match="a mean or a sum"):
        fitted(problem("mlp", "cross_entropy"), loss)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_neither_mean_nor_sum_is_seen_where_each_batch_has_one_class(batch_size):
    case = problem("mlp", "cross_entropy")
    order = case.y.argsort()
    counts = torch.bincount(case.y)
    assert (counts > 0).all()
    starts = [0, *counts.cumsum(0).tolist()]
    parts = [order[a:b] for a, b in zip(starts, starts[1:], strict=False)]
    batches = [(case.X[i], case.y[i]) for part in parts for i in part.split(batch_size)]
    with pytest.raises(ValueError, match="a mean or a sum"):
        HessianInverter("direct", 50.0, loss=NEITHER["mean by class weight"]).fit(case.module, batches)


def test_a_user_module_that_means_something_else():
    class Weighted(nn.MSELoss):
        def forward(self, f, y):
            value = super().forward(f, y)
            return 2 * value if self.reduction == "mean" else value

    case = problem("mlp", "mse")
    with pytest.raises(ValueError, match="average or sum"):
        fitted(case, Weighted())


def test_the_users_loss_keeps_its_reduction_and_tensors():
    case = problem("mlp", "class_weights")
    weight = case.loss.weight
    HessianInverter("direct", 50.0, loss=case.loss, dtype="float32").fit(case.module, case.data)
    assert case.loss.reduction == "mean" and case.loss.weight is weight and weight.dtype == torch.float64


class Focal(nn.Module):
    def __init__(self, reduction="mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, f, y):
        cross_entropy = F.cross_entropy(f, y, reduction="none")
        values = (1 - torch.exp(-cross_entropy)) ** 2 * cross_entropy
        return {"mean": values.mean(), "sum": values.sum(), "none": values}[self.reduction]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_users_module_of_class_labels_with_a_reduction_of_its_own(reduction):
    case = problem("mlp", "cross_entropy")
    expected = HessianInverter("direct", 50.0, loss=lambda f, y: Focal()(f, y)).fit(case.module, case.data)
    received = HessianInverter("direct", 50.0, loss=Focal(reduction)).fit(case.module, case.data)
    assert matrix_error(received.curvature_.to_dense(), expected.curvature_.to_dense().numpy()) <= 1e-12


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("wrap", [lambda loss: torch.compile(loss, backend="eager"), torch.jit.script])
def test_a_compiled_loss_counts_as_the_loss_inside_and_stays_as_it_is(wrap):
    case = problem("mlp", "cross_entropy")
    loss = nn.CrossEntropyLoss()
    compiled = wrap(loss)
    received = HessianInverter("direct", 50.0, loss=compiled).fit(case.module, case.data)
    assert matrix_error(received.curvature_.to_dense(), oracle_matrix(case)) <= 1e-12
    assert loss.reduction == compiled.reduction == "mean"


def bad(c, loss, y, match, kind=ValueError):
    net = nn.Linear(3, c).double()
    with pytest.raises(kind, match=match):
        HessianInverter("direct", 1.0, loss=loss).fit(net, (torch.randn(len(y), 3, dtype=torch.float64), y))


def test_labels_that_look_one_hot():
    y = torch.tensor([0, 1, 2, 1])
    for dtype in (torch.long, torch.uint8, torch.bool):
        bad(3, "cross_entropy", F.one_hot(y, 3).to(dtype), r"one-hot.*y\.argmax\(1\)")
    bad(3, "cross_entropy", y[:, None], r"y\.ravel\(\)")
    bad(3, "cross_entropy", y[:, None].expand(4, 2), "one class index a row")


def test_classes_in_the_last_dimension():
    net = nn.Linear(3, 4).double()
    with pytest.raises(ValueError, match="dimension 1.*transpose"):
        HessianInverter("direct", 1.0, loss="cross_entropy").fit(
            net, (torch.randn(5, 2, 3, dtype=torch.float64), torch.randint(2, (5, 2)))
        )


@pytest.mark.parametrize(
    ("loss", "y", "match"),
    [
        (nn.CrossEntropyLoss(weight=torch.ones(5)), torch.tensor([0, 1]), "one for each of 3 classes"),
        (nn.BCEWithLogitsLoss(weight=torch.ones(2, 1)), torch.zeros(2, 3), "sample_weight"),
        (nn.BCEWithLogitsLoss(pos_weight=torch.ones(2, 3)), torch.zeros(2, 3), "pos_weight.*the same for every row"),
        (nn.GaussianNLLLoss(), torch.zeros(2, 3), "GaussianNLLLoss.*callable"),
        (nn.CTCLoss(), torch.zeros(2, 3), "CTCLoss"),
    ],
)
def test_modules_that_cannot_be_served(loss, y, match):
    bad(3, loss, y, match)


def test_a_weight_of_one_row_of_outputs_is_no_weight_of_rows():
    loss, y = nn.BCEWithLogitsLoss(weight=torch.tensor([1.0, 2.0, 3.0])), torch.rand(3, 3)
    net, X = nn.Linear(3, 3).double(), torch.randn(3, 3, dtype=torch.float64)
    A = HessianInverter("direct", 1.0, loss=loss).fit(net, (X, y)).curvature_.to_dense()
    one = HessianInverter("direct", 1.0, loss=loss, batch_size=1).fit(net, (X, y)).curvature_.to_dense()
    assert matrix_error(A, one.numpy()) <= 1e-14


def test_a_users_module_is_held_against_every_batch():
    class Weighted(nn.MSELoss):
        def forward(self, f, y):
            value = super().forward(f, y)
            return 2 * value if self.reduction == "mean" and bool((y > 5).any()) else value

    case = problem("mlp", "mse")
    y = case.y.clone()
    y[-1] = 6
    with pytest.raises(ValueError, match="average or sum"):
        HessianInverter("direct", 50.0, loss=Weighted(), batch_size=5).fit(case.module, (case.X, y))


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_a_users_module_of_one_value_a_class(batch_size):
    class ByClass(nn.MSELoss):
        def forward(self, f, y):
            values = (f - y).square().mean(0)
            return values if self.reduction == "none" else values.mean()

    X, y = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="each row alone|one value per row|average or sum"):
        HessianInverter("direct", 50.0, loss=ByClass(), batch_size=batch_size).fit(nn.Linear(4, 3).double(), (X, y))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int32])
def test_the_margin_of_unsigned_labels(dtype):
    y = torch.tensor([0, 1, 1, 0])
    for c in (1, 2):
        margin = Margin()
        f = torch.randn(4, c, dtype=torch.float64)
        target = y[:, None] if c == 1 else y
        margin.check(f, target.to(dtype))
        expected = (2 * y - 1) * (f[:, 0] if c == 1 else f[:, 1] - f[:, 0])
        assert torch.allclose(margin.per_sample(f, target.to(dtype)), expected)


def test_weights_of_flat_outputs_are_of_rows():
    loss, net = nn.BCEWithLogitsLoss(pos_weight=torch.ones(4)), nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)).double()
    with pytest.raises(ValueError, match="the same for every row"):
        HessianInverter("direct", 1.0, loss=loss).fit(net, (torch.randn(4, 3).double(), torch.ones(4).double()))


def test_the_margin_of_a_net_that_gives_log_probabilities_and_of_one_probability():
    skorch = pytest.importorskip("skorch")
    X, y = torch.randn(7, 3), torch.tensor([0, 1, 2, 1, 0, 2, 2])
    linear = nn.Linear(3, 3)
    expected = PerSampleGradient(linear, loss="margin").fit_transform(X, y)
    net = skorch.NeuralNet(nn.Sequential(linear, nn.LogSoftmax(1)), criterion=nn.NLLLoss, train_split=None).initialize()
    assert torch.allclose(PerSampleGradient(net, loss="margin").fit_transform(X, y), expected, atol=1e-5)
    one, labels = nn.Linear(3, 1), (y > 0).float()[:, None]
    expected = PerSampleGradient(one, loss="margin").fit_transform(X, labels)
    net = skorch.NeuralNet(nn.Sequential(one, nn.Sigmoid()), criterion=nn.BCELoss, train_split=None).initialize()
    assert torch.allclose(PerSampleGradient(net, loss="margin").fit_transform(X, labels), expected, atol=1e-5)
