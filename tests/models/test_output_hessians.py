"""Second derivatives in the outputs, in closed form, against torch's own of the loss on one row after the other."""

import pytest
import torch
from torch import nn

from skinvert.curvature.columns import Columns
from skinvert.models import FactoredHessian
from skinvert.models.losses import as_loss

M, K = 4, 3
WEIGHT = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)


def classes(f):
    y = torch.randint(f.shape[1], (len(f), *f.shape[2:]))
    y[0] = 1
    return y


def binary(f):
    return torch.rand_like(f)


def counts(f):
    return torch.randint(4, f.shape).to(f)


LOSSES = {
    "cross_entropy": (nn.CrossEntropyLoss(), classes),
    "weighted": (nn.CrossEntropyLoss(weight=WEIGHT), classes),
    "ignored": (nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=1), classes),
    "smoothed": (nn.CrossEntropyLoss(weight=WEIGHT, ignore_index=1, label_smoothing=0.2), classes),
    "probabilities": (nn.CrossEntropyLoss(), lambda f: f.exp().softmax(1)),
    # A target that does not add up to 1 weighs what it adds up to.
    "weighted probabilities": (nn.CrossEntropyLoss(weight=WEIGHT, label_smoothing=0.1), lambda f: torch.rand_like(f)),
    "mse": (nn.MSELoss(), torch.randn_like),
    "bce": (nn.BCEWithLogitsLoss(), binary),
    "huber": (nn.HuberLoss(delta=0.7), torch.randn_like),
    "smooth_l1": (nn.SmoothL1Loss(beta=0.5), torch.randn_like),
    "poisson": (nn.PoissonNLLLoss(full=True), counts),
    "poisson of rates": (nn.PoissonNLLLoss(log_input=False), counts),
    "nll": (nn.NLLLoss(weight=WEIGHT), classes),
    "kl": (nn.KLDivLoss(reduction="batchmean"), lambda f: f.exp().softmax(1)),
}
SHAPES = {"rows": (M, K), "positions": (M, K, 5), "pixels": (M, K, 2, 3), "one column": (M, 1)}


def weighted_logits(shape):
    tail = [1] * (len(shape) - 2)
    w = WEIGHT[: shape[1]].reshape(-1, *tail)
    return nn.BCEWithLogitsLoss(weight=w.flip(0), pos_weight=w)


def setting(name, shape):
    torch.manual_seed(0)
    f = torch.randn(shape, dtype=torch.float64)
    if name == "weighted logits":
        return as_loss(weighted_logits(shape)), f, torch.rand_like(f)
    module, targets = LOSSES[name]
    if "rates" in name:
        f = f.exp()
    return as_loss(module), f, targets(f)


def expected_hessians(loss, f, y):
    """(m, c, c), row by row."""
    rows = []
    for i in range(len(f)):

        def of(flat, i=i):
            return loss.unreduced(flat.reshape(1, *f.shape[1:]), y[i : i + 1]).sum()

        rows.append(torch.autograd.functional.hessian(of, f[i].reshape(-1)))
    return torch.stack(rows)


CASES = [
    (name, shape)
    for name in [*LOSSES, "weighted logits"]
    for shape in SHAPES
    if shape != "one column" or name in ("mse", "bce", "huber", "smooth_l1", "poisson", "weighted logits")
]


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_closed_form_is_the_second_derivative(name, shape):
    loss, f, y = setting(name, SHAPES[shape])
    H = loss.output_hessian(f, y)
    expected = expected_hessians(loss, f, y)
    c = expected.shape[1]
    assert (H.rows, H.outputs, H.rank) == (M, c, c)
    identity = torch.eye(c, dtype=f.dtype)[:, None].expand(c, M, c)
    received = H.products(identity).permute(1, 0, 2)
    S = torch.cat([H.columns(start, min(start + 2, c)) for start in range(0, c, 2)], dim=2)
    a = torch.randn(c, dtype=f.dtype)
    scale = expected.abs().max().clamp(min=1e-3)
    assert (received - expected).abs().max() <= 1e-13 * scale
    assert (S @ S.mT - expected).abs().max() <= 1e-13 * scale
    assert (H.combined(a) - S @ a).abs().max() <= 1e-13 * scale.sqrt()


def test_products_do_not_change_their_argument():
    loss, f, y = setting("cross_entropy", (M, K))
    U = torch.randn(2, M, K, dtype=f.dtype)
    before = U.clone()
    loss.output_hessian(f, y).products(U)
    assert torch.equal(U, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_of_confident_rows(dtype):
    # p rounds to one-hot: diag(p) − ppᵀ of it is rounding, its true value 1e-13 and less.
    f = torch.tensor([[30.0, 0.0, -2.0], [0.0, 36.0, 1.0]], dtype=dtype)
    H = as_loss("cross_entropy").output_hessian(f, torch.tensor([0, 1]))
    u = torch.tensor([[1.0, -2.0, 0.5]], dtype=dtype).expand(1, 2, 3)
    p = f.double().exp() / f.double().exp().sum(1, keepdim=True)
    others = u.double() - u.double()[0, 0, [0, 1]][:, None]
    # C u with the confident class's own entry from the others: nothing cancels.
    centred = others - (p * others).sum(2, keepdim=True)
    expected = p * centred
    assert (H.products(u).double() - expected).norm() <= 1e3 * torch.finfo(dtype).eps * expected.norm()


def test_directions_are_made_in_chunks_and_agree():
    import sklearn

    loss, f, y = setting("smoothed", (M, K, 5))
    columns = Columns(loss.output_hessian(f, y), torch.arange(1.0, M + 1, dtype=f.dtype), f.shape)
    whole = torch.stack(list(columns))
    a = torch.randn(len(columns), dtype=f.dtype)
    with sklearn.config_context(working_memory=1e-3):
        parts = torch.stack(list(columns))
    assert whole.shape == (15, *f.shape) and torch.equal(whole, parts)
    assert torch.allclose(columns.combined(a), torch.einsum("r,r...->...", a, whole), atol=1e-13)


def test_a_factor_as_it_is():
    S = torch.randn(M, 3, 2, dtype=torch.float64)
    H, U = FactoredHessian(S), torch.randn(5, M, 3, dtype=torch.float64)
    assert torch.allclose(H.products(U), torch.einsum("mcr,mdr,kmd->kmc", S, S, U))
    assert torch.equal(H.columns(1, 2), S[:, :, 1:])


def test_a_users_own_module_has_no_closed_form():
    class Squared(nn.MSELoss):
        def forward(self, f, y):
            return super().forward(f, y) ** 2

    f = torch.randn(M, K, dtype=torch.float64)
    assert as_loss(Squared()).output_hessian(f, f + 1) is None


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.int8, torch.int32, torch.bool])
def test_labels_of_any_integer_type(dtype):
    f, y = torch.randn(M, 2, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    loss = as_loss(nn.CrossEntropyLoss(weight=WEIGHT[:2], ignore_index=0))
    loss.check(f, y.to(dtype))
    assert torch.equal(loss.per_sample(f, y.to(dtype)), loss.per_sample(f, y))
    assert torch.equal(loss.mass(f, y.to(dtype)), loss.mass(f, y))
    U = torch.randn(1, M, 2, dtype=torch.float64)
    assert torch.equal(loss.output_hessian(f, y.to(dtype)).products(U), loss.output_hessian(f, y).products(U))
    for named in ("mse", "bce_with_logits"):
        loss = as_loss(named)
        loss.check(f[:, 0], y.to(dtype))
        assert torch.equal(loss.per_sample(f[:, 0], y.to(dtype)), loss.per_sample(f[:, 0], y))
