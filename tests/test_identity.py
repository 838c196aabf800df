"""What tells jobs apart: numbers that changed code changes, and rounding does not."""

import pytest
import torch
from torch import nn

from skinvert import HessianInverter
from skinvert.identity import _text, numbers_of

PARTS = [slice(0, 1000), slice(1000, 1003), slice(1003, 2000)]


def row(dtype=torch.float32):
    x = torch.randn(2000, dtype=dtype, generator=torch.Generator().manual_seed(0))
    x[PARTS[1]] *= 1e-2
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("part", PARTS)
def test_each_part_counts_by_itself(part, dtype):
    x = row(dtype)
    half = torch.finfo(dtype).eps ** 0.5
    own = numbers_of(x, PARTS)
    assert own.are(numbers_of(x, PARTS).sums)
    for change, same in [(1 + half, True), (1 + 100 * half, False), (-1, False)]:
        other = x.clone()
        other[part] *= change
        assert own.are(numbers_of(other, PARTS).sums) == same


def test_what_cancels_in_a_sum_is_seen():
    x = torch.ones(2000)
    other = x.clone()
    other[:500], other[500:1000] = 1.1, 0.9
    assert not numbers_of(x, PARTS).are(numbers_of(other, PARTS).sums)


def test_a_part_of_zeros_may_be_rounding_of_the_others():
    x = row()
    x[PARTS[1]] = 0
    noise, more = x.clone(), x.clone()
    noise[PARTS[1]] = torch.finfo(x.dtype).eps * x.norm()
    more[PARTS[1]] = 100 * torch.finfo(x.dtype).eps * x.norm()
    own = numbers_of(x, PARTS)
    assert own.are(numbers_of(noise, PARTS).sums)
    assert not own.are(numbers_of(more, PARTS).sums)


@pytest.mark.parametrize(
    "found", [None, 1.0, torch.zeros(2, 8), torch.zeros(3, 8).double() * torch.nan, torch.zeros(3, 8)]
)
def test_what_no_job_left_is_another(found):
    x = torch.zeros(2000)
    assert not numbers_of(x, PARTS).are(found)


class Attention(nn.Module):
    """The bias of its keys changes no output: derivatives by it are rounding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.query, self.key, self.value, self.last = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        q, k, v = self.query(x), self.key(x), self.value(x)
        return self.last((q @ k.mT / 4).softmax(-1) @ v).mean(1)


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_another_order_of_sums_is_no_other_code(curvature):
    net = Attention()
    X, y = torch.randn(64, 9, 16), torch.randint(16, (64,))
    orders = [torch.arange(64), torch.randperm(64)]
    found = []
    for order in orders:
        fitted = HessianInverter("cg", 0.1, curvature=curvature, loss="cross_entropy").fit(net, (X[order], y[order]))
        A = fitted.curvature_
        (batch, weights), v = next(iter(A.objective.batches)), torch.randn(1, A.size, generator=seeded())
        parts = list(A.objective.layout.slices.values())
        found.append(numbers_of(A.graph(batch, weights)(v), parts))
    one, other = found
    assert float((one.sums - other.sums).abs().max()) > 0
    assert one.are(other.sums)


def seeded():
    return torch.Generator().manual_seed(0)


def test_the_settings_of_torchs_losses_tell():
    settings = ({}, {"label_smoothing": 1e-6}, {"weight": torch.tensor([1.0, 2.0])})
    losses = [nn.CrossEntropyLoss(**own) for own in settings]
    assert len({_text(loss) for loss in losses}) == 3
    assert _text(nn.CrossEntropyLoss()) == _text(nn.CrossEntropyLoss())
