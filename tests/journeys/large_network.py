"""Who has much: 60,000 rows that are drawn as they are read, a network of 535,818 parameters, and 8 GB."""

import resource

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from skinvert import HessianInverter, InfluenceFunction

torch.manual_seed(0)
torch.set_num_threads(1)
centres = torch.randn(10, 784)


class Rows(Dataset):
    def __len__(self):
        return 60_000

    def __getitem__(self, i):
        noise = torch.randn(784, generator=torch.Generator().manual_seed(i))
        return 0.3 * centres[i % 10] + noise, (i + i // 10 % 2) % 10  # half of the labels are those of the next centre


loader = DataLoader(Rows(), batch_size=500)
net = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10))
optimizer = torch.optim.Adam(net.parameters(), 1e-3)
for _, (x, y) in zip(range(20), loader, strict=False):
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(x), y).backward()
    optimizer.step()
queries = 0.3 * centres[:4] + torch.randn(4, 784), torch.arange(4)

# begin skinvert
inverter = HessianInverter("kfac", 1e-2, loss="cross_entropy", check_residual=False)
influence = InfluenceFunction(inverter).fit(net, loader)
scores = influence.transform(queries)
# end skinvert

peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(f"p = {influence.inverter_.n_features_in_:,}, scores {tuple(scores.shape)}, peak {peak / 1e9:.2f} GB")
assert influence.inverter_.n_features_in_ == 535_818
assert scores.shape == (4, 60_000)
assert peak < 8e9

# torch alone, in float64: (A ⊗ G + λI)⁻¹ of each layer, with A = Σ aaᵀ/n and G = Σ (∂f)ᵀ (∇²ℓ) ∂f / n written out.
weights = [layer.weight.detach().double() for layer in net if isinstance(layer, nn.Linear)]
biases = [layer.bias.detach().double() for layer in net if isinstance(layer, nn.Linear)]


def forward(x):
    """Return each layer's input with a 1 appended (m, i + 1), and the logits."""
    inputs, x = [], x.double()
    for k, (W, c) in enumerate(zip(weights, biases, strict=True)):
        inputs.append(torch.cat([x, torch.ones(len(x), 1).double()], 1))
        x = x @ W.T + c
        x = x.clamp(min=0) if k < 2 else x
    return inputs, x


def backward(inputs, slope):
    """Return the derivatives by each layer's output (..., m, o) of Σ slope · logits."""
    found = [slope]
    for k in (2, 1):
        slope = (slope @ weights[k]) * (inputs[k][:, :-1] > 0)
        found.insert(0, slope)
    return found


def gradient(x, y):
    inputs, logits = forward(x)
    slopes = backward(inputs, logits.softmax(1) - nn.functional.one_hot(y, 10))
    return [(inputs[k], slopes[k]) for k in range(3)]


A, G = [0, 0, 0], [0, 0, 0]
for x, _ in loader:
    inputs, logits = forward(x)
    p = logits.softmax(1)
    # ∇²ℓ = diag(p) − ppᵀ = Σ_c p_c (e_c − p)(e_c − p)ᵀ
    roots = p.T[:, :, None].sqrt() * (torch.eye(10).double()[:, None] - p)  # (c, m, 10)
    for k, slope in enumerate(backward(inputs, roots)):
        A[k] = A[k] + inputs[k].T @ inputs[k] / 60_000
        G[k] = G[k] + slope.flatten(0, 1).T @ slope.flatten(0, 1) / 60_000

asked = [0, 1, 777, 31_415, 59_999]
x, y = zip(*[loader.dataset[i] for i in asked], strict=True)
expected = torch.zeros(4, len(asked)).double()
sides = zip(gradient(*queries), gradient(torch.stack(x), torch.tensor(y)), A, G, strict=True)
for (a, g), (a_train, g_train), left, right in sides:
    (alpha, U), (gamma, V) = torch.linalg.eigh(left), torch.linalg.eigh(right)
    for i in range(4):
        solved = V @ ((V.T @ torch.outer(g[i], a[i]) @ U) / (torch.outer(gamma, alpha) + 1e-2)) @ U.T
        expected[i] += torch.einsum("mo,oi,mi->m", g_train, solved, a_train) / 60_000
print("largest difference", float((scores[:, asked] - expected).abs().max() / expected.abs().max()))
torch.testing.assert_close(scores[:, asked].double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
