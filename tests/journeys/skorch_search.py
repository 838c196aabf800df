"""skorch's users: a CNN, and λ chosen by GridSearchCV."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV, KFold
from skorch import NeuralNetClassifier
from torch import nn
from torch.func import functional_call, jacrev

from skinvert import HessianInverter, PerSampleGradient

torch.manual_seed(0)
X, y = load_digits(n_class=3, return_X_y=True)
X, y = (X[:240] / 16).astype(np.float32).reshape(-1, 1, 8, 8), y[:240]
cnn = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 3))
net = NeuralNetClassifier(cnn, criterion=nn.CrossEntropyLoss, max_epochs=20, lr=0.1, train_split=None, verbose=0)
net.fit(X, y)

# begin skinvert
inverter = HessianInverter("direct", model=net, curvature="ggn")
grid = {"hessian_perturbation": [1e-3, 1e-2, 1e-1, 1.0]}
search = GridSearchCV(inverter, grid, cv=KFold(3)).fit(X, y)
gradients = PerSampleGradient(net).fit_transform(X, y)
solved = search.transform(gradients)
# end skinvert

# torch alone, in float64: Jacobians, the GGN of rows, and the held-out quadratic written out.
theta = {name: weights.detach().double() for name, weights in net.module_.named_parameters()}


def outputs(theta):
    return functional_call(net.module_, theta, (torch.tensor(X).double(),))


J = torch.cat([part.flatten(2) for part in jacrev(outputs)(theta).values()], dim=2)  # (n, 3, p)
p = outputs(theta).softmax(1)
middle = torch.diag_embed(p) - p[:, :, None] * p[:, None]
own = torch.einsum("nci,ncd,ndj->nij", J, middle, J)
g = torch.einsum("nci,nc->ni", J, p - torch.nn.functional.one_hot(torch.tensor(y), 3))
eye = torch.eye(g.shape[1]).double()


def held_out(shift, fitted, left):
    z, m = torch.linalg.solve(own[fitted].mean(0) + shift * eye, g[left].T).T, len(left)
    whole = torch.einsum("ni,ij,nj->n", z, own[left].mean(0), z)
    alone = torch.einsum("ni,nij,nj->n", z, own[left], z)
    return float(((g[left] * z).sum(1) - (m * whole - alone) / (m - 1) / 2).mean())


expected = [np.mean([held_out(s, *fold) for fold in KFold(3).split(X)]) for s in grid["hessian_perturbation"]]
np.testing.assert_allclose(search.cv_results_["mean_test_score"], expected, rtol=1e-3)
best = search.best_params_["hessian_perturbation"]
assert best == grid["hessian_perturbation"][int(np.argmax(expected))]
x = torch.linalg.solve(own.mean(0) + best * eye, g.T).T.numpy()
np.testing.assert_allclose(gradients, g, atol=1e-5)
np.testing.assert_allclose(solved, x, rtol=1e-3, atol=1e-4 * np.abs(x).max())
