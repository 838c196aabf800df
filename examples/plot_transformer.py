"""
Sentences that a transformer learnt from
========================================

A small language model, built from a config, with batches that are dicts as transformers' are. EKFAC says which training
sentences a prediction was learnt from, and which speak against it; training again says whether that is so.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

from skinvert import HessianInverter, InfluenceFunction


# %%
# The model gives its loss, that of the next token; a label of −100 does not count.
class LanguageModel(nn.Module):
    def __init__(self, size, length, width, n_heads):
        super().__init__()
        self.tokens, self.head = nn.Embedding(size, width), nn.Linear(width, size)
        self.places = nn.Embedding(length, width)
        self.layer = nn.TransformerEncoderLayer(width, n_heads, 2 * width, dropout=0.0, batch_first=True)

    def forward(self, input_ids, attention_mask, labels):
        later = torch.ones(input_ids.shape[1:] * 2, dtype=torch.bool).triu(1)
        hidden = self.tokens(input_ids) + self.places(torch.arange(len(later)))
        logits = self.head(self.layer(hidden, src_mask=later, src_key_padding_mask=attention_mask == 0))
        return {"logits": logits, "loss": nn.functional.cross_entropy(logits[:, :-1].mT, labels[:, 1:])}


# %%
# Cities and their countries, in several wordings, and two sentences that are wrong. What is asked is not among them.
torch.set_num_threads(1)
places = dict(paris="france", lyon="france", rome="italy", milan="italy", berlin="germany", bonn="germany")
wordings = ["{} is in {}", "i went to {} in {}", "the city of {} is in {}", "{} lies in {}", "we saw {} in {}"]
asked, wrong = "the city of rome is in italy", ["rome is in germany", "we saw paris in italy"]
texts = wrong + [text for words in wordings for pair in places.items() if (text := words.format(*pair)) != asked]
words = sorted({word for text in texts for word in text.split()})
ids = [torch.tensor([1 + words.index(word) for word in text.split()]) for text in [*texts, asked]]
ids = nn.utils.rnn.pad_sequence(ids, batch_first=True)


def batch(rows):
    return {"input_ids": (kept := ids[rows]), "attention_mask": (kept > 0).long(), "labels": kept.where(kept > 0, -100)}


def train(rows):
    torch.manual_seed(0)
    model = LanguageModel(**{"size": len(words) + 1, "length": ids.shape[1], "width": 24, "n_heads": 2})
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch(rows))["loss"].backward()
        optimizer.step()
    return model


# %%
# Influence on the last word alone: the other labels are −100. EKFAC drops what layers share, and solves poorly here (of
# which skinvert would warn); that it ranks well is seen by training without the first rows.
everyone, query = torch.arange(len(texts)), batch([len(texts)])
query["labels"][:, :-1] = -100
influence = InfluenceFunction(HessianInverter("ekfac", "1 rel", check_residual=False))
scores = influence.fit(train(everyone), [batch(everyone)]).transform([query])[0]
order, chance = scores.argsort(descending=True), torch.randperm(len(texts))
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
shown = torch.cat([order[:6], order[-6:]]).flip(0).tolist()
left.barh([texts[i] for i in shown], scores[shown].numpy(), color=["C1"] * 6 + ["C0"] * 6)
for name, rows in {"most helpful": order, "most harmful": order.flip(0), "at random": chance}.items():
    losses = [float(train(rows[k:].sort().values)(**query)["loss"].detach()) for k in range(7)]
    print(f"without the {name:<12} " + " ".join(f"{loss:.3f}" for loss in losses))
    right.plot(losses, "o-", label=name)
left.set(xlabel="Score", title=f'Last word of "{asked}"')
right.set(xlabel="Sentences left out", ylabel="Loss of that word", title="Trained again without some")
right.legend(loc="center right")
(output := Path(__file__).parent / "output").mkdir(exist_ok=True)
figure.savefig(output / "transformer.png", dpi=120)
