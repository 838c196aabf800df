"""A user's function as a loss: every batch counts, shapes are its own affair, and what is no average is refused."""

from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from skinvert import HessianInverter, PerSampleGradient
from skinvert.models.losses import CallableLoss

N = 24
CURVATURES = ["hessian", "ggn", "empirical_fisher"]


def network(c):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, c)).double()


def inputs():
    torch.manual_seed(1)
    return torch.randn(N, 3, dtype=torch.float64)


def labels(rare):
    """Two classes, and a third one (or an ignored target) in the last batches alone."""
    y = torch.arange(N) % 2
    y[-5::2] = rare
    return y


def oracle(net, value):
    """The dense Hessian of a function of the outputs of all rows, by torch's own double backward."""
    theta = list(net.parameters())
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, theta, create_graph=True)])
    rows = [torch.autograd.grad(g, theta, retain_graph=True, materialize_grads=True) for g in gradient]
    return torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])


def fitted(net, loss, data, batch_size=8, curvature="hessian"):
    return HessianInverter("direct", 20.0, loss=loss, batch_size=batch_size, curvature=curvature).fit(net, data)


WEIGHT = torch.tensor([1.0, 1.0, 9.0], dtype=torch.float64)
# The first batches tell nothing: equal weights, no ignored target.
LATE = {
    "class weights": (lambda f, y: F.cross_entropy(f, y, weight=WEIGHT), 2),
    "ignored targets": (lambda f, y: F.cross_entropy(f, y), -100),
    "a masked mean": (
        lambda f, y: (F.mse_loss(f[:, 0], y.double(), reduction="none") * (y < 2)).sum() / (y < 2).sum(),
        2,
    ),
}


@pytest.mark.parametrize(("loss", "rare"), LATE.values(), ids=LATE.keys())
@pytest.mark.parametrize("batch_size", [1, 4, 8])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_every_batch_is_held_against_the_callable(loss, rare, batch_size, curvature):
    with pytest.raises(ValueError, match="on every batch.*loss module"):
        fitted(network(3), loss, (inputs(), labels(rare)), batch_size, curvature)


def test_batches_of_one_class_each_are_held_against_each_other():
    # Within a batch every weight is the same; 90 batches, of which one has the rare class.
    X, y = inputs().repeat(8, 1)[:180], torch.zeros(180, dtype=torch.long)
    y[150:152] = 2
    with pytest.raises(ValueError, match="on every batch"):
        fitted(network(3), LATE["class weights"][0], (X, y), batch_size=2)


def test_per_sample_gradients_are_checked_too():
    with pytest.raises(ValueError, match="on every batch"):
        PerSampleGradient(network(3), loss=LATE["class weights"][0], batch_size=8).fit(inputs(), labels(2))


def test_the_module_is_right_where_the_callable_is_refused():
    net, X, y = network(3), inputs(), labels(-100)
    received = fitted(net, nn.CrossEntropyLoss(), (X, y)).curvature_.to_dense()
    expected = oracle(net, F.cross_entropy(net(X), y))
    assert (received - expected).norm() <= 1e-12 * expected.norm()


def heteroscedastic(f, y):
    return (0.5 * f[:, 1] + 0.5 * (f[:, 0] - y) ** 2 * torch.exp(-f[:, 1])).mean()


def quantiles(f, y):
    r = (f - y[:, None]) * torch.tensor([1.0, -1.0], dtype=f.dtype)
    return F.softplus(3 * r).sum(1)


def mixture(f, y):
    centres = torch.tensor([-1.0, 1.0], dtype=f.dtype)
    return -(f.log_softmax(1) - 0.5 * (y[:, None] - centres) ** 2).logsumexp(1).sum() / len(f)


@pytest.mark.parametrize("loss", [heteroscedastic, quantiles, mixture])
@pytest.mark.parametrize("batch_size", [1, 2, 7, None])
def test_targets_of_another_shape_than_the_outputs(loss, batch_size):
    net, X = network(2), inputs()
    y = X.sum(1)
    received = fitted(net, loss, (X, y), batch_size).curvature_.to_dense()
    expected = oracle(net, loss(net(X), y).mean())
    assert (received - expected).norm() <= 1e-12 * expected.norm()


def test_one_column_against_flat_targets():
    net, X = network(1), inputs()
    y = X.sum(1)
    received = fitted(net, lambda f, y: F.mse_loss(f.squeeze(1), y), (X, y)).curvature_.to_dense()
    expected = oracle(net, F.mse_loss(net(X)[:, 0], y))
    assert (received - expected).norm() <= 1e-12 * expected.norm()


SQUEEZED = {
    "mse": (1, lambda f, y, **how: F.mse_loss(f.squeeze(), y.double(), **how)),
    "bce": (1, lambda f, y, **how: F.binary_cross_entropy_with_logits(f.squeeze(), (y > 0).double(), **how)),
    "cross_entropy": (3, lambda f, y, **how: F.cross_entropy(f.squeeze(), y, **how)),
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("batch_size", [N - 1, 7, None])
@pytest.mark.parametrize(("c", "squeezed"), SQUEEZED.values(), ids=SQUEEZED.keys())
def test_outputs_without_the_axis_of_a_single_row(c, squeezed, batch_size, reduction):
    net, X, y = network(c), inputs(), labels(2)
    loss = partial(squeezed, reduction=reduction)
    received = fitted(net, loss, (X, y), batch_size).curvature_.to_dense()
    expected = oracle(net, squeezed(net(X), y))
    assert (received - expected).norm() <= 1e-12 * expected.norm()


def test_no_warning_of_how_the_callable_is_batched(recwarn):
    net, X = network(3), inputs()
    y = X.softmax(1)
    received = fitted(net, lambda f, y: F.kl_div(f.log_softmax(1), y, reduction="batchmean"), (X, y))
    expected = oracle(net, F.cross_entropy(net(X), y))
    assert (received.curvature_.to_dense() - expected).norm() <= 1e-12 * expected.norm()
    assert not recwarn.list


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("reduce", [torch.mean, torch.sum, lambda v: v, lambda v: v.mean(1)])
def test_a_broadcast_is_refused(reduce, batch_size):
    X = inputs()
    with pytest.raises(ValueError, match="The loss callable"):
        fitted(network(1), lambda f, y: reduce((f - y) ** 2), (X, X.sum(1)), batch_size)


@pytest.mark.parametrize("m", [1, 2, 3, 6])
def test_one_value_a_class_is_not_one_a_row(m):
    X, y = inputs(), labels(2)
    with pytest.raises(ValueError, match="a scalar, or one value per row"):
        fitted(network(3), lambda f, y: (f - F.one_hot(y, 3)).square().mean(0), (X, y), m)


def test_values_that_see_other_rows_are_refused():
    with pytest.raises(ValueError, match="each of its own row"):
        fitted(network(3), lambda f, _: (f @ f.mT).logsumexp(1), (inputs(), labels(2)))


def test_a_penalty_in_a_sum_is_named():
    def loss(f, y):
        return ((f[:, 0] - y) ** 2).sum() + 0.3

    with pytest.raises(ValueError, match=r"a sum plus 0\.3.*weight_decay="):
        fitted(network(1), loss, (inputs(), inputs().sum(1)))


@pytest.mark.parametrize(
    "loss", [lambda f, y: F.cross_entropy(f.detach(), y), lambda f, y: (f.argmax(1) == y).double().mean()]
)
def test_a_loss_without_a_gradient_is_refused(loss):
    with pytest.raises(ValueError, match="differentiable in the outputs"):
        fitted(network(3), loss, (inputs(), labels(2)))


def fail():
    raise AssertionError("of one shape")


FAULTS = {
    "one argument": (lambda f: f.sum(), ValueError, r"\(output, target\).*positional argument"),
    "shapes": (
        lambda f, y: (f @ y.double()).sum(),
        ValueError,
        r"\(output, target\).*shape \(8, 3\) and y of shape \(8,\)",
    ),
    "a class that is not there": (lambda f, y: F.cross_entropy(f, y + 1), ValueError, "out of bounds"),
    "a check of its own": (lambda f, y: F.mse_loss(f, y) if f.shape == y.shape else fail(), ValueError, "of one shape"),
    "a number": (lambda f, y: F.cross_entropy(f, y).item(), TypeError, "a tensor"),
}


@pytest.mark.parametrize(("loss", "kind", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_in_the_callable_says_what_it_got(loss, kind, message):
    with pytest.raises(kind, match=message):
        fitted(network(3), loss, (inputs(), labels(2)))


class Pair(NamedTuple):
    centre: torch.Tensor
    weight: torch.Tensor


def of_mapping(f, y):
    return (y["weight"] * ((f[:, 0] - y["centre"]) ** 2 + f[:, 1] ** 4)).mean()


def of_pair(f, y):
    return (y.weight * ((f[:, 0] - y.centre) ** 2 + f[:, 1] ** 4)).sum()


@pytest.mark.parametrize("kind", ["mapping", "namedtuple"])
def test_targets_of_several_tensors(kind):
    f = torch.randn(N, 2, dtype=torch.float64)
    centre, weight = torch.randn(N, dtype=torch.float64), torch.rand(N, dtype=torch.float64)
    mapping = kind == "mapping"
    y = {"centre": centre, "weight": weight} if mapping else Pair(centre, weight)
    loss = CallableLoss(of_mapping if mapping else of_pair)
    loss.check(f, y)
    loss.verify(f, y)
    assert loss.kind == ("mean" if mapping else "sum")
    received = loss.per_sample(f, y)
    assert np.allclose(received, weight * ((f[:, 0] - centre) ** 2 + f[:, 1] ** 4), rtol=1e-12)
    loss.verify_values(f, y, received)
    with pytest.raises(ValueError, match="on every batch"):
        loss.verify_values(f, y, 1.01 * received)


def test_batches_with_a_mapping_of_targets():
    net, X = network(2), inputs()
    y = {"centre": X.sum(1), "weight": X[:, 0].square()}
    batches = [(X[a : a + 7], {key: value[a : a + 7] for key, value in y.items()}) for a in range(0, N, 7)]
    expected = oracle(net, of_mapping(net(X), y))
    received = HessianInverter("direct", 100.0, loss=of_mapping).fit(net, batches).curvature_.to_dense()
    assert (received - expected).norm() <= 1e-12 * expected.norm()
    ggn = HessianInverter("direct", 100.0, loss=of_mapping, curvature="ggn").fit(net, batches).curvature_
    V = torch.eye(ggn.size, dtype=torch.float64)
    assert (ggn.to_dense() - ggn.apply(V)).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize(
    "y", [{"a": torch.zeros(3)}, {"a": torch.zeros(8), "b": torch.zeros(7)}, {"a": torch.tensor(1.0)}]
)
def test_targets_of_other_lengths_are_refused(y):
    with pytest.raises(ValueError, match="of the same length"):
        CallableLoss(of_mapping).check(torch.zeros(8, 2), y)


def test_no_tensor_as_target_is_refused():
    with pytest.raises(TypeError, match="a mapping or tuple of tensors"):
        CallableLoss(of_mapping).check(torch.zeros(8, 2), {"a": "text"})


def test_tiny_losses_are_classified():
    f, y = torch.randn(9, 2, dtype=torch.float64), torch.randint(2, (9,))
    for scale in (1e-9, 1e9):
        for kind, reduction in (("mean", "mean"), ("sum", "sum"), ("none", "none")):

            def scaled(f, y, scale=scale, reduction=reduction):
                return scale * F.cross_entropy(f, y, reduction=reduction)

            loss = CallableLoss(scaled)
            loss.verify(f, y)
            assert loss.kind == kind


@pytest.mark.parametrize("reduce", [lambda v: v, lambda v: v.sum(1), lambda v: v.sum(1).mean(), torch.sum])
def test_gradients_of_other_rows_than_the_fitted_ones(reduce):
    net, X = network(2), inputs()
    y = X[:, :2] ** 2
    rows = PerSampleGradient(net, loss=lambda f, y: reduce((f - y) ** 4), batch_size=7).fit(X, y)
    received = rows.transform((X[:3], y[:3]))
    # All elements are averaged, rows are.
    scale = 0.5 if reduce(torch.zeros(3, 2)).ndim == 2 else 1.0
    for i in range(3):
        value = scale * ((net(X[i]) - y[i]) ** 4).sum()
        expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(value, list(net.parameters()))])
        assert torch.allclose(received[i], expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_weights_show_where_all_losses_are_the_same(dtype, reduction):
    # Of a last layer that starts at zero: any weighted mean of equal losses is their mean.
    weights = torch.tensor([1.0, 5.0, 1.0], dtype=dtype)

    def weighted(output, target):
        own, shares = F.cross_entropy(output, target, reduction="none"), weights[target]
        total = (own * shares).sum() / shares.sum()
        return total if reduction == "mean" else len(output) * total

    net = nn.Linear(2, 3).to(dtype)
    for tensor in net.parameters():
        nn.init.zeros_(tensor)
    data = torch.randn(6, 2, dtype=dtype), torch.tensor([0, 1, 2, 0, 1, 1])
    with pytest.raises(ValueError, match="The loss callable must be a mean or a sum"):
        HessianInverter("direct", 1.0, loss=weighted).fit(net, data)
