"""The Fisher against enumerated labels, the GGN, and its own standard error."""

import itertools
import pickle

import numpy as np
import pytest
import scipy.stats
import sklearn
import torch
from facts import matrix_of as matrix
from oracles import matrix_error
from sklearn.base import clone
from torch import nn

import skinvert
from skinvert import HessianInverter, TorchTwiceDifferentiable, solve_hvp
from skinvert.curvature import SampledFisher
from skinvert.models import as_loss

N, D = 11, 3


def softmax(f):
    return np.exp(f - f.max(-1, keepdims=True)) / np.exp(f - f.max(-1, keepdims=True)).sum(-1, keepdims=True)


# For outputs f (c,) of one row: pairs (probability, ∇_f log p) of every label, times √s on the scale of ℓ.


def categorical(f):
    p = softmax(f)
    return [(p[k], p - np.eye(len(f))[k]) for k in range(len(f))]


def of_log_probabilities(f):
    return [(np.exp(f[k]), np.eye(len(f))[k]) for k in range(len(f))]


def bernoulli(f):
    p = 1 / (1 + np.exp(-f))
    labels = itertools.product((0, 1), repeat=len(f))
    return [(np.prod(np.where(y, p, 1 - p)), (p - y) / np.sqrt(len(f))) for y in map(np.array, labels)]


def poisson_of_logs(f):
    rate = np.exp(f[0])
    return [(scipy.stats.poisson.pmf(k, rate), np.array([k - rate]) / 1.0) for k in range(40)]


def poisson_of_rates(f):
    return [(scipy.stats.poisson.pmf(k, f[0]), np.array([(k - f[0]) / (f[0] + 1e-8)])) for k in range(40)]


CASES = {
    "cross_entropy": ("cross_entropy", 4, None, categorical),
    "nll": ("nll", 4, nn.LogSoftmax(1), of_log_probabilities),
    "bce": ("bce_with_logits", 3, None, bernoulli),
    "poisson_log": ("poisson_nll", 1, None, poisson_of_logs),
    "poisson_rate": (nn.PoissonNLLLoss(log_input=False), 1, nn.Softplus(), poisson_of_rates),
    "mse": ("mse", 3, None, None),
}


def problem(name):
    """A linear network, then perhaps a map of its outputs: Jᵢ is known."""
    loss, c, head, labels = CASES[name]
    torch.manual_seed(1)
    layer = nn.Linear(D, c, bias=False).double()
    net = layer if head is None else nn.Sequential(layer, head)
    X = torch.randn(N, D, dtype=torch.float64)
    kind = name.split("_")[0]
    y = {
        "cross": torch.randint(c, (N,)),
        "nll": torch.randint(c, (N,)),
        "bce": torch.randint(2, (N, c)).double(),
        "mse": torch.randn(N, c, dtype=torch.float64),
        "poisson": torch.randint(4, (N, c)).double(),
    }[kind]
    return net, X, y, loss


def row_moments(name, net, X):
    """Per row E[ggᵀ] and E‖g‖⁴ of the gradients g of ℓ at predicted labels."""
    head = CASES[name][2] or nn.Identity()
    layer = net if head is None or isinstance(net, nn.Linear) else net[0]
    second, fourth = [], []
    for x in X:
        z = layer(x).detach()
        f = head(z[None])[0].numpy()
        dfdz = torch.autograd.functional.jacobian(lambda v: head(v[None])[0], z).numpy()
        J = np.kron(dfdz, x.numpy()[None])
        if name == "mse":
            S = 2 / len(f) * J.T @ J
            second.append(S)
            fourth.append(np.trace(S) ** 2 + 2 * np.trace(S @ S))
            continue
        pairs = [(p, score @ J) for p, score in CASES[name][3](f)]
        second.append(sum(p * np.outer(g, g) for p, g in pairs))
        fourth.append(sum(p * (g @ g) ** 2 for p, g in pairs))
    return np.array(second), np.array(fourth)


@pytest.mark.parametrize("name", CASES)
def test_closed_form_is_the_expectation_over_labels(name):
    net, X, y, loss = problem(name)
    expected = row_moments(name, net, X)[0].mean(0)
    received, A = matrix(net, (X, y), loss, "fisher", batch_size=4)
    V = torch.eye(A.size, dtype=torch.float64)
    assert matrix_error(received, expected) <= 1e-8
    assert matrix_error(A.apply(V).numpy(), expected) <= 1e-8
    assert (
        A.factor_shape == tuple(A.factor().shape)
        and matrix_error((A.factor().mT @ A.factor()).numpy(), expected) <= 1e-8
    )
    assert A.is_psd and np.linalg.eigvalsh(received).min() >= -1e-14


@pytest.mark.parametrize("name", CASES)
def test_samples_agree_to_their_standard_error(name):
    net, X, y, loss = problem(name)
    second, fourth = row_moments(name, net, X)
    samples, seeds = 200, range(20)
    # Var of the mean of independent ggᵀ, summed over entries.
    variance = (fourth - np.square(second).sum((1, 2))).sum() / (N**2 * samples)
    draws = [matrix(net, (X, y), loss, SampledFisher(samples, random_state=seed))[0] for seed in seeds]
    errors = [np.square(draw - second.mean(0)).sum() for draw in draws]
    # Their mean error is the variance, and the error of their mean a twentieth of it.
    assert 0.6 * variance <= np.mean(errors) <= 1.5 * variance
    assert np.square(np.mean(draws, 0) - second.mean(0)).sum() <= 3 * variance / len(seeds)


@pytest.mark.parametrize("name", CASES)
def test_samples_make_one_operator(name):
    net, X, y, loss = problem(name)
    settings = SampledFisher(3, random_state=5)
    expected, A = matrix(net, (X, y), loss, settings, batch_size=4)
    other, B = matrix(net, (X, y), loss, settings, batch_size=1024)
    V = torch.eye(A.size, dtype=torch.float64)
    assert matrix_error(other, expected) <= 1e-12
    assert matrix_error(A.apply(V).numpy(), expected) <= 1e-12
    assert matrix_error((A.factor().mT @ A.factor()).numpy(), expected) <= 1e-12
    assert A.factor_shape == tuple(A.factor().shape) == (3 * N, A.size)
    parts = [B.minibatch(torch.tensor([i])).apply(V).numpy() for i in range(N)]
    assert matrix_error(np.mean(parts, 0), expected) <= 1e-12
    assert matrix_error(pickle.loads(pickle.dumps(A)).apply(V).numpy(), expected) <= 1e-12
    assert matrix_error(matrix(net, (X, y), loss, SampledFisher(3))[0], expected) > 1e-3


def test_samples_are_the_same_for_data_that_is_not_kept():
    import sklearn

    net, X, y, loss = problem("bce")
    expected, _ = matrix(net, (X, y), loss, SampledFisher(3), batch_size=4)
    with sklearn.config_context(working_memory=1e-5):
        received, _ = matrix(net, (X, y), loss, SampledFisher(3), batch_size=4)
    assert matrix_error(received, expected) <= 1e-12


def mlp(c):
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, c)).double()


WEIGHT = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
EQUAL = {
    "cross_entropy": (nn.CrossEntropyLoss, {}),
    "weighted": (nn.CrossEntropyLoss, {"weight": WEIGHT, "ignore_index": 1}),
    "smoothed": (nn.CrossEntropyLoss, {"weight": WEIGHT, "label_smoothing": 0.2}),
    "probabilities": (nn.CrossEntropyLoss, {"weight": WEIGHT}),
    "mse": (nn.MSELoss, {}),
    "bce": (nn.BCEWithLogitsLoss, {}),
    "pos_weight": (nn.BCEWithLogitsLoss, {"pos_weight": WEIGHT, "weight": WEIGHT.flip(0)}),
    "poisson_log": (nn.PoissonNLLLoss, {}),
}


def targets(name):
    torch.manual_seed(3)
    if name == "probabilities":
        return torch.rand(N, 3, dtype=torch.float64).softmax(1)
    if name in ("cross_entropy", "weighted", "smoothed"):
        return torch.randint(3, (N,))
    values = torch.randn(N, 3, dtype=torch.float64)
    return values if name == "mse" else (values > 0).double()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", EQUAL)
def test_the_fisher_is_the_ggn(name, reduction):
    kind, options = EQUAL[name]
    loss = kind(reduction=reduction, **options)
    data = torch.randn(N, D, dtype=torch.float64), targets(name)
    w = np.arange(N) % 3
    fitted = [
        HessianInverter("direct", 1.0, curvature=curvature, loss=loss, weight_decay=0.1, batch_size=4).fit(
            mlp(3), data, sample_weight=w
        )
        for curvature in ("ggn", "fisher", SampledFisher(1000))
    ]
    expected, received, sampled = (inverter.curvature_.to_dense().numpy() for inverter in fitted)
    assert matrix_error(received, expected) <= 1e-8
    # Five standard errors of a relative error of about 2 per label: a wrong scale is off by a third or more.
    assert matrix_error(sampled, expected) <= 5 * 2 / np.sqrt(1000 * 6)
    assert {inverter.curvature_name_ for inverter in fitted[1:]} == {"fisher"}


@pytest.mark.parametrize("loss", ["cross_entropy", "bce_with_logits", "mse"])
def test_outputs_with_positions(loss):
    torch.manual_seed(0)
    net = nn.Conv1d(2, 3, 2).double()
    X = torch.randn(N, 2, 4, dtype=torch.float64)
    y = torch.randint(3, (N, 3)) if loss == "cross_entropy" else torch.randint(2, (N, 3, 3)).double()
    expected, _ = matrix(net, (X, y), loss, "ggn")
    assert matrix_error(matrix(net, (X, y), loss, "fisher")[0], expected) <= 1e-8
    assert matrix_error(matrix(net, (X, y), loss, SampledFisher(1000))[0], expected) <= 0.1


def test_log_softmax_and_nll_have_the_fisher_of_cross_entropy():
    X, y = torch.randn(N, D, dtype=torch.float64), targets("cross_entropy")
    options = {"weight": WEIGHT, "ignore_index": 1}
    expected, _ = matrix(mlp(3), (X, y), nn.CrossEntropyLoss(**options), "fisher")
    net = nn.Sequential(*mlp(3), nn.LogSoftmax(1))
    assert matrix_error(matrix(net, (X, y), nn.NLLLoss(**options), "fisher")[0], expected) <= 1e-8


def test_a_skorch_classifier_has_the_fisher_of_cross_entropy():
    skorch = pytest.importorskip("skorch")
    X, y = torch.randn(N, D), targets("cross_entropy")
    net = skorch.NeuralNetClassifier(nn.Sequential(*mlp(3), nn.Softmax(1)).float(), train_split=None).initialize()
    expected, _ = matrix(mlp(3).float(), (X, y), "cross_entropy", "fisher", dtype="float64")
    assert matrix_error(matrix(net, (X, y), None, "fisher", dtype="float64")[0], expected) <= 1e-8
    assert matrix_error(matrix(net, (X, y), None, SampledFisher(1000), dtype="float64")[0], expected) <= 0.1


@pytest.mark.parametrize("loss", ["huber", nn.SmoothL1Loss(), lambda f, y: ((f - y) ** 2).mean()])
@pytest.mark.parametrize("curvature", ["fisher", SampledFisher()])
def test_a_loss_without_a_distribution_is_refused(loss, curvature):
    data = torch.randn(N, D, dtype=torch.float64), torch.randn(N, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match='negative log-likelihood .* Try curvature="ggn"'):
        matrix(mlp(3), data, loss, curvature)


def test_outputs_that_are_no_log_probabilities_are_refused():
    data = torch.randn(N, D, dtype=torch.float64), targets("cross_entropy")
    with pytest.raises(ValueError, match='log-probabilities.*Try loss="cross_entropy"'):
        matrix(mlp(3), data, "nll", "fisher")


@pytest.mark.parametrize(("settings", "message"), [({"n_samples": 0}, "n_samples"), ({"random_state": -1}, "random_s")])
def test_settings_are_checked(settings, message):
    net, X, y, loss = problem("mse")
    with pytest.raises(ValueError, match=message):
        matrix(net, (X, y), loss, SampledFisher(**settings))


def test_an_unknown_curvature_is_listed():
    net, X, y, loss = problem("mse")
    with pytest.raises(ValueError, match="'hessian', 'ggn', 'fisher', 'empirical_fisher'.*SampledFisher"):
        matrix(net, (X, y), loss, "fischer")


def test_a_grid_reaches_the_settings():
    inverter = HessianInverter(curvature=SampledFisher(2)).set_params(curvature__n_samples=7)
    assert clone(inverter).curvature.n_samples == 7


@pytest.mark.parametrize("curvature", ["fisher", SampledFisher(50)])
def test_held_out_rows_are_judged(curvature):
    net, X, y, _ = problem("cross_entropy")
    inverter = HessianInverter("direct", 0.1, curvature=curvature, loss="cross_entropy").fit(net, (X, y))
    expected = HessianInverter("direct", 0.1, curvature="ggn", loss="cross_entropy").fit(net, (X, y)).score((X, y))
    assert inverter.score((X, y)) == pytest.approx(expected, rel=1e-8 if curvature == "fisher" else 0.2)


def test_held_out_rows_are_judged_by_the_fisher():
    # The GGN of nll is zero: it would find no λ too small.
    X, y = torch.randn(N, D, dtype=torch.float64), targets("cross_entropy")
    settings = {"method": "direct", "hessian_perturbation": 0.1, "curvature": "fisher"}
    expected = HessianInverter(loss="cross_entropy", **settings).fit(mlp(3), (X, y)).score((X, y))
    net = nn.Sequential(*mlp(3), nn.LogSoftmax(1))
    assert HessianInverter(loss="nll", **settings).fit(net, (X, y)).score((X, y)) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("curvature", ["ggn", "fisher"])
def test_confident_outputs_lose_nothing_but_rounding(curvature):
    # p − p² of a probability that rounds to 1 may be negative.
    net = nn.Linear(3, 3, bias=False).double()
    with torch.no_grad():
        net.weight.copy_(37 * torch.eye(3))
    X = torch.linspace(0.9, 1.1, 300, dtype=torch.float64).reshape(100, 3) * torch.tensor([1.0, 0.0, 0.0])
    received, _ = matrix(net, (X, torch.zeros(100, dtype=torch.long)), "cross_entropy", curvature)
    assert np.abs(received).max() <= 1e-13


def test_the_sampled_fisher_has_a_name_and_a_place():
    assert skinvert.SampledFisher is SampledFisher
    net, X, y, loss = problem("cross_entropy")
    named, A = matrix(net, (X, y), loss, "sampled_fisher")
    assert matrix_error(named, matrix(net, (X, y), loss, SampledFisher())[0]) <= 1e-14
    assert A.factor_shape == (N, A.size)
    exact, _ = matrix(net, (X, y), loss, "fisher")
    assert matrix_error(named, exact) > 1e-3
    inverter = HessianInverter("direct", 1.0, curvature="sampled_fisher", loss=loss).fit(net, (X, y))
    assert inverter.curvature_name_ == "fisher" and np.isfinite(inverter.score((X, y)))
    result = solve_hvp(
        "direct",
        TorchTwiceDifferentiable(net, loss),
        (X, y),
        torch.ones(1, A.size).double(),
        hessian_perturbation=1.0,
        curvature="sampled_fisher",
    )
    assert matrix_error(result.x.numpy(), np.linalg.solve(named + np.eye(A.size), np.ones(A.size))[None]) <= 1e-12


@pytest.mark.parametrize("curvature", ["sampled_fisher", SampledFisher(2)])
def test_the_estimator_seeds_the_draws(curvature):
    net, X, y, loss = problem("cross_entropy")
    first, again, other = (
        matrix(net, (X, y), loss, curvature, random_state=seed)[0] for seed in (1, np.random.RandomState(1), 2)
    )
    assert matrix_error(again, matrix(net, (X, y), loss, curvature, random_state=np.random.RandomState(1))[0]) == 0
    assert matrix_error(other, first) > 1e-3
    own = SampledFisher(2, random_state=7)
    expected = matrix(net, (X, y), loss, own)[0]
    assert matrix_error(matrix(net, (X, y), loss, own, random_state=1)[0], expected) == 0
    assert getattr(curvature, "random_state", None) is None


def test_draws_that_do_not_fit_are_made_anew():
    net, X, y, loss = problem("mse")
    settings = SampledFisher(500)
    expected, _ = matrix(net, (X, y), loss, settings, batch_size=4)
    with sklearn.config_context(working_memory=0.01):
        received, A = matrix(net, (X, y), loss, settings, batch_size=4)
        assert A.objective.batches.kept is None
    assert matrix_error(received, expected) <= 1e-12


class Regressor:
    """A net whose ``get_loss`` is ``scale`` times its criterion's, or adds a quartic."""

    @staticmethod
    def of(module, scale, quartic):
        skorch = pytest.importorskip("skorch")

        class Net(skorch.NeuralNetRegressor):
            def get_loss(self, y_pred, y_true, *args, **kwargs):
                value = scale * super().get_loss(y_pred, y_true, *args, **kwargs)
                if not quartic:
                    return value
                more = y_pred**4
                return value + (more if self.criterion_.reduction == "none" else more.mean())

        return Net(module, train_split=None).initialize()


@pytest.mark.parametrize(("scale", "quartic"), [(1.0, False), (3.0, False), (1.0, True)])
def test_a_get_loss_that_does_more_than_its_criterion(scale, quartic):
    X, y = torch.randn(N, D, dtype=torch.float64), torch.randn(N, 3, dtype=torch.float64)
    module = mlp(3)
    net = Regressor.of(module, scale, quartic)
    expected, _ = matrix(module, (X, y), lambda f, y: (scale * (f - y) ** 2 + (f**4 if quartic else 0)).mean(), "ggn")
    assert matrix_error(matrix(net, (X, y), None, "ggn", dtype="float64")[0], expected) <= 1e-8
    if scale == 1 and not quartic:
        assert matrix_error(matrix(net, (X, y), None, "fisher", dtype="float64")[0], expected) <= 1e-8
    else:
        with pytest.raises(ValueError, match="with more to it"):
            matrix(net, (X, y), None, "fisher", dtype="float64")


@pytest.mark.parametrize("c", [1, 4])
def test_the_empirical_fisher_of_mse_has_the_scale_that_the_readme_says(c):
    # Residuals of variance c/2 in each output and of no correlation: then it is the Hessian, 2/c for each weight.
    net = nn.Linear(1, c, bias=False).double()
    X = torch.ones(2 * c, 1, dtype=torch.float64)
    residuals = torch.cat([torch.eye(c), -torch.eye(c)]).double() * (c / 2 * c) ** 0.5
    data = (X, (net(X) - residuals).detach())
    empirical, hessian = (
        HessianInverter("direct", 1.0, curvature=name, loss="mse").fit(net, data).curvature_.to_dense()
        for name in ("empirical_fisher", "hessian")
    )
    torch.testing.assert_close(hessian, torch.eye(c).double() * 2 / c)
    torch.testing.assert_close(empirical, hessian)


@pytest.mark.parametrize("curvature", ["fisher", SampledFisher(3)])
@pytest.mark.parametrize("weight", [None, torch.tensor([0.5, 2.0, 1.0]).double()])
def test_bce_of_probabilities_has_the_fisher_of_logits(curvature, weight):
    X, y = torch.randn(N, D, dtype=torch.float64), torch.rand(N, 3, dtype=torch.float64)
    expected, _ = matrix(mlp(3), (X, y), nn.BCEWithLogitsLoss(weight=weight), curvature)
    net = nn.Sequential(*mlp(3), nn.Sigmoid())
    assert matrix_error(matrix(net, (X, y), nn.BCELoss(weight=weight), curvature)[0], expected) <= 1e-12


def test_a_label_that_is_never_drawn_adds_nothing():
    f = torch.tensor([[0.0, 1.0, 0.25]], dtype=torch.float64)
    labels = as_loss("bce").predictive(f, f)
    assert torch.allclose(labels.fisher().values, torch.tensor([[1.0, 1.0, 16 / 3]]).double())
    scores = labels.scores(torch.full((1, 1, 3), 0.5).double())
    assert torch.allclose(scores, torch.tensor([[[1.0, -1.0, 4 / 3]]]).double())


def test_batches_whose_labels_are_all_ignored():
    # A skorch classifier's losses of them are zero, whatever it takes the logarithm of.
    skorch = pytest.importorskip("skorch")
    X, y = torch.randn(N, D), torch.tensor([1, 1, 1, 0, 2, 0, 1, 1, 1, 2, 0])
    settings = {"criterion__ignore_index": 1, "train_split": None}
    net = skorch.NeuralNetClassifier(nn.Sequential(*mlp(3), nn.Softmax(1)).float(), **settings).initialize()
    expected, _ = matrix(mlp(3).float(), (X, y), nn.CrossEntropyLoss(ignore_index=1), "fisher", dtype="float64")
    received, _ = matrix(net, (X, y), None, "fisher", dtype="float64", batch_size=3)
    assert matrix_error(received, expected) <= 1e-8
