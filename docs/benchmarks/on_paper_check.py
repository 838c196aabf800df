"""What the cost model predicts of small cases against what is counted and measured: see ``on_paper.py --check``."""

from __future__ import annotations

import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from unittest import mock

import cost_model as paper
import psutil
import sklearn
import torch
from cost_model import MLP, Cost
from rates import bandwidth, least_seconds
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from skinvert import HessianInverter
from skinvert.curvature import GGN, SampledGGN
from skinvert.methods import CG, EKFAC, KFAC, MINRES, Arnoldi, Diagonal, Direct, HarmonicMean, LiSSA, Nystroem
from skinvert.methods.base import Method

aten, CPU = torch.ops.aten, torch.device("cpu")
Shape = tuple[int, ...]


def _addmm(_: Shape, a: Shape, b: Shape, **__: object) -> float:
    return 2 * a[0] * a[1] * b[1]


def _baddbmm(_: Shape, a: Shape, b: Shape, **__: object) -> float:
    return 2 * a[0] * a[1] * a[2] * b[2]


def _mv(a: Shape, _: Shape, **__: object) -> float:
    return 2 * a[0] * a[1]


# FlopCounterMode counts products of matrices, but not those that add in place to what is there, nor LAPACK's.
IN_PLACE = {aten.addmm_: _addmm, aten.baddbmm_: _baddbmm, aten.mv: _mv}
LAPACK = {
    aten.linalg_cholesky_ex: lambda a, **_: a[-1] ** 3 / 3,
    aten.cholesky_solve: lambda b, a, *_, **__: 2 * a[-1] ** 2 * b[-1],
    aten._linalg_eigh: lambda a, *_, **__: 9 * a[-1] ** 3,
    aten.linalg_qr: lambda a, *_, **__: 4 * a[0] * a[1] ** 2,
    aten._linalg_svd: lambda a, *_, **__: 6 * max(a) * min(a) ** 2,
    aten.linalg_solve_triangular: lambda a, b, **_: a[0] ** 2 * b[1],
}


def counted(work: Callable[[], object]) -> float:
    """Return the operations of a call."""
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE | LAPACK) as counter:
        work()
    return counter.get_total_flops()


@dataclass(frozen=True)
class Case:
    """A method, what the model says of its fit and of a solve, once these have been done, and the rows of its GEMMs."""

    name: str
    method: Method
    curvature: str | SampledGGN
    fit: Callable[[Work], Cost]
    solve: Callable[[Work], Cost]
    rows: int = paper.BATCH


STEP_ROWS, ARNOLDI_RANK, SKETCH_RANK = 64, 12, 48


def _krylov(method: Method, solve: Callable[..., Cost], curvature: str) -> Case:
    def cost(w: Work) -> Cost:
        return solve(w.net, w.n, w.k, w.t, curvature)

    return Case(f"{method.name}, {curvature}", method, curvature, lambda w: paper.first_pass(w.net, w.n), cost)


def _lissa(w: Work) -> Cost:
    return paper.lissa(w.net, w.n, w.k, w.t * STEP_ROWS // w.n, "ggn", STEP_ROWS)


def _by_layers(w: Work) -> Cost:
    return paper.kfac_solve(w.net, w.k)


def _diagonal(curvature: str) -> Case:
    def fit(w: Work) -> Cost:
        return paper.diagonal_fit(w.net, w.n, curvature)

    return Case(f"diagonal, {curvature}", Diagonal(), curvature, fit, lambda w: paper.diagonal_solve(w.net, w.k))


def _direct(curvature: str) -> Case:
    def fit(w: Work) -> Cost:
        return paper.direct_fit(w.net, w.n, curvature)

    return Case(f"direct, {curvature}", Direct(), curvature, fit, lambda w: paper.direct_solve(w.net, w.k))


CURVATURES = ("hessian", "ggn", "empirical_fisher")
CASES = [
    *(_krylov(CG(maxiter=4), paper.cg, curvature) for curvature in CURVATURES),
    *(_krylov(MINRES(maxiter=4), paper.minres, curvature) for curvature in CURVATURES),
    Case(
        "lissa, ggn",
        LiSSA(maxiter=60, batch_size=STEP_ROWS),
        "ggn",
        lambda w: paper.lissa_fit(w.net, w.n, "ggn", STEP_ROWS),
        _lissa,
        STEP_ROWS,
    ),
    Case(
        "arnoldi, ggn",
        Arnoldi(rank=ARNOLDI_RANK),
        "ggn",
        lambda w: paper.arnoldi_fit(w.net, w.n, ARNOLDI_RANK, w.products),
        lambda w: paper.low_rank_solve(w.net, w.k, ARNOLDI_RANK),
    ),
    Case(
        "nystroem, ggn",
        Nystroem(rank=SKETCH_RANK),
        "ggn",
        lambda w: paper.nystroem_fit(w.net, w.n, SKETCH_RANK),
        lambda w: paper.low_rank_solve(w.net, w.k, SKETCH_RANK),
    ),
    Case("kfac, ggn", KFAC(), "ggn", lambda w: paper.kfac_fit(w.net, w.n), _by_layers),
    Case("ekfac, ggn", EKFAC(), "ggn", lambda w: paper.ekfac_fit(w.net, w.n), _by_layers),
    Case("ekfac, sampled_ggn", EKFAC(), SampledGGN(1), lambda w: paper.ekfac_fit(w.net, w.n, 1), _by_layers),
    *(_diagonal(curvature) for curvature in CURVATURES),
    Case(
        "harmonic_mean",
        HarmonicMean(),
        "empirical_fisher",
        lambda w: paper.harmonic_mean_fit(w.net, w.n),
        lambda w: paper.harmonic_mean_solve(w.net, w.n, w.k),
    ),
    *(_direct(curvature) for curvature in CURVATURES),
]


@dataclass
class Work:
    """A case on random data: its two steps; t iterations of the solve, and the products with a row in the fit."""

    case: Case
    net: MLP
    n: int
    k: int
    activation: type[nn.Module] = nn.Tanh

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for i, o in self.net.layers:
            layers += [nn.Linear(i, o), self.activation()]
        self.model = nn.Sequential(*layers[:-1])
        self.data = torch.randn(self.n, self.net.sizes[0]), torch.randint(self.net.outputs, (self.n,))
        self.B = torch.randn(self.k, self.net.parameters)
        self.products, self.t = 0, 0

    def fit(self) -> None:
        """Fit, without judging against the exact curvature what the approximate methods solve."""
        with self._counting():
            self.inverter = HessianInverter(
                self.case.method, 1.0, curvature=self.case.curvature, loss="cross_entropy", check_residual=False
            ).fit(self.model, self.data)

    def solve(self) -> None:
        """Solve, and take note of the iterations."""
        _, info = self.inverter.solve(self.B)
        self.t = int(info["n_iter"].max()) if "n_iter" in info else 0

    def predicted(self) -> tuple[Cost, Cost]:
        """Return what the model says of both, once they have been done."""
        return self.case.fit(self), self.case.solve(self)

    @contextmanager
    def _counting(self) -> Iterator[None]:
        apply = GGN.apply

        def counting(curvature: GGN, V: torch.Tensor) -> torch.Tensor:
            self.products += len(V)
            return apply(curvature, V)

        with mock.patch.object(GGN, "apply", counting):
            yield


@dataclass(frozen=True)
class Found:
    """Operations, seconds or bytes of one step: as counted or measured, and as the model says.

    ``calls`` is the part of what is predicted that Python and torch take whatever the layers' width.
    """

    case: str
    step: str
    measured: float
    predicted: float
    calls: float = 0.0

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted / self.measured if self.measured else 1.0

    @property
    def seconds(self) -> tuple[float, float, float]:
        """What is added up over steps."""
        return self.measured, self.predicted, self.calls


def operations(case: Case, net: MLP, n: int, k: int) -> list[Found]:
    """Return the operations of a case's fit and solve."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        work = Work(case, net, n, k)
        fit, solve = counted(work.fit), counted(work.solve)
    expected = work.predicted()
    steps = zip(("fit", f"{k} rows"), (fit, solve), expected, strict=True)
    return [Found(case.name, step, found, cost.operations) for step, found, cost in steps]


def streamed_product(curvature: str, k: int) -> Found:
    """Return the operations of a product whose graphs do not fit the working memory."""
    net, n, case = SMALL, 1024, next(case for case in CASES if case.name == f"cg, {curvature}")
    work = Work(case, net, n, k)
    with sklearn.config_context(working_memory=1):
        work.fit()
        A = work.inverter.curvature_
        # What is found out about a shape once is not a product's.
        A.apply(work.B)
        found = counted(lambda: A.apply(work.B))
    predicted = paper.product(net, n, k, curvature, kept=False).operations
    return Found(case.name, f"a product with {k} rows, streamed", found, predicted)


# -- seconds and bytes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """What one thread reaches: GEMMs of a network's layers, ``eigh``, a copy that no cache holds, and new pages."""

    gemm: float
    lapack: float
    bandwidth: float
    pages: float

    def seconds(self, cost: Cost) -> float:
        """Return what a cost takes."""
        found = cost.gemm / self.gemm + cost.lapack / self.lapack
        return found + cost.streamed / self.bandwidth + cost.fresh / self.pages


def measured_rates(net: MLP, rows: int) -> Rates:
    """Return the rates, by CPU seconds."""
    operations, calls = 0.0, []
    for i, o in net.layers:
        a, W, g = torch.randn(rows, i), torch.randn(o, i), torch.randn(rows, o)
        # Forward, the signal, and the gradient by the weight.
        calls += [partial(torch.mm, a, W.mT), partial(torch.mm, g, W), partial(torch.mm, g.mT, a)]
        operations += 3 * 2 * rows * i * o
    seconds = least_seconds(lambda: [call() for call in calls], CPU, 3)
    A = torch.randn(256, 256)
    A = A + A.mT
    size = 2**24
    pages = 4 * size / least_seconds(lambda: torch.zeros(size).add_(1), CPU, 1)
    lapack = 9 * 256**3 / least_seconds(lambda: torch.linalg.eigh(A), CPU, 1)
    return Rates(operations / seconds, lapack, bandwidth(CPU, 64), pages)


def cpu_seconds(case: Case, net: MLP, n: int, k: int, repeats: int = 3) -> list[Found]:
    """Return the CPU seconds of fit and solve, the median over repeats, each predicted by rates before and after it.

    And by what the same calls take on layers of eight units, which is Python's and torch's own: no arithmetic is in it.
    """
    torch.set_num_threads(1)
    found: list[list[tuple[float, float, float]]] = [[], []]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(repeats):
            # A tanh takes some 2.5 ns, thirty times what its bytes do.
            work, before = Work(case, net, n, k, nn.ReLU), measured_rates(net, case.rows)
            seconds = [_timed(work.fit), _timed(work.solve)]
            after, calls = measured_rates(net, case.rows), _seconds_of_calls(work)
            for rows, taken, cost, own in zip(found, seconds, work.predicted(), calls, strict=True):
                rows.append((taken, (before.seconds(cost) + after.seconds(cost)) / 2 + own, own))
    medians = [[statistics.median(column) for column in zip(*rows, strict=True)] for rows in found]
    return [Found(case.name, step, *pair) for step, pair in zip(("fit", f"{k} rows"), medians, strict=True)]


def _seconds_of_calls(work: Work) -> tuple[float, float]:
    """Return what a fit and a solve take on as many layers, of eight units: of iterations as many as ``work`` took."""
    small = Work(work.case, MLP((8,) * len(work.net.sizes)), work.n, work.k, nn.ReLU)
    fit, solve = _timed(small.fit), _timed(small.solve)
    return fit, solve * work.t / small.t if small.t else solve


def _timed(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def peak_bytes(case: Case, net: MLP, n: int, k: int) -> Found:
    """Return by how much fit and solve let the resident memory grow at the peak, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_bytes, (CASES.index(case), net, n, k))


def _peak_bytes(index: int, net: MLP, n: int, k: int) -> Found:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    case = CASES[index]
    # What is loaded and made once is not the case's.
    for start in (Work(case, MLP((8, 9, 10, 4)), 40, 2), Work(case, net, n, k)):
        before = psutil.Process().memory_info().rss
        # Linux: the peak from here on.
        Path("/proc/self/clear_refs").write_text("5")
        start.fit()
        start.solve()
        peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        grown = 1024 * int(peak.split()[1]) - before
        fit, solve = start.predicted()
    return Found(case.name, "peak", grown, max(fit.held, solve.held))


# -- the report --------------------------------------------------------------------------------------------------------

# Sizes that are counted; timed, with the rows; and whose peak is measured.
SMALL, MATRIX = MLP((24, 40, 36, 10)), MLP((12, 14, 12, 5))
TIMED = {
    "p = 13,082": (MLP((64, 96, 64, 10)), 8192, ("cg, ggn", "ekfac, ggn")),
    "p = 84,618": (MLP((196, 256, 128, 10)), 4096, ()),
    "p = 535,818": (MLP((784, 512, 256, 10)), 2048, ("cg, ggn", "minres, ggn", "ekfac, ggn", "diagonal, ggn")),
}
TIMED_MATRIX = MLP((64, 48, 24, 10)), 4096
PEAKS = [
    *((name, MLP((784, 512, 256, 10)), 2048, 32) for name in ("cg, ggn", "cg, hessian", "minres, hessian")),
    *((name, MLP((784, 512, 256, 10)), 1024, 32) for name in ("lissa, ggn", "arnoldi, ggn", "nystroem, ggn")),
    *((name, MLP((784, 512, 256, 10)), 2048, 64) for name in ("kfac, ggn", "ekfac, ggn", "diagonal, ggn")),
    ("ekfac, sampled_ggn", MLP((1500, 1500, 1500, 10)), 1024, 8),
    *((name, MLP((196, 256, 128, 10)), 1024, 16) for name in ("cg, empirical_fisher", "harmonic_mean")),
    *((name, MLP((96, 50, 30, 10)), 4096, 64) for name in ("direct, ggn", "direct, hessian")),
]


def of_matrix(case: Case) -> bool:
    """Whether a case takes p² numbers, and so a small p."""
    return case.name.startswith("direct")


def counts(case: Case, n: int = 512) -> list[Found]:
    """Return the operations of a case at the size that is counted."""
    return operations(case, MATRIX if of_matrix(case) else SMALL, n, 16)


def report(repeats: int) -> None:
    """Print operations, seconds and bytes."""
    print("| operations | step | counted | predicted | ratio |\n|---|---|---|---|---|")
    for case in CASES:
        for one in counts(case):
            _print(one.case, one, "{:.3g}")
    # A virtual machine has its host fetch what it never touched, at several times what a page takes later.
    torch.ones(2**30)
    print("\n| seconds, fit and 16 rows | p | measured | predicted | ratio | calls' part |\n|---|---|---|---|---|---|")
    for case, p, net, n in _timed_cases():
        fit, solve = cpu_seconds(case, net, n, 16, repeats)
        seconds = [a + b for a, b in zip(fit.seconds, solve.seconds, strict=True)]
        both = Found(case.name, p, *seconds)
        _print(case.name, both, "{:.3f}", f" {both.calls / both.predicted:.0%} |")
    print("\n| bytes at the peak | p, n, k | measured | predicted | ratio |\n|---|---|---|---|---|")
    by_name = {case.name: case for case in CASES}
    for name, net, n, k in PEAKS:
        found = peak_bytes(by_name[name], net, n, k)
        _print(name, replace(found, step=f"{net.parameters:,}, {n:,}, {k}"), "{:.3g}")


def _timed_cases() -> Iterator[tuple[Case, str, MLP, int]]:
    for p, (net, n, names) in TIMED.items():
        for case in CASES:
            if not of_matrix(case) and (not names or case.name in names):
                # n p numbers, several times.
                by_rows = case.name == "harmonic_mean" or case.name.startswith(("cg, emp", "minres, emp"))
                yield case, p, net, 1024 if by_rows else n
    net, n = TIMED_MATRIX
    for case in CASES:
        if of_matrix(case):
            yield case, f"p = {net.parameters:,}", net, n


def _print(name: str, one: Found, form: str, more: str = "") -> None:
    cells = " | ".join(form.format(value) for value in (one.measured, one.predicted))
    print(f"| {name} | {one.step} | {cells} | {one.ratio:.2f} |{more}", flush=True)
