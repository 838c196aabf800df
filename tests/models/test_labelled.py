"""Batches that are mappings with labels, and models that give their own loss, without a subclass."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import matrix_error
from torch import nn
from torch.utils.data import DataLoader

from skinvert import HessianInverter, PerSampleGradient, TorchTwiceDifferentiable, solve_hvp

V, T, N = 7, 5, 12
IGNORED = -100


class ModelOutput(OrderedDict):
    """Entries by key and by attribute, those that are None left out."""

    def __init__(self, loss=None, logits=None):
        super().__init__((k, v) for k, v in (("loss", loss), ("logits", logits)) if v is not None)

    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return self[name]


@dataclass
class Attributes:
    loss: Any = None
    logits: Any = None


def as_dict(loss=None, logits=None):
    return {"loss": loss, "logits": logits}


def causal(logits, labels):
    return F.cross_entropy(logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1))


def token(logits, labels):
    return F.cross_entropy(logits.reshape(-1, V), labels.reshape(-1))


def label_smoothed(logits, labels):
    return F.cross_entropy(logits.reshape(-1, V), labels.reshape(-1), label_smoothing=0.1)


def rare_class(logits, labels):
    """A class weight that only rows of the class 6 show."""
    weight = torch.ones(V, dtype=logits.dtype)
    weight[6] = 5.0
    return F.cross_entropy(logits.reshape(-1, V), labels.reshape(-1), weight=weight)


def squared(logits, labels):
    return F.mse_loss(logits.squeeze(), labels.squeeze())


def several_labels(logits, labels):
    return F.binary_cross_entropy_with_logits(logits, labels)


class Model(nn.Module):
    """A small language model, or classifier of sequences, as ``transformers`` has them."""

    def __init__(self, own, kind=ModelOutput, pooled=False, width=V, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.mix = nn.Embedding(V, 2), nn.Linear(2, 2)
        self.head, self.drop = nn.Linear(2, width), nn.Dropout(0.5)
        self.own, self.kind, self.pooled, self.settings = own, kind, pooled, settings
        self.double()

    def forward(self, input_ids=None, attention_mask=None, labels=None, return_dict=None):
        if labels is None and self.settings.get("needs_labels"):
            raise ValueError("You have to specify decoder_input_ids")
        hidden = self.drop(self.mix(self.embedding(input_ids).cumsum(1)).tanh())
        if self.pooled:
            mask = attention_mask[..., None]
            hidden = (hidden * mask).sum(1) / mask.sum(1)
        logits = self.settings.get("scale", 1.0) * self.head(hidden)
        return self.kind(loss=None if labels is None else self.own(logits, labels), logits=logits)


def tokens():
    torch.manual_seed(1)
    ids = torch.randint(V, (N, T))
    # Rows of 3 and 5 tokens, so that a mean of the batches' means is not that of all.
    mask = (torch.arange(T) < torch.where(torch.arange(N) < 5, 3, 5)[:, None]).long()
    return ids, mask


IDS, MASK = tokens()
torch.manual_seed(2)
CASES = {
    "causal": (lambda **kw: Model(causal, **kw), IDS.masked_fill(MASK == 0, IGNORED)),
    "token": (lambda **kw: Model(token, **kw), torch.randint(V, (N, T)).masked_fill(MASK == 0, IGNORED)),
    "classes": (lambda **kw: Model(token, pooled=True, **kw), torch.randint(V, (N,))),
    "regression": (lambda **kw: Model(squared, pooled=True, width=1, **kw), torch.randn(N).double()),
    "several": (lambda **kw: Model(several_labels, pooled=True, **kw), torch.randint(2, (N, V)).double()),
    "as long as wide": (lambda **kw: Model(token, **kw), torch.randint(V, (N, V))),
    "labels needed": (lambda **kw: Model(causal, needs_labels=True, **kw), IDS),
}
EVERY_CASE = pytest.mark.parametrize("case", CASES)


def inputs_of(labels):
    # One case has as many positions as there are classes.
    if labels.shape[1:] == (V,) and not labels.is_floating_point():
        return {"input_ids": torch.cat([IDS, IDS[:, : V - T]], 1), "attention_mask": torch.ones(N, V).long()}
    return {"input_ids": IDS, "attention_mask": MASK}


def batches_of(labels, size=5):
    whole = {**inputs_of(labels), "labels": labels}
    return [{name: part[i : i + size] for name, part in whole.items()} for i in range(0, N, size)]


def oracle(model, labels):
    """Return the Hessian of the model's own loss of all rows at once, which is torch's mean over the labels."""
    model.eval()
    theta = list(model.parameters())
    outputs = model(**inputs_of(labels), labels=labels)
    loss = outputs["loss"] if isinstance(outputs, dict) else outputs.loss
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, theta, create_graph=True)])
    rows = [torch.autograd.grad(g, theta, retain_graph=True) for g in gradient]
    model.train()
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows]).numpy(), gradient.detach().numpy()


def received(model, data, **settings):
    settings = {"curvature": "hessian", **settings}
    return HessianInverter("direct", 5.0, **settings).fit(model, data)


@EVERY_CASE
@pytest.mark.parametrize("kind", [ModelOutput, Attributes, as_dict])
def test_hessian_of_its_own_loss(case, kind):
    make, labels = CASES[case]
    model = make(kind=kind)
    H, gradient = oracle(model, labels)
    inverter = received(model, batches_of(labels))
    assert matrix_error(inverter.curvature_.to_dense(), H) <= 1e-12
    assert abs(inverter.gradient_norm_ - np.linalg.norm(gradient)) <= 1e-12


@pytest.mark.parametrize("case", ["causal", "regression", "as long as wide"])
@pytest.mark.parametrize("size", [1, 12])
def test_batches_do_not_matter(case, size):
    make, labels = CASES[case]
    H, _ = oracle(make(), labels)
    assert matrix_error(received(make(), batches_of(labels, size)).curvature_.to_dense(), H) <= 1e-12


@pytest.mark.parametrize("case", ["token", "classes"])
def test_other_forms(case):
    make, labels = CASES[case]
    H, _ = oracle(make(), labels)
    inputs = inputs_of(labels)
    samples = [{**{k: v[i] for k, v in inputs.items()}, "labels": labels[i]} for i in range(N)]
    lists = [{name: value.tolist() for name, value in sample.items()} for sample in samples]
    for data in (DataLoader(samples, 5, shuffle=True), (inputs, labels), {**inputs, "labels": labels}):
        assert matrix_error(received(make(), data).curvature_.to_dense(), H) <= 1e-12
    if case == "classes":
        assert matrix_error(received(make(), lists).curvature_.to_dense(), H) <= 1e-12


@pytest.mark.parametrize("case", ["token", "as long as wide"])
def test_a_loss_may_be_given(case):
    make, labels = CASES[case]
    H, _ = oracle(make(), labels)
    for loss in ("cross_entropy", nn.CrossEntropyLoss()):
        inverter = received(make(), batches_of(labels), loss=loss)
        assert matrix_error(inverter.curvature_.to_dense(), H) <= 1e-12


def test_an_axis_is_not_told_by_its_length():
    """As many positions as classes, and no loss of the model's own to tell them apart."""
    make, labels = CASES["as long as wide"]
    model = make(kind=lambda loss, logits: logits)
    with pytest.raises(ValueError, match="classes from positions"):
        received(model, batches_of(labels), loss="cross_entropy")


def test_a_given_loss_that_does_not_shift_is_told():
    make, labels = CASES["causal"]
    with pytest.warns(UserWarning, match="next position's label"):
        received(make(), batches_of(labels), loss="cross_entropy")


def test_gradients_and_function():
    make, labels = CASES["causal"]
    model, batches = make(), batches_of(labels)
    H, gradient = oracle(model, labels)
    rows = PerSampleGradient(model).fit(batches).transform(batches)
    np.testing.assert_allclose(rows.mean(0), gradient, atol=1e-12)
    b = np.random.default_rng(0).normal(size=(2, len(H)))
    x, _ = solve_hvp("direct", TorchTwiceDifferentiable(model, None), batches, b, hessian_perturbation=5.0)
    np.testing.assert_allclose(x, np.linalg.solve(H + 5.0 * np.eye(len(H)), b.T).T, atol=1e-10)


def test_empirical_fisher_is_of_the_rows():
    make, labels = CASES["token"]
    model, batches = make(), batches_of(labels)
    rows = PerSampleGradient(model).fit(batches).transform(batches).numpy()
    inverter = received(model, batches, curvature="empirical_fisher")
    assert matrix_error(inverter.curvature_.to_dense(), rows.T @ rows / N) <= 1e-12


def test_score_reads_labels_as_fit_did():
    make, labels = CASES["classes"]
    inverter = HessianInverter("direct", 1.0, curvature="ggn").fit(make(), batches_of(labels))
    pair = HessianInverter("direct", 1.0, curvature="ggn", loss="cross_entropy")
    pair.fit(make(), (inputs_of(labels), labels))
    assert abs(inverter.score(batches_of(labels)) - pair.score((inputs_of(labels), labels))) <= 1e-12


@pytest.mark.parametrize("own", [label_smoothed, lambda f, y: 2 * token(f, y), lambda f, y: token(f, y) + 0.01])
def test_another_loss_is_refused(own):
    labels = CASES["token"][1]
    with pytest.raises(ValueError, match="`outputs` and `per_sample_loss`"):
        received(Model(own), batches_of(labels))


@pytest.mark.parametrize(("dtype", "share"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_a_small_term_beside_the_loss_is_refused(dtype, share):
    """As a mixture of experts adds one for its router."""

    def with_term(logits, labels):
        return token(logits, labels) + share * logits.square().mean()

    labels = CASES["token"][1]
    with pytest.raises(ValueError, match="`outputs` and `per_sample_loss`"):
        received(Model(with_term, scale=10.0).to(dtype), batches_of(labels))
    received(Model(token, scale=10.0).to(dtype), batches_of(labels), curvature="ggn")


def test_every_batch_counts():
    labels = torch.zeros(N, T).long()
    labels[1::2] = 3
    labels[-1] = 6
    with pytest.raises(ValueError, match="own loss"):
        received(Model(rare_class), batches_of(labels))


@pytest.mark.parametrize(
    ("module", "data", "message"),
    [
        (Model(token, kind=lambda loss, logits: {"logits": logits}), batches_of(CASES["token"][1]), "give"),
        (Model(token, kind=lambda loss, logits: (loss, logits)), batches_of(CASES["token"][1]), "loss"),
        (Model(token), [{"input_ids": IDS, "target": IDS}], "'labels'"),
        (Model(token), [{"input_ids": IDS, "labels": IDS[:-1]}], "Expected input batch_size|rows"),
    ],
)
def test_faults_are_named(module, data, message):
    with pytest.raises(ValueError, match=message):
        received(module, data)


class Mapped(nn.Module):
    """A forward of one mapping, which may read its labels too."""

    def __init__(self, reads_labels):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.reads_labels = nn.Linear(3, 2).double(), reads_labels

    def forward(self, batch):
        if self.reads_labels:
            assert batch["labels"].ndim == 1
        return self.layer(batch["x"])


@pytest.mark.parametrize("reads_labels", [False, True])
def test_a_forward_of_one_mapping(reads_labels):
    x, y = torch.randn(N, 3).double(), torch.randint(2, (N,))
    batches = [{"x": x[i : i + 5], "labels": y[i : i + 5]} for i in (0, 5, 10)]
    module = Mapped(reads_labels)
    for curvature in ("hessian", "ggn", "empirical_fisher"):
        A = received(module, batches, loss="cross_entropy", curvature=curvature).curvature_.to_dense()
        B = received(module.layer, (x, y), loss="cross_entropy", curvature=curvature).curvature_.to_dense()
        assert matrix_error(A, B.numpy()) <= 1e-12
