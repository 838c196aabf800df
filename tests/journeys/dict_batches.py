"""transformers' users: a model that takes dicts, gives its own loss, and pads."""

import numpy as np
import torch
from torch import nn

from skinvert import HessianInverter, InfluenceFunction, PerSampleGradient

torch.manual_seed(0)


class Classifier(nn.Module):
    def __init__(self, n_tokens=12, width=4):
        super().__init__()
        self.embedding = nn.Embedding(n_tokens, width)
        self.encoder = nn.TransformerEncoderLayer(width, 2, 6, dropout=0.1, batch_first=True)
        self.head = nn.Linear(width, 3)

    def forward(self, input_ids, attention_mask=None, labels=None):
        hidden = self.encoder(self.embedding(input_ids), src_key_padding_mask=attention_mask == 0)
        logits = self.head((hidden * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


def batch(n, length):
    ids = torch.randint(1, 12, (n, length))
    mask = (torch.arange(length) < torch.randint(1, length + 1, (n, 1))).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": ids[:, 0] % 3}


model = Classifier().double()
train, test = [batch(20, 5), batch(20, 7), batch(9, 4)], [batch(6, 6)]  # ragged, each padded to its longest
optimizer = torch.optim.Adam(model.parameters(), 1e-2)
for _ in range(20):
    for each in train:
        optimizer.zero_grad()
        model(**each)["loss"].backward()
        optimizer.step()

# begin skinvert
influence = InfluenceFunction(HessianInverter("direct", 0.1, curvature="ggn")).fit(model, train)
scores = influence.transform(test)
gradients = PerSampleGradient(model).fit(train).transform(train)
ekfac = HessianInverter("ekfac", 0.1).fit(model, train)
eigenvalues = ekfac.spectrum(of="inverse").eigenvalues
# end skinvert

# torch alone: each sequence by itself, without its padding, in eval mode; the GGN from the Jacobian of its logits.
assert model.training
model.eval()
theta = [*model.parameters()]


def by_itself(ids, mask, label):
    ids = ids[mask == 1][None]
    logits = model(ids, torch.ones_like(ids))["logits"][0]
    rows = [torch.autograd.grad(entry, theta, retain_graph=True, materialize_grads=True) for entry in logits]
    J = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    p = logits.detach().softmax(0)
    return J.T @ (p - nn.functional.one_hot(label, 3)), J.T @ (torch.diag(p) - torch.outer(p, p)) @ J


def all_rows(batches):
    found = [by_itself(*row) for each in batches for row in zip(*each.values(), strict=True)]
    return torch.stack([g for g, _ in found]), sum(ggn for _, ggn in found) / len(found)


(g, ggn), (g_test, _) = all_rows(train), all_rows(test)
expected = g_test @ torch.linalg.solve(ggn + 0.1 * torch.eye(len(ggn)).double(), g.T) / len(g)
torch.testing.assert_close(gradients, g, rtol=1e-8, atol=1e-12)
torch.testing.assert_close(scores, expected, rtol=1e-8, atol=1e-12)
# EKFAC's eigenvalues are the curvature along its vectors, so that they have the trace of the whole.
np.testing.assert_allclose(eigenvalues.sum(), ggn.trace(), rtol=1e-8)
