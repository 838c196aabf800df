"""What bfloat16 passes cost and save: iterations, the exact residual, and the bytes that graphs hold, beside float32.

An MLP on digits, trained for a while; its GGN, at shares of its mean eigenvalue.

    python docs/benchmarks/autocast.py
    python docs/benchmarks/autocast.py --device cuda
"""

from __future__ import annotations

import argparse
import time
import warnings

import torch
from sklearn.datasets import load_digits
from torch import nn

from skinvert import HessianInverter, PerSampleGradient
from skinvert.curvature.saved import counted


def trained(device: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Return an MLP after 200 steps of Adam, and the digits."""
    X, y = load_digits(return_X_y=True)
    data = torch.tensor(X / 16, dtype=torch.float32, device=device), torch.tensor(y, device=device)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)).to(device)
    adam = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(200):
        adam.zero_grad()
        nn.functional.cross_entropy(net(data[0]), data[1]).backward()
        adam.step()
    return net, *data


def solved(net: nn.Module, X: torch.Tensor, y: torch.Tensor, share: float, autocast: str | None) -> str:
    """Return iterations, largest residual and seconds of a fit and a solve of eight gradients."""
    inverter = HessianInverter("cg", f"{share} rel", curvature="ggn", loss="cross_entropy", autocast=autocast)
    b = PerSampleGradient(net, loss="cross_entropy").fit_transform(X[:8], y[:8])
    clock = time.perf_counter if X.is_cuda else time.process_time
    inverter.fit(net, (X, y)).transform(b[:1])
    start = clock()
    _, info = inverter.solve(b)
    seconds = clock() - start
    found = f"{int(info['n_iter'].max()):5} {float(info['residual'].max()):9.1e} {seconds:8.2f}"
    return found + ("" if bool(info["converged"].all()) else "  not converged")


def graphs(net: nn.Module, X: torch.Tensor, y: torch.Tensor) -> tuple[int, int]:
    """Return the bytes that one batch's graph of products holds, in float32 and under autocast."""
    A = (
        HessianInverter("cg", 1.0, curvature="ggn", loss="cross_entropy", autocast="bfloat16")
        .fit(net, (X, y))
        .curvature_
    )
    batch, weights = next(iter(A.objective.batches))
    return counted(lambda: A.graph(batch, weights))[1], counted(lambda: A.rough.graph(batch, weights))[1]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    net, X, y = trained(parser.parse_args().device)
    warnings.simplefilter("ignore")
    exact, rough = graphs(net, X, y)
    print(f"a batch's graph holds {exact:,} bytes, under autocast {rough:,}")
    print(f"{'λ / mean eigenvalue':>20}   float32: iterations, residual, s   bfloat16: the same")
    for share in (30.0, 10.0, 1.0):
        print(f"{share:20}   {solved(net, X, y, share, None)}   {solved(net, X, y, share, 'bfloat16')}")


if __name__ == "__main__":
    main()
