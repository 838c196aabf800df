"""How near each step comes to what the machine could do: operations and bytes by formula, seconds as measured.

The rate of a GEMM and the bandwidth of a copy are measured first, on one thread. A step's floor is the larger of its
operations at that rate and its bytes at that bandwidth; "reached" is the floor over the CPU seconds that skinvert took.

n rows of data, k right-hand sides, p parameters, c outputs. A layer is a GEMM (rows m, inputs i, outputs o): m = n for
Linear, n times the positions for a convolution. Σ₂ is over all layers but the first, m₁i₁o₁ is the first's.

    OMP_NUM_THREADS=1 python docs/benchmarks/floor.py --work W1 W2
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from rates import bandwidth, gemm_rate, least_seconds
from torch import nn
from workloads import WORKLOADS, Workload

from skinvert import HessianInverter
from skinvert.methods import Direct
from skinvert.operators import Dense

CPU = torch.device("cpu")
# Right-hand sides of a product: the rate is that of a row, and all of W1's would only take longer.
MOST_ROWS = 64
# The most parameters of which a matrix is made here.
MOST_SIDE = 5000


@dataclass(frozen=True)
class Gemm:
    """A layer of the model: a matrix (rows, inputs) times one (inputs, outputs)."""

    rows: int
    inputs: int
    outputs: int

    @property
    def product(self) -> int:
        """Rows times inputs times outputs."""
        return self.rows * self.inputs * self.outputs

    @property
    def numbers(self) -> int:
        """Numbers of the three matrices."""
        return self.rows * (self.inputs + self.outputs) + self.inputs * self.outputs


@dataclass(frozen=True)
class Step:
    """A step: its formula, what the formula gives in operations and bytes, and the call that does it."""

    name: str
    formula: str
    operations: float
    bytes: float
    call: Callable[[], object]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", default=["W1", "W2", "W3", "W4"], choices=sorted(WORKLOADS))
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    rate, double, speed = gemm_rate(torch.float32, CPU), gemm_rate(torch.float64, CPU), bandwidth(CPU)
    print(f"GEMM: {rate / 1e9:.1f} Gflop/s in float32, {double / 1e9:.1f} in float64; copy: {speed / 1e9:.1f} GB/s.\n")
    print("| work | step | operations | Gflop | MB | floor, s | measured, s | reached |")
    print("|---|---|---|---|---|---|---|---|")
    for name in args.work:
        for step in steps(WORKLOADS[name]()):
            floor = max(step.operations / rate, step.bytes / speed)
            seconds = least_seconds(step.call, CPU, args.repeats)
            size = f"{step.operations / 1e9:.3g} | {step.bytes / 1e6:.3g}"
            cells = f"{step.formula} | {size} | {floor:.3g} | {seconds:.3g} | {floor / seconds:.0%}"
            print(f"| {name} | {step.name} | {cells} |", flush=True)


def steps(work: Workload) -> Iterator[Step]:
    """Yield the steps of one piece of work, in the order in which a solve takes them."""
    yield from _products(work)
    if work.B.shape[1] <= MOST_SIDE:
        yield from _dense(work)


def _products(work: Workload) -> Iterator[Step]:
    layers, B = gemms(work), work.B[:MOST_ROWS]
    k, p, n, c = len(B), B.shape[1], len(work.data[0]), _outputs(work)
    hessian, ggn = (_fitted(work, curvature) for curvature in ("hessian", "ggn"))
    # θ, v and the product a row; a GEMM reads two matrices and writes the third.
    vectors, moved = 3 * k * p, sum(layer.numbers for layer in layers)
    tangents, inner = sum(layer.product for layer in layers), sum(layer.product for layer in layers[1:])
    name = f"Hessian product, {k} rows"
    # ż = Ẇa + Wȧ, and two products each for the slopes of a and W; the first layer's ȧ and slope of a are none.
    operations = k * (12 * inner + 4 * (tangents - inner))
    bytes_moved = 4 * (k * (6 * moved - 4 * layers[0].numbers) + vectors)
    yield Step(name, "k (4 m₁i₁o₁ + 12 Σ₂ mio)", operations, bytes_moved, lambda: hessian.curvature_.apply(B))
    # J v: two products a layer; Jᵀu: two more, but for the first layer's.
    operations = k * (8 * inner + 4 * (tangents - inner)) + 4 * k * n * c
    bytes_moved = 4 * (k * (4 * moved - 2 * layers[0].numbers) + vectors)
    formula = "k (4 m₁i₁o₁ + 8 Σ₂ mio + 4 nc)"
    yield Step(f"GGN product, {k} rows", formula, operations, bytes_moved, lambda: ggn.curvature_.apply(B))
    operations = k * (12 * inner + 4 * (tangents - inner))
    X = ggn.solve(B).x
    bytes_moved = 4 * (k * (6 * moved - 4 * layers[0].numbers) + vectors)
    yield Step(f"Hessian residual, {k} rows", "of a product", operations, bytes_moved, lambda: hessian.residual(B, X))


def _dense(work: Workload) -> Iterator[Step]:
    layers, (k, p), n, c = gemms(work), work.B.shape, len(work.data[0]), _outputs(work)
    ggn, shift = _fitted(work, "ggn"), work.hessian_perturbation
    pairs = [(one, other) for at, one in enumerate(layers) for other in layers[: at + 1]]
    # Of each pair of layers Σ (c, o)ᵀ(c, o') a row, then all rows' Kronecker products with their inputs by one GEMM.
    outer = sum(2 * n * c * one.outputs * other.outputs for one, other in pairs)
    inputs = [(layer.inputs + 1) * layer.outputs for layer in layers]
    pairwise = sum(2 * n * a * b for at, a in enumerate(inputs) for b in inputs[: at + 1])
    formula = "2 n Σ (io i'o' + c o o'), pairs"
    yield Step("GGN, assembled", formula, outer + pairwise, 4 * (2 * p * p + n * p), ggn.curvature_.to_dense)
    dense = Dense(ggn.curvature_.to_dense())
    yield Step("Cholesky, condition", "p³/3", p**3 / 3, 8 * p * p, lambda: Direct().invert(dense, shift))
    inverse = Direct().invert(dense, shift)
    yield Step(f"solve, {k} rows, judged", "2 p²k + 2 p²k", 4 * p * p * k, 8 * p * p, lambda: inverse.solve(work.B))


def gemms(work: Workload) -> list[Gemm]:
    """Return the model's layers as GEMMs over all rows, by one forward pass."""
    found: list[Gemm] = []

    def note(module: nn.Module, _: object, output: torch.Tensor) -> None:
        weight = module.weight
        found.append(Gemm(output.numel() // weight.shape[0], weight[0].numel(), weight.shape[0]))

    handles = [module.register_forward_hook(note) for module in work.model if isinstance(module, nn.Linear | nn.Conv2d)]
    with torch.no_grad():
        work.model(work.data[0])
    for handle in handles:
        handle.remove()
    return found


def _outputs(work: Workload) -> int:
    return work.model(work.data[0][:1]).numel()


def _fitted(work: Workload, curvature: str) -> HessianInverter:
    inverter = HessianInverter("cg", work.hessian_perturbation, curvature=curvature, loss="cross_entropy")
    return inverter.fit(work.model, work.data)


if __name__ == "__main__":
    main()
