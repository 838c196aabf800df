"""skinvert against its peers on the same systems: CPU and wall seconds, memory, and the true residual, on one thread.

All contestants run in one process, in turn: each once a round, so that what else the machine does meets all of them.
Seconds are the least of the rounds, their median in brackets. MB is the growth of the peak resident memory in a forked
child, before the rounds. The true residual is the largest ‖(H + λI)x − b‖ / ‖b‖ in float64, by products of another
code. A contestant that fails, or whose residual is above the row's limit, stands in brackets and is not counted. The
ratio is the CPU seconds of the fastest counted peer over skinvert's.

Kronecker factors approximate: their rows have no limit, but how well the scores B Xᵀ correlate with those of the exact
GGN's solution, and the relative error of X to it. A peer counts there whose correlation is within 0.01 of skinvert's.

    make bench, or
    OMP_NUM_THREADS=1 .venv-bench/bin/python docs/benchmarks/peers.py --work W1 W2 --rounds 3
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from statistics import median

import torch
from contestants import Row, Solve, rows
from workloads import WORKLOADS, Workload, ggn_product, true_residual

# By how much the correlation of a peer's approximation may be below skinvert's.
WORSE = 0.01
# Rows whose exact solution judges an approximation where p is large: the judge takes tens of products, in float64.
JUDGED = 4
HEAD = "| work | contestant | CPU s | wall s | MB | true residual | ratio |\n|---|---|---|---|---|---|---|"
QUALITY_HEAD = "| work | contestant | correlation of scores | relative error |\n|---|---|---|---|"


@dataclass
class Result:
    """What was measured of a contestant in a row."""

    row: str
    contestant: str
    limit: float | None
    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    megabytes: float | None = None
    residual: float | None = None
    correlation: float | None = None
    relative_error: float | None = None
    least_correlation: float | None = None
    failure: str | None = None

    @property
    def counts(self) -> bool:
        """Whether it solved, as accurately as asked."""
        if self.failure is not None or self.residual is None:
            return False
        if self.correlation is not None and self.least_correlation is not None:
            return self.correlation >= self.least_correlation
        return self.limit is None or self.residual <= self.limit

    @property
    def is_ours(self) -> bool:
        """Whether it is skinvert's."""
        return self.contestant.startswith("skinvert")


def main() -> None:
    """Measure and print."""
    args = _arguments()
    torch.set_num_threads(1)
    works: dict[str, Workload] = {}
    results = []
    print(HEAD, flush=True)
    for row in rows():
        if not _asked(row, args):
            continue
        work = works.setdefault(row.work, WORKLOADS[row.work]())
        measured = measure(row, work, args)
        results += measured
        print("\n".join(_lines(measured)), flush=True)
    print("\n" + "\n".join(work.facts for work in works.values()))
    print("\n".join(_quality([result for result in results if result.correlation is not None])))
    if args.json:
        args.json.write_text(json.dumps([asdict(result) for result in results], indent=1))


def measure(row: Row, work: Workload, args: argparse.Namespace) -> list[Result]:
    """Return what each contestant of a row took: memory in a child first, then seconds, in turn."""
    only = args.contestant
    chosen = {name: solve for name, solve in row.contestants.items() if not only or any(part in name for part in only)}
    results = {name: Result(row.name, name, row.limit) for name in chosen}
    solutions: dict[str, torch.Tensor] = {}
    for name, solve in chosen.items() if args.memory else ():
        results[name].megabytes = megabytes(solve, work)
    for _ in range(args.rounds):
        for name, solve in chosen.items():
            if results[name].failure is None:
                solutions[name] = timed(solve, work, results[name], args.limit)
    exact = exact_ggn(work) if row.limit is None else None
    for name, X in solutions.items():
        if results[name].failure is None:
            judge(results[name], work, X, row.curvature, exact)
    ours = [result.correlation for result in results.values() if result.is_ours and result.correlation is not None]
    for result in results.values():
        result.least_correlation = max(ours) - WORSE if ours else None
    return list(results.values())


def timed(solve: Solve, work: Workload, result: Result, limit: float) -> torch.Tensor:
    """Return the solution, its seconds added to the result; an empty one where it fails or takes too long."""
    cpu, wall = time.process_time(), time.perf_counter()
    try:
        with warnings.catch_warnings(), stopped_after(limit):
            warnings.simplefilter("ignore")
            X = solve(work).detach()
    except Exception as error:  # Whatever a peer raises is its result.
        result.failure = f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
        return torch.empty(0)
    result.cpu.append(time.process_time() - cpu)
    result.wall.append(time.perf_counter() - wall)
    print(f"{result.row}: {result.contestant} took {result.cpu[-1]:.3g} s", file=sys.stderr, flush=True)
    return X


@contextmanager
def stopped_after(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in what takes more CPU seconds; 0 is no limit."""

    def stop(*_: object) -> None:
        message = f"more than {seconds:g} CPU s"
        raise TimeoutError(message)

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def judge(result: Result, work: Workload, X: torch.Tensor, curvature: str, exact: torch.Tensor | None) -> None:
    """Add the true residual, and how near an approximation comes to the exact solution."""
    result.residual = true_residual(work, X, curvature)
    if exact is None:
        return
    # All rows' scores for those that the judge has solved.
    B, X = work.B.double(), X[: len(exact)].double()
    scores = torch.stack([(B @ X.T).flatten(), (B @ exact.T).flatten()])
    result.correlation = float(torch.corrcoef(scores)[0, 1])
    result.relative_error = float((X - exact).norm() / exact.norm())


def megabytes(solve: Solve, work: Workload) -> float | None:
    """Return by how much a forked child's peak resident memory grows while it solves; None where it ends badly."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            warnings.simplefilter("ignore")
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            solve(work)
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            os.write(writing, str((after - before) / 1024).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return float(text) if text else None


@cache
def exact_ggn(work: Workload) -> torch.Tensor:
    """Return (G + λI)⁻¹B in float64 by the judge's products: densely, or the first rows by CG where p is large."""
    shift, B, p = work.hessian_perturbation, work.B.double(), work.B.shape[1]
    if p <= 5000:
        eye = torch.eye(p, dtype=torch.float64)
        return torch.linalg.solve(ggn_product(work, eye) + shift * eye, B.T).T
    B = B[:JUDGED]
    X, R = torch.zeros_like(B), B.clone()
    P, rho = R.clone(), R.square().sum(1, keepdim=True)
    while bool((R.norm(dim=1) > 1e-6 * B.norm(dim=1)).any()):
        Q = ggn_product(work, P) + shift * P
        alpha = rho / (P * Q).sum(1, keepdim=True)
        X, R = X + alpha * P, R - alpha * Q
        rho, old = R.square().sum(1, keepdim=True), rho
        P = R + rho / old * P
    return X


# -- printing ----------------------------------------------------------------------------------------------------------


def _lines(results: list[Result]) -> list[str]:
    peers = [min(result.cpu) for result in results if result.counts and not result.is_ours]
    lines = []
    for result in results:
        counted = result.is_ours and result.counts and peers
        ratio = f"{min(peers) / min(result.cpu):.2f}" if counted else ""
        cells = [result.failure] + 3 * [""] if result.failure else _cells(result)
        name = result.contestant if result.counts else f"({result.contestant})"
        lines.append(f"| {result.row} | {name} | {' | '.join(map(str, cells))} | {ratio} |")
    return lines


def _cells(result: Result) -> list[str]:
    memory = "?" if result.megabytes is None else f"{result.megabytes:.0f}"
    seconds = [f"{min(each):.3g} ({median(each):.3g})" for each in (result.cpu, result.wall)]
    return [*seconds, memory, f"{result.residual:.1e}"]


def _quality(results: list[Result]) -> list[str]:
    lines = [
        f"| {result.row} | {result.contestant} | {result.correlation:.4f} | {result.relative_error:.3f} |"
        for result in results
    ]
    return ["", QUALITY_HEAD, *lines] if lines else []


def _asked(row: Row, args: argparse.Namespace) -> bool:
    if row.work not in args.work or (row.slow and not args.slow):
        return False
    return not args.only or any(part.lower() in row.name.lower() for part in args.only)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", default=["W1", "W2", "W3"], choices=sorted(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=[], help="parts of rows' names: 'dense', 'W2 GGN'")
    parser.add_argument("--contestant", nargs="+", default=[], help="parts of contestants' names: 'skinvert'")
    parser.add_argument("--slow", action="store_true", help="the rows that take minutes too: W4's Kronecker factors")
    limit = "CPU seconds after which a contestant is stopped; 0 is never"
    parser.add_argument("--limit", type=float, default=0, help=limit)
    memory = "leave peak memory out, for which each solves once more"
    parser.add_argument("--no-memory", dest="memory", action="store_false", help=memory)
    parser.add_argument("--json", type=Path, help="where to write all that was measured")
    return parser.parse_args()


if __name__ == "__main__":
    main()
