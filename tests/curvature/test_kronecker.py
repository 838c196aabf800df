"""Kronecker factors against factors summed sample by sample, row by row."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kronecker_oracles import Conv1D, KroneckerOracle
from torch import nn

from skinvert import HessianInverter

N = 9
# torch pads an even kernel unevenly, with a copy.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")


def linear():
    return nn.Sequential(nn.Linear(4, 3)), (4,)


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,)


def in_place():
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3, bias=False)), (4,)


def frozen_bias():
    net, shape = mlp()
    net[0].bias.requires_grad_(False)
    net[2].weight.requires_grad_(False)
    return net, shape


def conv2d():
    return nn.Sequential(
        nn.Conv2d(2, 3, (2, 3), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
        nn.Tanh(),
        nn.Conv2d(3, 2, 2, bias=False, padding="same", padding_mode="reflect"),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, 3),
    ), (2, 4, 6)


def conv1d():
    return nn.Sequential(nn.Conv1d(2, 3, 4, padding="same"), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)), (2, 6)


def sequence():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3)), (5, 3)


def tokens():
    return nn.Sequential(nn.Embedding(6, 3, padding_idx=1), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)), "tokens"


def grouped():
    return nn.Sequential(
        nn.Conv1d(4, 6, 2, stride=2, groups=2),
        nn.Tanh(),
        nn.Conv1d(6, 6, 2, padding=1, groups=6, bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(24, 3),
    ), (4, 6)


def conv3d():
    return nn.Sequential(
        nn.Conv3d(2, 3, (2, 1, 2), stride=(1, 2, 1), padding=(0, 0, 1)), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)
    ), (2, 2, 3, 2)


def transposed():
    return nn.Sequential(
        nn.ConvTranspose1d(2, 3, 3, stride=3, padding=1, output_padding=2, dilation=2),
        nn.Tanh(),
        nn.ConvTranspose1d(3, 6, 2, groups=3, bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(54, 3),
    ), (2, 2)


def transposed2d():
    return nn.Sequential(
        nn.ConvTranspose2d(2, 3, (1, 2), stride=(2, 1), padding=(0, 1)), nn.Tanh(), nn.Flatten(), nn.Linear(9, 3)
    ), (2, 2, 2)


def gpt2():
    return nn.Sequential(Conv1D(3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(15, 3)), (5, 4)


def deep_rows():
    return nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)), (2, 3, 3)


SHARED = (conv2d, conv1d, sequence, tokens, grouped, conv3d, transposed, transposed2d, gpt2, deep_rows)
NETS = (linear, mlp, in_place, frozen_bias, *SHARED)


def cross_entropy(f, y):
    return F.cross_entropy(f, y, reduction="sum")


def problem(build, seed=0):
    torch.manual_seed(seed)
    net, shape = build()
    net = net.double()
    X = torch.randint(6, (N, 4)) if shape == "tokens" else torch.randn(N, *shape, dtype=torch.float64)
    return net, X, torch.randint(3, (N,))


def fitted(net, X, y, method="kfac", shift=0.1, sample_weight=None, **settings):
    settings = {"loss": "cross_entropy", **settings}
    return HessianInverter(method, shift, **settings).fit(net, (X, y), sample_weight=sample_weight)


def dense(inverter):
    return inverter.inverse_.operator.to_dense().numpy() - inverter.hessian_perturbation_ * np.eye(
        inverter.n_features_in_
    )


def relative(received, expected):
    return np.linalg.norm(received - expected) / np.linalg.norm(expected)


def instance(name, **settings):
    from skinvert.methods import EKFAC, KFAC

    return {"kfac": KFAC, "ekfac": EKFAC}[name](**settings)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("method", ["kfac", "ekfac"])
@pytest.mark.parametrize("curvature", ["ggn", "empirical_fisher"])
@pytest.mark.parametrize("build", NETS)
def test_the_dense_definition(build, curvature, method, approx):
    net, X, y = problem(build)
    oracle = KroneckerOracle(net, X, y, cross_entropy, empirical=curvature == "empirical_fisher")
    if method == "ekfac" and degenerate(oracle, approx):
        pytest.skip("an eigenbasis that the factors do not fix")
    expected = getattr(oracle, method)(approx)
    received = dense(fitted(net, X, y, instance(method, approx=approx), curvature=curvature, batch_size=4))
    assert relative(received, expected) <= 1e-8


def degenerate(oracle, approx):
    """Whether a factor has an eigenvalue twice: then EKFAC is not unique.

    Zero may be there twice for "expand": what a factor does not see, the curvature does not either.
    """
    for k, M in [(i, M) for i in range(len(oracle.layers)) for M in oracle.factors(i, approx)]:
        values = np.linalg.eigvalsh(M)
        seen = (
            values if approx == "reduce" and len(oracle.samples[0][k][0]) > 1 else values[values > 1e-10 * values[-1]]
        )
        if (np.diff(seen) < 1e-6 * values[-1]).any():
            return True
    return False


@pytest.mark.parametrize("curvature", ["ggn", "fisher", "empirical_fisher"])
@pytest.mark.parametrize("method", ["kfac", "ekfac"])
@pytest.mark.parametrize("batch_size", [1, 4, 9])
def test_weights_and_denominators(curvature, method, batch_size):
    net, X, y = problem(mlp)
    y[:2] = 2
    class_weight = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    w = np.array([0, 1, 2, 1, 3, 1, 0.5, 1, 2])
    loss = nn.CrossEntropyLoss(weight=class_weight, ignore_index=2)
    oracle = KroneckerOracle(
        net,
        X,
        y,
        lambda f, t: F.cross_entropy(f, t, class_weight, ignore_index=2, reduction="sum"),
        lambda t: 0.0 if int(t) == 2 else class_weight[int(t)],
        w,
        curvature == "empirical_fisher",
    )
    expected = getattr(oracle, method)() + 0.3 * np.eye(len(oracle.kfac()))
    inverter = fitted(
        net, X, y, method, 0.1, w, loss=loss, weight_decay=0.3, curvature=curvature, batch_size=batch_size
    )
    assert relative(dense(inverter), expected) <= 1e-8


def test_an_ignored_row_is_a_row_left_out():
    net, X, y = problem(conv1d)
    y[[1, 4]] = -100
    expected = dense(fitted(net, X[y >= 0], y[y >= 0]))
    assert relative(dense(fitted(net, X, y)), expected) <= 1e-12


@pytest.mark.parametrize("build", SHARED)
@pytest.mark.parametrize("curvature", ["ggn", "fisher", "empirical_fisher", "hessian"])
def test_refitted_eigenvalues_are_the_diagonal_in_the_basis(build, curvature):
    net, X, y = problem(build)
    kind = "ggn" if curvature == "hessian" else curvature
    exact = fitted(net, X, y, "direct", curvature=kind).curvature_.to_dense()
    A = fitted(net, X, y, "kfac", curvature=curvature).curvature_
    factors = A.kronecker_factors()
    bases = [block.decompose()[0] for block in factors.blocks]
    for block, basis, received in zip(factors.blocks, bases, factors.refit(bases), strict=True):
        d, i = block.index.shape[-2:]
        left = basis.left.reshape(-1, d, d)
        right = [torch.eye(i, dtype=torch.float64)] if basis.right is None else basis.right.reshape(-1, i, i)
        index, received = block.index.reshape(-1, d * i), received.reshape(-1, d * i)
        for U, V, own, values in zip(left, right, index, received, strict=True):
            Q = torch.kron(U.contiguous(), V.contiguous())
            expected = (Q.mT @ exact[own[:, None], own] @ Q).diagonal()
            assert relative(values.numpy(), expected.numpy()) <= 1e-8


def test_memory_changes_nothing():
    import sklearn

    net, X, y = problem(conv2d)
    expected = [dense(fitted(net, X, y, method)) for method in ("kfac", "ekfac")]
    with sklearn.config_context(working_memory=0.01):
        received = [dense(fitted(net, X, y, method)) for method in ("kfac", "ekfac")]
    assert max(map(relative, received, expected)) <= 1e-12


@pytest.mark.parametrize("share", [16, 10**9])
def test_what_was_seen_serves_the_refit_where_it_is_small(share, monkeypatch):
    from skinvert.curvature.layers import passes

    net, X, y = problem(mlp)
    A, counted = fitted(net, X, y, "kfac", batch_size=4).curvature_, []
    monkeypatch.setattr(passes, "SHARE", share)
    monkeypatch.setattr(passes, "captured", lambda *given, own=passes.captured: counted.append(1) or own(*given))
    factors = A.kronecker_factors()
    bases, first = [block.decompose()[0] for block in factors.blocks], len(counted)
    once = factors.refit(bases)
    assert (first, len(counted)) == (3, 3 if share == 16 else 6)
    # As often as it is asked, with whatever bases.
    again = factors.refit(bases)
    assert all(map(torch.equal, once, again))


@pytest.mark.parametrize("width", [191, 192, 193, 401])
def test_a_symmetric_product_by_its_blocks(width):
    from skinvert.curvature.layers.kinds import symmetric_gram

    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((7, 2, width)), rng.random(7)
    received = symmetric_gram(torch.from_numpy(x * w[:, None, None]), torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(received, np.einsum("m,mti,mtj->ij", w, x, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["kfac", "ekfac"])
def test_a_layer_that_is_wider_than_a_block(method):
    torch.manual_seed(0)
    net, X = nn.Sequential(nn.Linear(200, 2)).double(), torch.randn(12, 200, dtype=torch.float64)
    y = torch.randint(0, 2, (12,))
    P, a = net(X).softmax(1).detach(), torch.cat([X, torch.ones(12, 1, dtype=torch.float64)], 1)
    H = torch.diag_embed(P) - P[:, :, None] * P[:, None, :]
    expected = torch.kron(H.mean(0), a.mT @ a / 12)
    if method == "ekfac":
        Q = torch.kron(torch.linalg.eigh(H.mean(0))[1], torch.linalg.eigh(a.mT @ a / 12)[1])
        exact = torch.einsum("ncd,ni,nj->cidj", H, a, a).reshape(402, 402) / 12
        expected = Q @ (Q.mT @ exact @ Q).diagonal().diag() @ Q.mT
    order = torch.cat([torch.arange(402).reshape(2, 201)[:, :200].ravel(), torch.arange(2) * 201 + 200])
    assert relative(dense(fitted(net, X, y, method)), expected[order[:, None], order].numpy()) <= 1e-10


class Odd(nn.Module):
    """A network with one thing in it that has no Kronecker factors."""

    def __init__(self, what):
        super().__init__()
        self.what, self.fc, self.head = what, nn.Linear(4, 4), nn.Linear(4, 3)
        self.prelu = nn.PReLU(4) if what == "prelu" else None
        self.bilinear = nn.Bilinear(4, 4, 4) if what == "bilinear" else None
        self.tied = nn.Linear(4, 4, bias=False) if what == "tied" else None
        self.scale = nn.Parameter(torch.ones(4)) if what == "bare" else None
        self.unused = nn.Linear(2, 2) if what == "never called" else None
        if what == "tied":
            self.tied.weight = self.fc.weight
        if what == "reparametrised":
            nn.utils.parametrizations.weight_norm(self.fc)
        self.scaled = UnusualNorm() if what == "unusual norm" else None
        self.experts = Experts() if what == "experts" else None
        # Makes the weights of a layer from what is no sample.
        self.maker = nn.Linear(2, 16) if what == "hypernetwork" else None

    def forward(self, x):
        h = self.fc(x).tanh()
        if self.what == "outside":
            h = F.linear(h, self.fc.weight).tanh()
        for layer in (self.prelu, self.tied, self.scaled, self.experts):
            h = h if layer is None else layer(h)
        if self.maker is not None:
            h = h @ self.maker(torch.tensor([0.3, -0.7], dtype=h.dtype)).reshape(4, 4)
        h = h if self.bilinear is None else self.bilinear(h, h)
        return self.head(h if self.scale is None else h * self.scale)


class Experts(nn.Module):
    """Two layers, of which each sees some of the rows."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        result = torch.zeros_like(x)
        for layer, rows in ((self.one, x[:, 0] > 0), (self.two, x[:, 0] <= 0)):
            result = result.index_put((rows.nonzero()[:, 0],), layer(x[rows]))
        return result.tanh()


class UnusualNorm(nn.Module):
    """A norm whose weight is no factor of its result."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4) / 3)

    def forward(self, x):
        # Not at 1/2, where the derivative of w² is that of w.
        return F.layer_norm(x, (4,)) * self.weight.square()


ODD = {
    "prelu": "prelu.weight (a PReLU)",
    "bilinear": "bilinear.weight (a Bilinear)",
    "tied": "fc.weight (tied weights: in fc and tied)",
    "bare": "scale (a Odd)",
    "never called": "unused.weight (never called as a layer)",
    "reparametrised": "a ParametrizationList",
    "outside": "fc.weight (its weights are used outside it too)",
    "unusual norm": "scaled.weight (its weights are used outside it too)",
    "experts": "experts.one.weight (sees",
    "hypernetwork": "maker.weight (sees as many rows for more samples)",
}
OWN = ("prelu", "bilinear", "bare", "never called", "unusual norm", "experts", "hypernetwork")


@pytest.mark.parametrize(("what", "named"), ODD.items())
@pytest.mark.parametrize("method", ["kfac", "ekfac"])
# A layer that is never called.
@pytest.mark.filterwarnings("ignore:The selected parameters must be reached:UserWarning")
def test_what_has_no_factors_is_named_or_diagonal(what, named, method):
    torch.manual_seed(0)
    net, X, y = Odd(what).double(), torch.randn(N, 4, dtype=torch.float64), torch.randint(3, (N,))
    with pytest.raises(ValueError, match="Every parameter for Kronecker factors") as error:
        fitted(net, X, y, method)
    assert named in str(error.value) and "head" not in str(error.value) and "unsupported=" in str(error.value)
    inverter = fitted(net, X, y, instance(method, unsupported="diagonal"), weight_decay=0.2)
    exact = fitted(net, X, y, "direct", curvature="ggn", weight_decay=0.2).curvature_.to_dense().numpy()
    names = inverter.get_feature_names_out()
    rest = np.array([not name.startswith(("fc", "head")) for name in names])
    if what not in OWN:
        rest = np.array([name.startswith("fc") for name in names])
    received = dense(inverter)
    np.testing.assert_allclose(received[rest][:, rest], np.diag(np.diag(exact)[rest]), atol=1e-12)
    assert not received[rest][:, ~rest].any()


def test_only_unsupported_parameters_are_a_diagonal():
    net, X, y = problem(lambda: (nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3)), (4,)))
    inverter = fitted(net, X, y, instance("kfac", unsupported="diagonal"), params="0.*")
    expected = np.diag(np.diag(fitted(net, X, y, "direct", curvature="ggn", params="0.*").curvature_.to_dense()))
    np.testing.assert_allclose(dense(inverter), expected, atol=1e-12)


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("method", ["kfac", "ekfac"])
@pytest.mark.parametrize("build", NETS)
def test_offloaded_factors_are_the_same(build, method, approx, tmp_path):
    net, X, y = problem(build)
    settings = {"batch_size": 4, "check_residual": False}
    plain, offloaded = (
        fitted(net, X, y, instance(method, approx=approx, offload=offload), **settings) for offload in (None, tmp_path)
    )
    b = torch.randn(3, plain.n_features_in_, dtype=torch.float64)
    assert torch.equal(offloaded.transform(b), plain.transform(b))
    assert torch.equal(offloaded.inverse_.operator.apply(b), plain.inverse_.operator.apply(b))


def test_what_the_factors_hold_is_counted_before_they_are_made(monkeypatch):
    """4 bytes a number: factors and eigenbases, eigenvalues and their inverse, two indices of 8 bytes, and `eigh`."""
    asked = {}

    def note(needed, what, *_):
        asked.setdefault(what, needed)

    monkeypatch.setattr("skinvert.curvature.layers.room.check_memory", note)
    net = nn.Sequential(nn.Embedding(50, 7), nn.Flatten(), nn.Linear(14, 6), nn.Tanh(), nn.Linear(6, 3))
    X, y = torch.randint(50, (8, 2)), torch.arange(8) % 3
    fitted(net, X, y)
    # (d, i), with the bias's coordinate; of the embedding (7, 50), whose right side is a diagonal.
    sides = [7 * 7 + 50, 6 * 6 + 15 * 15, 3 * 3 + 7 * 7]
    entries = 7 * 50 + 6 * 15 + 3 * 7
    layers = 4 * (2 * sum(sides) + 2 * entries + 3 * 15 * 15) + 16 * entries
    assert layers <= asked["The Kronecker factors of the layers"] <= layers + 4 * 4000
