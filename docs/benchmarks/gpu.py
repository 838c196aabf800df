"""On one GPU: a dense inverse of p = 10⁴, CG on 64 rows of p = 10⁷, EKFAC of a transformer of 10⁸ parameters.

The rate of a float32 GEMM and the bandwidth of a copy are measured first, TF32 off. Of each step stand the operations
and bytes by formula, the seconds by the clock, and the fractions of rate and bandwidth that it reaches.

    python docs/benchmarks/gpu.py
    python docs/benchmarks/gpu.py --device cpu --small      # the same steps, small: no GPU needed
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from floor import Step, gemms
from rates import bandwidth, gemm_rate, least_seconds
from torch import nn
from workloads import Workload

from skinvert import HessianInverter
from skinvert.methods import CG, Direct
from skinvert.operators import Dense

OUTPUTS, SHIFT = 10, 0.1


@dataclass(frozen=True)
class Sizes:
    """Widths of the two MLPs, rows of data, right-hand sides; width, layers, words, sequences and their length."""

    dense: tuple[int, ...] = (64, 100, 32, OUTPUTS)
    large: tuple[int, ...] = (1024, 2048, 3072, 512, OUTPUTS)
    n: int = 8192
    k: int = 64
    width: int = 768
    layers: int = 12
    words: int = 20_000
    sequences: int = 256
    length: int = 128


SMALL = Sizes(
    (16, 16, OUTPUTS), (32, 64, 32, OUTPUTS), n=512, k=8, width=32, layers=2, words=50, sequences=16, length=8
)


class Transformer(nn.Module):
    """An encoder that classifies a sequence of words by the mean of its states."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sizes.words, sizes.width)
        layer = nn.TransformerEncoderLayer(
            sizes.width, max(2, sizes.width // 64), 4 * sizes.width, 0.0, batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, sizes.layers, enable_nested_tensor=False)
        self.head = nn.Linear(sizes.width, OUTPUTS)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        """Return the scores of the classes."""
        return self.head(self.encoder(self.embedding(words)).mean(dim=1))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="small sizes, to run the same steps anywhere")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("There is no CUDA device here. Try --device cpu --small.")
    # cuDNN's convolutions are in TF32 unless told otherwise, products of matrices are not.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", category=UserWarning)
    sizes = SMALL if args.small else Sizes()
    rate, speed = gemm_rate(torch.float32, device, 1024 if args.small else 8192), bandwidth(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}: GEMM {rate / 1e12:.3g} Tflop/s in float32, copy {speed / 1e9:.4g} GB/s.\n")
    print(
        "| step | operations | Tflop | GB | s | of the GEMM's rate | of the bandwidth |\n|---|---|---|---|---|---|---|"
    )
    for steps in (dense, large, transformer):
        for step in steps(sizes, device):
            seconds = least_seconds(step.call, device, args.repeats)
            reached = f"{step.operations / rate / seconds:.1%} | {step.bytes / speed / seconds:.1%}"
            size = f"{step.operations / 1e12:.3g} | {step.bytes / 1e9:.3g}"
            print(f"| {step.name} | {step.formula} | {size} | {seconds:.3g} | {reached} |", flush=True)


def dense(sizes: Sizes, device: torch.device) -> Iterator[Step]:
    """Yield the GGN of an MLP, its factorisation, and a solve."""
    work = _mlp("dense", sizes.dense, sizes, device)
    (k, p), n = work.B.shape, sizes.n
    ggn = HessianInverter("cg", SHIFT, curvature="ggn", loss="cross_entropy").fit(work.model, work.data).curvature_
    yield Step(f"GGN of p = {p:,}, assembled", "n p²", n * p**2, 4 * (2 * p * p + n * p), ggn.to_dense)
    matrix = Dense(ggn.to_dense())
    yield Step("Cholesky, condition", "p³/3", p**3 / 3, 8 * p * p, lambda: Direct().invert(matrix, SHIFT))
    inverse = Direct().invert(matrix, SHIFT)
    yield Step(f"solve, {k} rows, judged", "4 p²k", 4 * p * p * k, 8 * p * p, lambda: inverse.solve(work.B))


def large(sizes: Sizes, device: torch.device) -> Iterator[Step]:
    """Yield one product of 64 rows with a large MLP's GGN, and conjugate gradients of a fixed number of iterations."""
    work = _mlp("large", sizes.large, sizes, device)
    (k, p), layers, iterations = work.B.shape, gemms(work), 10
    inner = sum(layer.product for layer in layers[1:])
    operations = k * (8 * inner + 4 * layers[0].product)
    moved = 4 * k * (4 * sum(layer.numbers for layer in layers) + 3 * p)
    settings = {"curvature": "ggn", "loss": "cross_entropy"}
    method = CG(rtol=1e-30, maxiter=iterations, block=False)
    inverter = HessianInverter(method, SHIFT, **settings).fit(work.model, work.data)
    formula = "k (4 m₁i₁o₁ + 8 Σ₂ mio)"
    name = f"GGN product of p = {p:,}, {k} rows"
    yield Step(name, formula, operations, moved, lambda: inverter.curvature_.apply(work.B))
    # One product an iteration and one to judge; x, r, p and Ap are read and written.
    vectors = iterations * 4 * k * p * 10
    name = f"CG, {iterations} iterations"
    total = (iterations + 1) * operations, (iterations + 1) * moved + vectors
    yield Step(name, "11 products", *total, lambda: inverter.solve(work.B))


def transformer(sizes: Sizes, device: torch.device) -> Iterator[Step]:
    """Yield EKFAC of a transformer, and its inverse applied to rows."""
    model = Transformer(sizes).to(device)
    p = sum(t.numel() for t in model.parameters())
    words = torch.randint(sizes.words, (sizes.sequences, sizes.length), device=device)
    data = words, torch.randint(OUTPUTS, (sizes.sequences,), device=device)
    rows, d, c = sizes.sequences * sizes.length, sizes.width, OUTPUTS
    layers = sizes.layers * [(d, d), (d, d), (d, d), (d, d), (d, 4 * d), (4 * d, d)]
    # Two passes of one forward and c backward; Σaaᵀ and Σggᵀ; both turned into the eigenbasis, Σ_t gaᵀ there; eigh.
    passes = 2 * sum((2 + 4 * c) * rows * i * o for i, o in layers)
    factors = sum(2 * rows * (i * i + c * o * o) for i, o in layers)
    refit = factors + sum(2 * c * rows * i * o for i, o in layers)
    bases = sum(9 * (i**3 + o**3) for i, o in layers)
    operations = passes + factors + refit + bases
    moved = 4 * sum((4 + 8 * c) * rows * (i + o) for i, o in layers)
    formula = "Σ (2(2+4c)mio + 2·2m(i²+co²) + 2cmio + 9(i³+o³))"
    settings = {"curvature": "ggn", "loss": "cross_entropy", "check_residual": False}
    inverter = HessianInverter("ekfac", SHIFT, **settings)
    yield Step(f"EKFAC of p = {p:,}", formula, operations, moved, lambda: inverter.fit(model, data))
    inverter.fit(model, data)
    B = torch.randn(min(sizes.k, 8), p, device=device)
    k = len(B)
    name, operations = f"its inverse, {k} rows", k * sum(4 * i * o * (i + o) for i, o in layers)
    yield Step(name, "k Σ 4io(i+o)", operations, 4 * 6 * k * p, lambda: inverter.solve(B))


def _mlp(name: str, widths: tuple[int, ...], sizes: Sizes, device: torch.device) -> Workload:
    layers: list[nn.Module] = []
    for i, o in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(i, o), nn.Tanh()]
    model = nn.Sequential(*layers[:-1]).to(device)
    data = torch.randn(sizes.n, widths[0], device=device), torch.randint(OUTPUTS, (sizes.n,), device=device)
    B = torch.randn(sizes.k, sum(t.numel() for t in model.parameters()), device=device)
    return Workload(name, model, data, SHIFT, B)


if __name__ == "__main__":
    main()
