"""How the time grows: the exponents of n, k and p, and (--stream) the memory of a stream of 10⁶ rows.

An MLP d-h-10 on random rows, λ = 0.1, fit and solve on one thread. n, k or p alone is doubled, from one size to the
next; the exponent is the slope of log seconds over log size, by least squares over all sizes. p is doubled by h, d
being fixed. Seconds are the least of the repeats. Nothing is asserted.

    OMP_NUM_THREADS=1 python docs/benchmarks/scaling.py
    OMP_NUM_THREADS=1 python docs/benchmarks/scaling.py --stream
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import sklearn
import torch
from rates import least_seconds
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from skinvert import HessianInverter

CPU = torch.device("cpu")
INPUTS, OUTPUTS, SHIFT = 32, 10, 0.1


@dataclass(frozen=True)
class Size:
    """Rows n, right-hand sides k and hidden units h."""

    n: int = 1024
    k: int = 32
    hidden: int = 24

    def doubled(self, name: str, times: int) -> Size:
        """Return the size with n, k or p (by h) doubled so many times."""
        factor = 2**times
        if name == "n":
            return replace(self, n=factor * self.n)
        if name == "k":
            return replace(self, k=factor * self.k)
        return replace(self, hidden=factor * self.hidden)


# The method, its curvature, and what of n, k and p it starts from: each long enough to be timed.
CASES = {
    "direct, GGN": ("direct", "ggn", Size(n=1024, k=256)),
    "cg, Hessian": ("cg", "hessian", Size()),
    "cg, GGN": ("cg", "ggn", Size()),
    "ekfac": ("ekfac", "ggn", Size(n=4096, k=256, hidden=64)),
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--doublings", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--stream", action="store_true", help="the memory of a stream instead")
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000], help="of the streams")
    args = parser.parse_args()
    if args.stream:
        stream_table(args.rows)
    else:
        exponents(args.doublings, args.repeats)


# -- exponents ---------------------------------------------------------------------------------------------------------


def exponents(doublings: int, repeats: int) -> None:
    """Print the seconds at each size, and the exponent, for each method and each of n, k and p."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning)
    print("| method | doubled | from | seconds | exponent |\n|---|---|---|---|---|")
    for name, (method, curvature, start) in CASES.items():
        for axis in ("n", "k", "p"):
            sizes = [start.doubled(axis, times) for times in range(doublings + 1)]
            seconds = [_seconds(method, curvature, size, repeats) for size in sizes]
            slope = np.polyfit(np.log([_measure(axis, size) for size in sizes]), np.log(seconds), 1)[0]
            cells = " ".join(f"{value:.3g}" for value in seconds)
            print(f"| {name} | {axis} | {_facts(start)} | {cells} | {slope:.2f} |", flush=True)


def _seconds(method: str, curvature: str, size: Size, repeats: int) -> float:
    torch.manual_seed(0)
    model = network(size.hidden)
    data = torch.randn(size.n, INPUTS), torch.randint(OUTPUTS, (size.n,))
    B = torch.randn(size.k, _parameters(size))

    def work() -> None:
        settings = {"curvature": curvature, "loss": "cross_entropy", "check_residual": False}
        HessianInverter(method, SHIFT, **settings).fit(model, data).solve(B)

    return least_seconds(work, CPU, repeats)


def network(hidden: int) -> nn.Sequential:
    """Return the model."""
    return nn.Sequential(nn.Linear(INPUTS, hidden), nn.Tanh(), nn.Linear(hidden, OUTPUTS))


def _parameters(size: Size) -> int:
    return sum(t.numel() for t in network(size.hidden).parameters())


def _measure(axis: str, size: Size) -> int:
    return {"n": size.n, "k": size.k, "p": _parameters(size)}[axis]


def _facts(size: Size) -> str:
    return f"n = {size.n:,}, k = {size.k}, p = {_parameters(size):,}"


# -- a stream ----------------------------------------------------------------------------------------------------------


class Synthetic(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """Batches that are drawn as they are asked for, the same in every pass, and never held together."""

    def __init__(self, rows: int, batch: int = 1000) -> None:
        self.rows, self.batch = rows, batch

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the batches."""
        for start in range(0, self.rows, self.batch):
            generator, m = torch.Generator().manual_seed(start), min(self.batch, self.rows - start)
            yield (
                torch.randn(m, INPUTS, generator=generator),
                torch.randint(OUTPUTS, (m,), generator=generator),
            )


def stream_table(rows: list[int]) -> None:
    """Print the peak memory of fit and solve by cg over streams of rows, each in a process of its own."""
    print("| rows | their size, MB | peak resident, MB | grown by, MB | CPU s | residual |\n|---|---|---|---|---|---|")
    for n in rows:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            before, peak, seconds, residual = pool.apply(stream, (n,))
        size = n * (4 * INPUTS + 8) / 2**20
        print(f"| {n:,} | {size:.0f} | {peak:.0f} | {peak - before:.0f} | {seconds:.3g} | {residual:.1e} |", flush=True)


def stream(rows: int) -> tuple[float, float, float, float]:
    """Return the resident MB before, the peak, the CPU seconds and the largest residual of fit and solve."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning)
    # What fits the working memory would be kept: 4 MiB, so that no stream here does.
    sklearn.set_config(working_memory=4)
    torch.manual_seed(0)
    model, B = network(24), torch.randn(8, _parameters(Size(hidden=24)))
    loader = DataLoader(Synthetic(rows), batch_size=None)
    before, start = _peak(), time.process_time()
    inverter = HessianInverter("cg", SHIFT, curvature="ggn", loss="cross_entropy").fit(model, loader)
    _, info = inverter.solve(B)
    return before, _peak(), time.process_time() - start, float(info["residual"].max())


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
