"""A skorch net gives the curvature of its own criterion and ``get_loss``."""

from fnmatch import fnmatch

import numpy as np
import pytest
import torch
from oracles import Oracle, matrix_error, oracle_matrix, relative_error, solution
from problems import Problem, problem
from skorch import NeuralNet, NeuralNetBinaryClassifier, NeuralNetClassifier, NeuralNetRegressor
from torch import nn

from skinvert import HessianInverter, PerSampleGradient


def initialised(kind, module, criterion, **settings):
    return kind(module, criterion=criterion, batch_size=5, verbose=0, **settings).initialize()


def binary():
    """A network of one logit, (n,) outputs."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1), nn.Flatten(0)).double()
    X, y = torch.randn(12, 4, dtype=torch.float64), torch.randint(2, (12,)).double()
    loss = nn.functional.binary_cross_entropy_with_logits

    def summed(f, t):
        return loss(f, t, reduction="sum")

    return Problem("binary", module, "bce_with_logits", loss, summed, X, y, 0.1)


def nets():
    weights = torch.linspace(0.5, 2.0, 3, dtype=torch.float64)
    softmax = problem("mlp", "cross_entropy", 0.1)
    weighted = problem("mlp", "class_weights", 0.1)
    regression = problem("mlp", "mse", 0.1)
    one = binary()
    probabilities = nn.Sequential(softmax.module, nn.Softmax(1))
    yield "classifier", softmax, initialised(NeuralNetClassifier, probabilities, nn.NLLLoss)
    yield "classifier on logits", softmax, initialised(NeuralNetClassifier, softmax.module, nn.CrossEntropyLoss)
    settings = {"criterion__weight": weights}
    yield (
        "class weights",
        weighted,
        initialised(NeuralNetClassifier, weighted.module, nn.CrossEntropyLoss, **settings),
    )
    yield "regressor", regression, initialised(NeuralNetRegressor, regression.module, nn.MSELoss)
    yield "binary", one, initialised(NeuralNetBinaryClassifier, one.module, nn.BCEWithLogitsLoss)
    yield "net", regression, initialised(NeuralNet, regression.module, nn.MSELoss)


NETS = {name: (case, net) for name, case, net in nets()}
ALL = pytest.mark.parametrize(("case", "net"), NETS.values(), ids=NETS.keys())


@ALL
@pytest.mark.parametrize("curvature", ["hessian", "empirical_fisher"])
def test_curvature(case, net, curvature):
    inverter = HessianInverter("direct", 5.0, curvature=curvature, weight_decay=0.1)
    inverter.fit(net, (case.X.numpy(), case.y.numpy()))
    assert matrix_error(inverter.curvature_.to_dense(), oracle_matrix(case, curvature)) <= 1e-10


@ALL
def test_ggn(case, net):
    # At probabilities the GGN is another matrix, and the Fisher still that of logits.
    curvature = "fisher" if isinstance(net.module_[-1], nn.Softmax) else "ggn"
    inverter = HessianInverter("direct", 5.0, curvature=curvature, weight_decay=0.1).fit(net, case.data)
    assert matrix_error(inverter.curvature_.to_dense(), oracle_matrix(case, "ggn")) <= 1e-12


@ALL
def test_solution_by_cg_with_weights(case, net):
    counts = np.arange(12)
    weighted = Problem(**{**case.__dict__, "counts": counts})
    H, b = oracle_matrix(weighted), case.right_hand_sides(3)
    inverter = HessianInverter("cg", 5.0, weight_decay=0.1).fit(net, (case.X.numpy(), case.y.numpy()), counts)
    assert relative_error(inverter.transform(b), solution(H, 5.0, b)) <= 1e-7


@ALL
def test_gradients(case, net):
    received = PerSampleGradient(net).fit_transform(case.X.numpy(), case.y.numpy())
    np.testing.assert_allclose(received, Oracle(case).gradient_rows(), rtol=1e-7, atol=1e-10)


@ALL
def test_the_net_is_unchanged(case, net):
    state = [t.detach().clone() for t in net.module_.parameters()]
    mode, criterion = net.module_.training, net.criterion_.reduction
    HessianInverter("direct", 5.0).fit(net, case.data).transform(case.right_hand_sides(1))
    assert net.module_.training == mode and net.criterion_.reduction == criterion
    assert all(torch.equal(a, b) for a, b in zip(state, net.module_.parameters(), strict=True))


# -- what a net's own get_loss and optimiser add ---------------------------------------------------------------------


def l2(module, names="*"):
    return sum((w**2).sum() for name, w in module.named_parameters() if fnmatch(name, names))


class Penalised(NeuralNetClassifier):
    """L2 on some parameters, as skorch's documentation has it."""

    names, mu = "*", 0.3

    def get_loss(self, y_pred, y_true, X=None, training=False):
        loss = super().get_loss(y_pred, y_true, X=X, training=training)
        return loss + 0.5 * self.mu * l2(self.module_, self.names)


class WeightsAlone(Penalised):
    names = "*.weight"


class WithoutTheMarked(NeuralNetClassifier):
    def get_loss(self, *args, **kwargs):
        kept = [w for w in self.module_.parameters() if not getattr(w, "no_decay", False)]
        return super().get_loss(*args, **kwargs) + 0.5 * 0.3 * sum((w**2).sum() for w in kept)


class L1(NeuralNetClassifier):
    def get_loss(self, *args, **kwargs):
        return super().get_loss(*args, **kwargs) + 0.1 * sum(w.abs().sum() for w in self.module_.parameters())


class Quartic(NeuralNetClassifier):
    def get_loss(self, *args, **kwargs):
        return super().get_loss(*args, **kwargs) + 0.1 * l2(self.module_) ** 2


class InTraining(NeuralNetClassifier):
    def get_loss(self, y_pred, y_true, X=None, training=False):
        return super().get_loss(y_pred, y_true, X=X, training=training) * (1.0 + training)


class WeighsByX(NeuralNetClassifier):
    def get_loss(self, y_pred, y_true, X=None, *args, **kwargs):
        loss = super().get_loss(y_pred, y_true, X, *args, **kwargs)
        return loss if X is None else (loss * X["sample_weight"]).mean()


class Reduces(NeuralNetClassifier):
    def get_loss(self, *args, **kwargs):
        return super().get_loss(*args, **kwargs).mean()


class ReturnsTwo(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3).double()

    def forward(self, X):
        return self.layer(X), X


def softmax_case(weight_decay=0.0):
    return problem("mlp", "cross_entropy", weight_decay)


def with_penalty(case, mu, names="*"):
    """Return the Hessian and the gradient of the mean cross-entropy plus ½ μ‖θ‖² on the parameters named so."""
    theta = list(case.module.parameters())
    diagonal = [mu * fnmatch(name, names) * torch.ones_like(t) for name, t in case.module.named_parameters()]
    diagonal = torch.cat([t.reshape(-1) for t in diagonal]).numpy()
    flat = torch.cat([t.detach().reshape(-1) for t in theta]).numpy()
    return oracle_matrix(case) + np.diag(diagonal), Oracle(case).gradient() + diagonal * flat


@pytest.mark.parametrize("kind", [Penalised, WeightsAlone])
@pytest.mark.parametrize("method", ["direct", "cg"])
def test_an_l2_penalty_in_get_loss_is_part_of_the_hessian(kind, method):
    case = softmax_case()
    net = initialised(kind, case.module, nn.CrossEntropyLoss)
    H, gradient = with_penalty(case, kind.mu, kind.names)
    inverter = HessianInverter(method, 5.0).fit(net, case.data)
    b = case.right_hand_sides(2)
    assert relative_error(inverter.transform(b), solution(H, 5.0, b)) <= 1e-7
    assert abs(inverter.gradient_norm_ - np.linalg.norm(gradient)) <= 1e-10
    rows = PerSampleGradient(net).fit_transform(case.X.numpy(), case.y.numpy())
    np.testing.assert_allclose(rows, Oracle(case).gradient_rows(), atol=1e-10)


def test_a_penalty_may_ask_for_marks_on_parameters():
    case = softmax_case()
    net = initialised(WithoutTheMarked, case.module, nn.CrossEntropyLoss)
    for name, tensor in net.module_.named_parameters():
        tensor.no_decay = name.endswith("bias")
    H, _ = with_penalty(case, 0.3, "*.weight")
    assert matrix_error(HessianInverter("direct", 5.0).fit(net, case.data).curvature_.to_dense(), H) <= 1e-10


@pytest.mark.parametrize("curvature", ["ggn", "empirical_fisher"])
def test_it_is_part_of_every_curvature(curvature):
    case = softmax_case()
    net = initialised(WeightsAlone, case.module, nn.CrossEntropyLoss)
    expected = HessianInverter("direct", 5.0, curvature=curvature, loss="cross_entropy").fit(case.module, case.data)
    received = HessianInverter("direct", 5.0, curvature=curvature, params="2.*").fit(net, case.data)
    names = [name.startswith("2.") for name in expected.get_feature_names_out()]
    ridge = np.diag([0.3 * name.startswith("2.weight") for name in received.get_feature_names_out()])
    block = expected.curvature_.to_dense().numpy()[np.ix_(names, names)]
    assert matrix_error(received.curvature_.to_dense(), block + ridge) <= 1e-10


@pytest.mark.parametrize(
    ("kind", "message"),
    [(L1, "weight_decay="), (Quartic, "weight_decay="), (InTraining, "training=True"), (Reduces, "one value per row")],
)
def test_other_additions_are_refused(kind, message):
    case = softmax_case()
    with pytest.raises(ValueError, match=message):
        HessianInverter("direct", 5.0).fit(initialised(kind, case.module, nn.CrossEntropyLoss), case.data)


def test_a_penalty_beside_a_sum_is_refused():
    case = softmax_case()
    net = initialised(Penalised, case.module, nn.CrossEntropyLoss, criterion__reduction="sum")
    with pytest.raises(ValueError, match="reduction="):
        HessianInverter("direct", 5.0).fit(net, case.data)


class OwnCrossEntropy(nn.Module):
    """A criterion without a ``reduction``."""

    def forward(self, f, y):
        return nn.functional.cross_entropy(f, y)


class OwnReduction(OwnCrossEntropy):
    reduction = "mean"


@pytest.mark.parametrize("criterion", [OwnCrossEntropy, OwnReduction])
def test_a_criterion_of_the_users_own(criterion):
    case = softmax_case()
    net = initialised(NeuralNetClassifier, case.module, criterion, optimizer__weight_decay=0.3)
    H, gradient = with_penalty(case, 0.3)
    inverter = HessianInverter("direct", 5.0).fit(net, case.data)
    assert matrix_error(inverter.curvature_.to_dense(), H) <= 1e-10
    assert abs(inverter.gradient_norm_ - np.linalg.norm(gradient)) <= 1e-10


@pytest.mark.parametrize(
    ("kind", "message"),
    [(Penalised, "weight_decay="), (L1, "weight_decay="), (InTraining, "training=True"), (WeighsByX, "sample_weight=")],
)
def test_what_get_loss_adds_to_it_is_refused(kind, message):
    case = softmax_case()
    with pytest.raises(ValueError, match=message):
        HessianInverter("direct", 5.0).fit(initialised(kind, case.module, OwnCrossEntropy), case.data)


def test_a_compiled_net():
    case = softmax_case()
    net = initialised(NeuralNetClassifier, case.module, nn.CrossEntropyLoss, compile=True, compile__backend="eager")
    inverter = HessianInverter("direct", 5.0).fit(net, case.data)
    assert matrix_error(inverter.curvature_.to_dense(), oracle_matrix(case)) <= 1e-10


def test_a_data_set_without_y():
    case = softmax_case()
    net = initialised(NeuralNetClassifier, case.module, nn.CrossEntropyLoss)
    rows = torch.utils.data.TensorDataset(case.X, case.y)
    for data in (rows, torch.utils.data.DataLoader(rows, 5)):
        inverter = HessianInverter("direct", 5.0).fit(net, (data, None))
        assert matrix_error(inverter.curvature_.to_dense(), oracle_matrix(case)) <= 1e-10


def test_weights_in_x_are_refused():
    case = softmax_case()
    net = initialised(WeighsByX, case.module, nn.CrossEntropyLoss)
    with pytest.raises(ValueError, match="sample_weight=..."):
        HessianInverter("direct", 5.0).fit(net, case.data)


def test_a_forward_that_returns_two_is_refused():
    case = softmax_case()
    net = initialised(NeuralNetClassifier, ReturnsTwo(), nn.CrossEntropyLoss)
    with pytest.raises(ValueError, match="per_sample_loss"):
        HessianInverter("direct", 5.0).fit(net, case.data)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
@pytest.mark.parametrize(("given", "counts"), [(0.0, 0.1), (0.4, 0.4)])
def test_the_optimisers_weight_decay_counts(optimizer, given, counts):
    case = softmax_case()
    settings = {"optimizer": optimizer, "optimizer__weight_decay": 0.1}
    net = initialised(NeuralNetClassifier, case.module, nn.CrossEntropyLoss, **settings)
    inverter = HessianInverter("direct", 5.0, weight_decay=given).fit(net, case.data)
    assert matrix_error(inverter.curvature_.to_dense(), with_penalty(case, counts)[0]) <= 1e-10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": torch.optim.AdamW}, "AdamW is not"),
        ({"optimizer__weight_decay": 0.1, "optimizer__param_groups": [("0.*", {"weight_decay": 0.2})]}, "groups"),
    ],
)
def test_other_weight_decay_is_told(settings, message):
    case = softmax_case()
    net = initialised(NeuralNetClassifier, case.module, nn.CrossEntropyLoss, **settings)
    with pytest.warns(UserWarning, match=message):
        inverter = HessianInverter("direct", 5.0).fit(net, case.data)
    assert matrix_error(inverter.curvature_.to_dense(), oracle_matrix(case)) <= 1e-10
