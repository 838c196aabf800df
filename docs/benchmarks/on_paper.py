"""What each method costs at sizes that nobody here has run, on paper, and how the model was checked where one can.

Square layers of width d, and c outputs: p = 10⁶ is four of 512, 10⁸ six of 4,096, 10⁹ fifteen of 8,192, c = 10; with
c = 50,000 classes, as of tokens, 10⁸ is ten of 1,536 and 10⁹ eight of 8,192. Fit and a solve of 16 rows, in float32; 50
iterations of cg and minres, 5 epochs of lissa by 256 rows, arnoldi of rank 50 by 200 products, nystroem of rank 100.
Seconds are those of one device of 30 Tflop/s and 2 TB/s, the larger of both. **no** is more than 32 devices of 80 GB
hold, or than a year of one; what does not fit one is bold.

    python docs/benchmarks/on_paper.py                             # each step: operations, seconds, bytes
    python docs/benchmarks/on_paper.py --short                     # the tables of docs/scaling.md
    OMP_NUM_THREADS=1 python docs/benchmarks/on_paper.py --check   # against what is counted and measured, on Linux
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import cost_model as paper
from cost_model import MLP, Cost

RATE, BANDWIDTH, MEMORY, DEVICES = 30e12, 2e12, 80e9, 32
ROWS, ITERATIONS, EPOCHS, RANK, PRODUCTS, SKETCH = 16, 50, 5, 50, 200, 100
SIZES = {"10⁶": MLP((512,) * 5 + (10,)), "10⁸": MLP((4096,) * 7 + (10,)), "10⁹": MLP((8192,) * 16 + (10,))}
TOKENS = {"10⁸": MLP((1536,) * 11 + (50_000,)), "10⁹": MLP((8192,) * 9 + (50_000,))}
SAMPLES = {"10⁶": 10**6, "10⁹": 10**9}


class Size(NamedTuple):
    """A network and a number of rows."""

    net: MLP
    n: int

    def fits(self, curvature: str = "ggn") -> bool:
        """Whether what a product needs of all rows is kept."""
        return paper.fits(self.net, self.n, curvature)


@dataclass(frozen=True)
class Row:
    """A method: what its fit and its solve take, and whether it reduces once a product, or in the fit."""

    name: str
    fit: Callable[[Size], Cost]
    solve: Callable[[Size], Cost]
    per_product: bool = False

    def reduced(self, at: Size) -> float:
        """Bytes all-reduced in a product, or in the fit beside the gradient."""
        if self.per_product:
            return paper.product(*at, ROWS).reduced
        return self.fit(at).reduced - paper.first_pass(*at).reduced

    def held(self, at: Size) -> float:
        """Bytes at the peak of both."""
        return max(self.fit(at).held, self.solve(at).held)


def krylov(name: str, solve: Callable[..., Cost], curvature: str) -> Row:
    """Return the row of cg or minres with a curvature."""

    def cost(at: Size) -> Cost:
        return solve(*at, ROWS, ITERATIONS, curvature, at.fits(curvature))

    return Row(f"`{name}`, {curvature}", lambda at: paper.first_pass(*at), cost, per_product=True)


def by_layers(at: Size) -> Cost:
    """Return a solve of kfac or ekfac."""
    return paper.kfac_solve(at.net, ROWS)


METHODS = [
    Row("`direct`, ggn", lambda at: paper.direct_fit(*at), lambda at: paper.direct_solve(at.net, ROWS)),
    *(krylov("cg", paper.cg, curvature) for curvature in ("hessian", "ggn", "empirical_fisher")),
    krylov("minres", paper.minres, "hessian"),
    Row(
        "`lissa`, ggn",
        lambda at: paper.lissa_fit(*at),
        lambda at: paper.lissa(*at, ROWS, EPOCHS, kept=at.fits()),
        per_product=True,
    ),
    Row(
        "`arnoldi`, ggn",
        lambda at: paper.arnoldi_fit(*at, RANK, PRODUCTS, kept=at.fits()),
        lambda at: paper.low_rank_solve(at.net, ROWS, RANK),
    ),
    Row(
        "`nystroem`, ggn",
        lambda at: paper.nystroem_fit(*at, SKETCH, kept=at.fits()),
        lambda at: paper.low_rank_solve(at.net, ROWS, SKETCH),
    ),
    Row("`kfac`, ggn", lambda at: paper.kfac_fit(*at), by_layers),
    Row("`ekfac`, ggn", lambda at: paper.ekfac_fit(*at), by_layers),
    Row("`ekfac`, sampled_ggn", lambda at: paper.ekfac_fit(*at, draws=1), by_layers),
    Row("`diagonal`, ggn", lambda at: paper.diagonal_fit(*at), lambda at: paper.diagonal_solve(at.net, ROWS)),
    Row(
        "`diagonal`, hessian",
        lambda at: paper.diagonal_fit(*at, "hessian", at.fits()),
        lambda at: paper.diagonal_solve(at.net, ROWS),
    ),
    Row(
        "`harmonic_mean`",
        lambda at: paper.harmonic_mean_fit(*at),
        lambda at: paper.harmonic_mean_solve(*at, ROWS),
        per_product=True,
    ),
]
# With c = 50,000 an exact GGN takes as many backward passes.
MANY_CLASSES = [row for row in METHODS if row.name in ("`cg`, ggn", "`ekfac`, ggn", "`ekfac`, sampled_ggn")]


def main() -> None:
    """Print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="the tables of docs/scaling.md")
    parser.add_argument("--check", action="store_true", help="predicted against counted and measured")
    parser.add_argument("--repeats", type=int, default=3, help="of what is timed")
    args = parser.parse_args()
    if args.check:
        from on_paper_check import report

        report(args.repeats)
        return
    print("\n".join(short() if args.short else full()))


# -- the tables --------------------------------------------------------------------------------------------------------


def seconds(cost: Cost) -> float:
    """Return the seconds of the device."""
    return max(cost.operations / RATE, cost.streamed / BANDWIDTH)


def full() -> Iterator[str]:
    """Yield a table of all steps for each p, c and n."""
    for nets, rows in ((SIZES, METHODS), (TOKENS, MANY_CLASSES)):
        for p, net in nets.items():
            for name, n in SAMPLES.items():
                yield f"\np = {p} ({net.parameters:,}), c = {net.outputs:,}, n = {name}\n"
                yield from _header(["method", "step", "operations", "time", "held", "streamed", "all-reduced"])
                for row in rows:
                    for step, cost in (("fit", row.fit(Size(net, n))), (f"{ROWS} rows", row.solve(Size(net, n)))):
                        sizes = [readable(size) for size in (cost.held, cost.streamed, cost.reduced)]
                        yield _line([row.name, step, f"{cost.operations:.1e}", duration(seconds(cost)), *sizes])


def short() -> Iterator[str]:
    """Yield the table of operations and times, and that of bytes."""
    # The empirical Fisher costs what the GGN does, where its factor does not fit.
    few = [row for row in METHODS if "empirical" not in row.name]
    for nets, rows in ((SIZES, few), (TOKENS, MANY_CLASSES)):
        sizes = [Size(net, n) for net in nets.values() for n in SAMPLES.values()]
        yield from _header(["", *(f"p = {p}, n = {n}" for p in nets for n in SAMPLES)])
        for row in rows:
            yield _line([row.name, *(_told(row, at) for at in sizes)])
        yield ""
        yield from _header(["", *(f"held, p = {p}" for p in nets), *(f"reduced, p = {p}" for p in nets)])
        for row in rows:
            once = " a product" if row.per_product else ""
            held = [_bold(row.held(at)) for at in sizes if at.n == 10**6]
            yield _line([row.name, *held, *(readable(row.reduced(at)) + once for at in sizes if at.n == 10**6)])
        yield ""


def _header(names: list[str]) -> Iterator[str]:
    yield _line(names)
    yield "|---" * len(names) + "|"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _told(row: Row, at: Size) -> str:
    fit, solve = row.fit(at), row.solve(at)
    if row.held(at) > DEVICES * MEMORY:
        return f"**no**: {readable(row.held(at))}"
    took = seconds(fit) + seconds(solve)
    text = f"{(fit + solve).operations:.0e}, {duration(took)}".replace("e+", "e")
    return f"**no**: {text}" if took > 365 * 86400 else text


def _bold(size: float) -> str:
    return f"**{readable(size)}**" if size > MEMORY else readable(size)


def duration(took: float) -> str:
    """Return seconds as one says them."""
    for unit, length in (("years", 365 * 86400), ("days", 86400), ("h", 3600), ("min", 60)):
        if took >= 1.5 * length:
            return f"{took / length:,.0f} {unit}"
    return f"{took:.2g} s"


def readable(size: float) -> str:
    """Return a number of bytes as one says it."""
    for unit, length in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= length:
            return f"{size / length:,.0f} {unit}" if size >= 10 * length else f"{size / length:.1f} {unit}"
    return f"{size / 1e3:.0f} kB"


if __name__ == "__main__":
    main()
