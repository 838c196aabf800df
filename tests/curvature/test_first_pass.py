"""The first pass over the data: inputs that a model changes, and parameters that no loss reaches."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import Oracle, matrix_error, oracle_matrix
from problems import problem
from torch import nn
from torch.utils.checkpoint import checkpoint

from skinvert import HessianInverter, PerSampleGradient


class Writing(nn.Module):
    """Shifts its input in place, where there is something to shift, and shifts it back in its first layer."""

    def __init__(self, inner, always):
        super().__init__()
        self.inner, self.always = inner, always

    def forward(self, x):
        if self.always or bool((x > 1.5).any()):
            x[:, 0].add_(1.0)
            return self.inner(x - torch.eye(4, dtype=x.dtype)[0])
        return self.inner(x)


@pytest.mark.parametrize("always", [True, False])
@pytest.mark.parametrize("curvature", ["hessian", "ggn", "empirical_fisher"])
def test_inputs_are_kept(curvature, always):
    case = problem("mlp", "cross_entropy")
    net, X = Writing(case.module, always), case.X.clone()
    settings = {"loss": "cross_entropy", "batch_size": 2}
    inverter = HessianInverter("cg", 1.0, curvature=curvature, **settings).fit(net, (X, case.y))
    assert matrix_error(inverter.curvature_.to_dense(), oracle_matrix(case, curvature)) <= 1e-12
    inverter.transform(case.right_hand_sides(2))
    inverter.score(X, case.y)
    rows = PerSampleGradient(net, **settings).fit_transform(X, case.y)
    np.testing.assert_allclose(rows, Oracle(case).gradient_rows(), rtol=1e-9, atol=1e-12)
    assert torch.equal(X, case.X)


def test_inputs_are_kept_row_by_row():
    class Recurrent(nn.Module):
        # No batching rule.
        def __init__(self):
            super().__init__()
            self.inner, self.out = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 3)

        def forward(self, x):
            x += 1.0
            return self.out(self.inner(x.reshape(-1, 2, 2))[0][:, -1])

    X = torch.zeros(5, 4)
    rows = PerSampleGradient(Recurrent(), loss="cross_entropy").fit(X, Y[:5]).transform((X, Y[:5]))
    assert not X.any()
    torch.testing.assert_close(rows[0], rows[3])


def test_targets_are_kept():
    case = problem("mlp", "mse")
    y = case.y.clone()

    def each(output, target):
        return (output - target.mul_(0.5)).square().mean(1)

    with pytest.raises(ValueError, match="must be one that leaves its targets as they are. Got changed targets"):
        HessianInverter("direct", 1.0, loss=each).fit(case.module, (case.X, y))
    assert torch.equal(y, case.y)


class Detached(nn.Module):
    """A branch that `detach` cuts off, and one that only large inputs take."""

    def __init__(self):
        super().__init__()
        self.main, self.cut, self.rare = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        f = self.main(x) + self.cut(x).detach()
        large = x[:, :1] > 0.5
        return f + large * self.rare(x) if bool(large.any()) else f


X, Y = torch.linspace(0, 1, 48).reshape(12, 4), torch.arange(12) % 3
MESSAGE = r"depends on cut\.weight, cut\.bias instead"


def test_unreached_parameters_are_named_once():
    with pytest.warns(UserWarning, match=MESSAGE) as caught:
        inverter = HessianInverter("cg", 1.0, loss="cross_entropy", batch_size=1).fit(Detached(), (X, Y))
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inverter.score(X, Y)
    with pytest.warns(UserWarning, match=MESSAGE):
        PerSampleGradient(Detached(), loss="cross_entropy", batch_size=1).fit(X, Y)


def test_blocks_do_not_name_them_again():
    settings = {"loss": "cross_entropy", "batch_size": 1, "blocks": "layer"}
    with pytest.warns(UserWarning, match=MESSAGE) as caught:
        HessianInverter("direct", 1.0, **settings).fit(Detached(), (X, Y))
    assert len(caught) == 1


def test_a_forward_pass_without_gradients():
    class Ungraded(nn.Linear):
        def forward(self, x):
            with torch.no_grad():
                return super().forward(x)

    with pytest.warns(UserWarning, match="depends on weight, bias instead"):
        HessianInverter("direct", 1.0, loss="cross_entropy").fit(Ungraded(4, 3), (X, Y))


def test_parameters_that_are_left_out_are_not_named():
    inverter = HessianInverter("direct", 1.0, loss="cross_entropy", params=["main*", "rare*"], batch_size=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inverter.fit(Detached(), (X, Y))


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.inner, self.use_reentrant = nn.Linear(4, 3), use_reentrant

    def forward(self, x):
        return checkpoint(torch.tanh, self.inner(x), use_reentrant=self.use_reentrant)


def test_checkpoints():
    net = Checkpointed(use_reentrant=False)
    received = HessianInverter("direct", 1.0, loss="cross_entropy").fit(net, (X, Y)).curvature_.to_dense()
    weight, bias = net.inner.weight, net.inner.bias

    def loss(w, b):
        return F.cross_entropy(torch.tanh(X @ w.T + b), Y)

    blocks = torch.autograd.functional.hessian(loss, (weight, bias))
    H = torch.cat([torch.cat([b.reshape(n, -1) for b in row], 1) for n, row in zip((12, 3), blocks, strict=True)])
    assert matrix_error(received, H.numpy()) <= 1e-5
    with pytest.raises(ValueError, match="use_reentrant=False"):
        HessianInverter("direct", 1.0, loss="cross_entropy").fit(Checkpointed(use_reentrant=True), (X, Y))


def test_a_static_export_says_what_it_takes():
    case = problem("mlp", "cross_entropy")
    net = torch.export.export(case.module.eval(), (case.X,)).module()
    with pytest.raises(ValueError, match="take a batch of one row.*(Guard failed|to be equal to 12)"):
        HessianInverter("direct", 1.0, loss="cross_entropy").fit(net, case.data)
