"""What each method costs, on paper: operations, and bytes held, streamed and all-reduced, of an MLP's curvature.

n rows of data, k right-hand sides, p parameters, c outputs, t iterations, numbers of 4 bytes. A layer l has a weight
(oₗ, iₗ) and a bias; w₁ = i₁o₁ is the first one's, Σ stands for the sum of iₗoₗ over all layers but the first, and w =
w₁ + Σ. The first is apart since nothing is differentiated by the data: neither a tangent nor a signal goes below it. A
product of matrices (n, i) (i, o) counts 2 n i o operations. So does one with the weights of all layers, 2 n w: one
forward pass F. A backward pass is 2n (w₁ + 2Σ), and the signals alone 2nΣ.

What is one value for each entry (activations, norms, x + αp) counts in the bytes streamed, not in the operations.
``reduced`` is what processes that hold a share of the rows each must sum over: their result is then that of all rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

# Bytes of a number, of what is kept from pass to pass (scikit-learn's working_memory), of signals kept by EKFAC.
ITEM, WORKING, SIGNALS = 4, 2**30, 2**27
# Rows of a batch, and of a step of LiSSA; minibatches and Lanczos steps that its scale takes.
BATCH, STEP, SCALE_BATCHES, SCALE_STEPS = 1024, 256, 8, 12
# GEMMs of the first layer's size, and of each other's, in a product with one row.
GEMMS = {"ggn": (2, 4), "hessian": (2, 6), "empirical_fisher": (2, 4)}
# Arrays of more bytes get new pages from a CPU's system.
PAGED = 2**25
# From so many right-hand sides on they share their directions, and the operations of a batch are recorded.
BLOCK = 8
# Products of a row that hold a recording against autograd, in each chunk of rows that it pushes.
CHECKS = 4
# Rows of a symmetric product of a factor that are made at once.
STRIPE = 256
# Up to this width a symmetric product is made whole.
WHOLE = 192


@dataclass(frozen=True)
class MLP:
    """Linear layers with biases, of these sizes from the inputs to the outputs, and activations between them."""

    sizes: tuple[int, ...]

    @property
    def layers(self) -> list[tuple[int, int]]:
        """(i, o) of each layer."""
        return list(zip(self.sizes, self.sizes[1:], strict=False))

    @property
    def parameters(self) -> int:
        """p = Σ (i + 1) o."""
        return sum((i + 1) * o for i, o in self.layers)

    @property
    def weights(self) -> int:
        """w = Σ i o over all layers."""
        return sum(i * o for i, o in self.layers)

    @property
    def first(self) -> int:
        """w₁ = i₁ o₁."""
        return self.sizes[0] * self.sizes[1]

    @property
    def inner(self) -> int:
        """Σ = w − w₁."""
        return self.weights - self.first

    @property
    def widths(self) -> int:
        """Σ o over all layers."""
        return sum(self.sizes[1:])

    @property
    def outputs(self) -> int:
        """c."""
        return self.sizes[-1]

    @property
    def sides(self) -> int:
        """Numbers Σ o² + (i + 1)² of the Kronecker factors."""
        return sum(o * o + (i + 1) ** 2 for i, o in self.layers)


@dataclass(frozen=True)
class Cost:
    """Operations of GEMMs and of LAPACK's ``eigh``, QR and SVD, whose rate is lower; bytes.

    ``held`` are those at the peak, beside model and data; ``fresh`` those of large arrays, whose pages a CPU's system
    hands out anew each time.
    """

    gemm: float = 0.0
    lapack: float = 0.0
    held: float = 0.0
    streamed: float = 0.0
    reduced: float = 0.0
    fresh: float = 0.0

    @property
    def operations(self) -> float:
        """Of both."""
        return self.gemm + self.lapack

    def __add__(self, other: Cost) -> Cost:
        """One after the other."""
        parts = {name: getattr(self, name) + getattr(other, name) for name in vars(self) if name != "held"}
        return Cost(held=max(self.held, other.held), **parts)

    def times(self, count: float) -> Cost:
        """So many times."""
        return Cost(held=self.held, **{name: count * value for name, value in vars(self).items() if name != "held"})

    def beside(self, held: float) -> Cost:
        """While other bytes are held."""
        return replace(self, held=self.held + held)


# -- passes over n rows ------------------------------------------------------------------------------------------------


def forward(net: MLP, n: float) -> Cost:
    """F = 2 n w; each layer reads its rows and its weight and writes; an activation reads and writes once more."""
    numbers = n * sum(i + 3 * o for i, o in net.layers) + net.weights
    return Cost(2 * n * net.weights, streamed=ITEM * numbers)


def backward(net: MLP, n: float) -> Cost:
    """2n (w₁ + 2Σ): a weight's gradient in each layer, a signal through each but the first."""
    numbers = n * sum(2 * i + 6 * o for i, o in net.layers) + 2 * net.weights
    return Cost(2 * n * (net.first + 2 * net.inner), streamed=ITEM * numbers)


def signals(net: MLP, n: float) -> Cost:
    """2nΣ: a signal through each layer but the first."""
    numbers = n * sum(i + 4 * o for i, o in net.layers) + net.weights
    return Cost(2 * n * net.inner, streamed=ITEM * numbers)


def first_pass(net: MLP, n: float) -> Cost:
    """F + backward: the loss and its gradient (p are reduced); F/2 and one batch's F: whether each row is alone."""
    alone = forward(net, n / 2) + forward(net, min(n, BATCH))
    looked = ITEM * n * (4 * net.sizes[0] + 5 * net.widths)
    held = graph_bytes(net, min(n, BATCH)) + 3 * ITEM * net.parameters
    return forward(net, n) + backward(net, n) + alone + Cost(0, 0, held, looked, ITEM * net.parameters)


def product(net: MLP, n: float, k: int = 1, curvature: str = "ggn", kept: bool = True) -> Cost:
    """k (2n) (a w₁ + bΣ), and k p numbers to reduce.

    GGN: a = 2, b = 4: J v takes two GEMMs a layer, Jᵀu two more, but for the first layer's inputs. Hessian: a = 2,
    b = 6: the tangents of the signals too, and in each layer of what they meet. The empirical Fisher keeps its factor
    where n p numbers fit the working memory: 4 n p k; else as the GGN. Where the batches' graphs are not ``kept``, each
    product makes them anew, and for many rows holds them against autograd.
    """
    rows = ITEM * k * net.parameters
    if curvature == "empirical_fisher" and kept:
        numbers = 2 * n * net.parameters + 2 * k * n
        return Cost(4 * n * net.parameters * k, 0, 3 * rows + 2 * factor_bytes(net, n), ITEM * numbers + 3 * rows, rows)
    first, inner = GEMMS[curvature]
    moved = n * (first * sum(net.sizes[:2]) + inner * sum(i + o for i, o in net.layers[1:]))
    # A product of matrices reads two and writes the third; activations, biases and their slopes are beside them.
    numbers = moved + n * (10 if inner == 4 else 25) * net.widths + 12 * net.parameters
    own = Cost(2 * n * k * (first * net.first + inner * net.inner), 0, 4 * rows, ITEM * k * numbers, rows)
    if kept:
        return own.beside(graph_bytes(net, n))
    # Held against autograd in the first product alone.
    again = recording(net, n, 1, curvature)
    return (own + again).beside(graph_bytes(net, min(n, BATCH)))


def recording(net: MLP, n: float, k: int, curvature: str = "ggn") -> Cost:
    """F + backward, and for many rows some products of one row: a recording is held against autograd."""
    graph = forward(net, n) + backward(net, n)
    checks = product(net, n, 1, "hessian" if curvature == "hessian" else "ggn").times(CHECKS if k >= BLOCK else 0)
    return graph + replace(checks, reduced=0.0, held=0.0)


def graph_bytes(net: MLP, n: float) -> float:
    """What is kept of n rows for products: each layer's inputs twice, and four of the size of its results."""
    return ITEM * n * (2 * sum(net.sizes[:-1]) + 4 * net.widths)


def factor_bytes(net: MLP, n: float) -> float:
    """n p numbers."""
    return ITEM * n * net.parameters


def fits(net: MLP, n: float, curvature: str = "ggn") -> bool:
    """Whether what a product needs of all batches is kept."""
    if curvature == "empirical_fisher":
        return factor_bytes(net, n) <= WORKING
    return graph_bytes(net, n) <= WORKING


# -- methods that solve by products ------------------------------------------------------------------------------------


def once(net: MLP, n: float, k: int, curvature: str, kept: bool) -> Cost:
    """What the first of many products takes beside: the recording, or the factor."""
    if not kept:
        return Cost()
    if curvature == "empirical_fisher":
        return gradient_rows(net, n)
    return recording(net, n, k, curvature)


def cg(net: MLP, n: float, k: int, t: int, curvature: str = "ggn", kept: bool = True) -> Cost:
    """t + 1 products of k rows, the last to judge; from 8 rows on 18 p k² an iteration for a block's GEMMs.

    The block's: P(AP)ᵀ, RPᵀ and their products with P and AP; Z's with both; 4 p k² a QR and 2 p k² to complete it.
    """
    rows = ITEM * k * net.parameters
    found = product(net, n, k, curvature, kept).times(t + 1) + once(net, n, k, curvature, kept)
    block = t * net.parameters * k * k if k >= BLOCK else 0
    own = Cost(14 * block, 4 * block, 0, (24 if block else 14) * t * rows, 0, new_rows(rows, t))
    return (found + own).beside((9 if block else 6) * rows)


def new_rows(rows: float, t: int) -> float:
    """Some 36 times the rows an iteration, norms in float64 the most of it, where they are too large for old pages."""
    return 36 * t * rows if rows > PAGED else 0.0


def minres(net: MLP, n: float, k: int, t: int, curvature: str = "ggn", kept: bool = True) -> Cost:
    """t + 1 products of k rows, the last to judge; from 8 rows on 32 p k² an iteration, and 12 p k² a step kept.

    A block's directions are orthogonalised twice against those of the steps before: of all that fit the working memory,
    but of two at least.
    """
    rows, block = ITEM * k * net.parameters, k >= BLOCK
    found = product(net, n, k, curvature, kept).times(t + 1) + once(net, n, k, curvature, kept)
    if not block:
        return (found + Cost(0, 0, 0, 30 * t * rows)).beside(11 * rows)
    most = max(2, WORKING // (2 * rows))
    against, square = sum(min(step, most) for step in range(t)), net.parameters * k * k
    streamed = (70 * t + 12 * against) * rows
    own = Cost((20 * t + 12 * against) * square, 12 * t * square, 0, streamed, 0, new_rows(rows, t))
    return (found + own).beside((2 * min(t, most) + 9) * rows)


def lissa_fit(net: MLP, n: float, curvature: str = "ggn", step: int = STEP) -> Cost:
    """8 minibatches of m rows, each with its graph and 12 products of one row, for the scale."""
    m = min(n, step)
    graph, steps = forward(net, m) + backward(net, m), SCALE_STEPS
    own = Cost(4 * net.parameters * steps * (steps + 1), 0, 0, 2 * ITEM * net.parameters * steps * (steps + 7))
    found = (graph + product(net, m, 1, curvature).times(steps) + own).times(SCALE_BATCHES)
    return first_pass(net, n) + found


def lissa_step(net: MLP, k: int, curvature: str = "ggn", step: int = STEP) -> Cost:
    """F + backward of m rows, and their product with k."""
    return forward(net, step) + backward(net, step) + product(net, step, k, curvature)


def lissa(net: MLP, n: float, k: int, epochs: int, curvature: str = "ggn", step: int = STEP, kept: bool = True) -> Cost:
    """n / m steps an epoch and one product with all the rows to look at: the last of them judges."""
    steps = epochs * math.ceil(n / step)
    looks = product(net, n, k, curvature, kept).times(epochs) + recording(net, n, k, curvature).times(kept)
    found = lissa_step(net, k, curvature, step).times(steps) + looks
    return found.beside(10 * ITEM * k * net.parameters)


# -- methods that know a part of the spectrum --------------------------------------------------------------------------


def arnoldi_fit(net: MLP, n: float, rank: int, products: int, curvature: str = "ggn", kept: bool = True) -> Cost:
    """So many products (three to ten times the rank), 4 rows at once, and 16 p j each against the j rows before.

    j is up to 2 r + 20, the Krylov dimension; on average some two thirds of it.
    """
    dimension = 2 * rank + 20
    own = 16 * net.parameters * products * dimension * 2 / 3
    found = product(net, n, 4, curvature, kept).times(products / 4) + once(net, n, 4, curvature, kept)
    streamed = ITEM * 4 * net.parameters * dimension * 2 / 3 * products / 4
    held = ITEM * (1.5 * dimension + rank + 8) * net.parameters
    return first_pass(net, n) + (found + Cost(own, 0, 0, streamed)).beside(held)


def nystroem_fit(net: MLP, n: float, rank: int, curvature: str = "ggn", kept: bool = True) -> Cost:
    """r products; p r² each: 8 for two QRs, 2 for the core, 1 to divide by its root, 6 for the SVD; a Cholesky of r."""
    p, r = net.parameters, rank
    found = product(net, n, r, curvature, kept) + once(net, n, r, curvature, kept)
    own = Cost(3 * p * r * r + r**3 / 3, 14 * p * r * r, 0, 40 * ITEM * r * p)
    return first_pass(net, n) + (found + own).beside(2 * ITEM * r * p)


def low_rank_solve(net: MLP, k: int, rank: int) -> Cost:
    """8 r p k: four GEMMs, since b's part across the r vectors is taken twice."""
    p = net.parameters
    return Cost(8 * rank * p * k, 0, ITEM * (rank + 5 * k) * p, ITEM * (4 * rank * p + 31 * k * p))


# -- methods layer by layer --------------------------------------------------------------------------------------------


def symmetric(d: int) -> float:
    """The operations of xᵀx over 2n, for rows x of d entries: d² up to a width, beyond it the blocks on one side."""
    return d * d if d <= WHOLE else 2 * symmetric(d // 2) + d * d / 4


def kfac_fit(net: MLP, n: float, draws: int | None = None) -> Cost:
    """F + c·2nΣ; the factors 2n Σ (s(i+1) + c s(o)), s(d) ≤ d²; 4nw to hold one direction against the gradients.

    c are the outputs, or the draws of ``sampled_ggn``. Both eigenbases take 9 (o³ + (i+1)³). Σ o² + (i+1)² numbers are
    reduced, and held twice each as factors and bases; and what ``eigh`` takes of the largest.
    """
    passes = net.outputs if draws is None else draws
    found = first_pass(net, n) + forward(net, n) + signals(net, n).times(passes)
    factors = 2 * n * sum(symmetric(i + 1) + passes * symmetric(o) for i, o in net.layers)
    check = 2 * n * (net.weights + net.parameters)
    eigen = 9 * sum(o**3 + (i + 1) ** 3 for i, o in net.layers)
    largest = max(max(o, i + 1) for i, o in net.layers) ** 2
    rows = min(n * sum(i + 1 + passes * o for i, o in net.layers), SIGNALS / ITEM)
    held = ITEM * (2 * net.sides + 12 * net.parameters + 3 * largest + rows) + graph_bytes(net, min(n, BATCH))
    numbers = n * sum(2 * (i + 1) + 2 * passes * o for i, o in net.layers) + (passes + 6) * net.sides
    return found + Cost(factors + check, eigen, held, ITEM * numbers, ITEM * net.sides)


def ekfac_fit(net: MLP, n: float, draws: int | None = None) -> Cost:
    """KFAC's, the rows in both bases 2n Σ ((i+1)² + c o²), Σ g²(a²)ᵀ 2n p, and a second pass where it was not kept."""
    passes = net.outputs if draws is None else draws
    again = forward(net, n) + signals(net, n).times(passes)
    rows = sum(i + 1 + passes * o for i, o in net.layers)
    rotated = 2 * n * (sum((i + 1) ** 2 + passes * o * o for i, o in net.layers) + net.parameters)
    reduced = ITEM * net.parameters
    own = Cost(rotated, 0, ITEM * net.parameters, ITEM * (6 * n * rows + net.sides + net.parameters), reduced)
    found = kfac_fit(net, n, draws) + own
    return found if ITEM * n * rows <= SIGNALS else found + again


def kfac_solve(net: MLP, k: int) -> Cost:
    """4 k Σ o (i+1) (o + i+1): a product with each basis, there and back."""
    gemm = 4 * k * sum(o * (i + 1) * (o + i + 1) for i, o in net.layers)
    held = ITEM * ((3 * k + 5 * min(k, 8) + 3) * net.parameters + net.sides)
    return Cost(gemm, 0, held, ITEM * (38 * k * net.parameters + 2 * net.sides))


# -- methods by each row's gradients -----------------------------------------------------------------------------------


def gradient_rows(net: MLP, n: float, columns: int = 1) -> Cost:
    """F, 2nΣ and the outer products 2n w for each column of a row's factor; of one batch held against its gradient."""
    size = columns * factor_bytes(net, n)
    own = Cost(2 * n * net.weights * columns, 0, 0, 7 * size, 0, 4 * size)
    m = min(n, BATCH)
    check = forward(net, m) + backward(net, m) + Cost(2 * m * columns * net.parameters)
    return forward(net, n) + signals(net, n).times(columns) + own + check


def diagonal_fit(net: MLP, n: float, curvature: str = "ggn", kept: bool = True) -> Cost:
    """F + c·2nΣ, Σ g²(a²)ᵀ 2n p and 4nw to check; c is 1 for the empirical Fisher."""
    p = net.parameters
    if curvature == "hessian":
        return first_pass(net, n) + hessian_diagonal(net, n, kept)
    passes = net.outputs if curvature == "ggn" else 1
    numbers = n * sum(4 * (i + 1) + 4 * passes * o for i, o in net.layers) + 4 * p
    own = Cost(2 * n * (net.weights + 2 * p), 0, 4 * ITEM * p, ITEM * numbers, ITEM * p)
    return first_pass(net, n) + forward(net, n) + signals(net, n).times(passes) + own


def hessian_diagonal(net: MLP, n: float, kept: bool = True) -> Cost:
    """4n o times the weights above for each of a layer's o results, Σ (a²)ᵀ 2n p; F + backward, and 2n p, to check.

    So do 8n times the weights above each layer; and a product of one row for each weight and bias.
    """
    p, n_layers = net.parameters, len(net.layers)
    above = [sum(i * o for i, o in net.layers[at + 1 :]) for at in range(n_layers)]
    pushed = 4 * n * sum(o * w for (_, o), w in zip(net.layers, above, strict=True)) + 4 * n * p
    # A row of tangents at each layer's results is read and written by GEMMs and activations, there and back.
    numbers = sum(8 * n * o * sum(net.sizes[at + 2 :]) for at, (_, o) in enumerate(net.layers))
    held = ITEM * 3 * p + graph_bytes(net, min(n, BATCH))
    own = Cost(pushed + 8 * n * sum(above), 0, held, ITEM * numbers, ITEM * p)
    judged = product(net, n, 1, "hessian", kept).times(2 * n_layers) + once(net, n, 1, "hessian", kept)
    return forward(net, n) + backward(net, n) + own + replace(judged, reduced=0.0)


def diagonal_solve(net: MLP, k: int) -> Cost:
    """k p quotients; three arrays of them are new."""
    rows = ITEM * k * net.parameters
    return Cost(0, 0, 3 * rows, 20 * rows, 0, 3 * rows if rows > PAGED else 0.0)


def harmonic_mean_fit(net: MLP, n: float) -> Cost:
    """The rows' gradients, n p numbers, and those of a batch twice while it is made; 2 n p for their squares."""
    size = factor_bytes(net, n)
    # Scaled in place, and squared a few at a time: no array of theirs is as large.
    own = Cost(2 * n * net.parameters, 0, size + factor_bytes(net, min(n, BATCH)), 2 * size, 0, -size)
    return first_pass(net, n) + gradient_rows(net, n) + own


def harmonic_mean_solve(net: MLP, n: float, k: int) -> Cost:
    """4 n p k; k p numbers are reduced."""
    rows, size = ITEM * k * net.parameters, factor_bytes(net, n)
    return Cost(4 * n * net.parameters * k, 0, 6 * rows + size, 2 * size + 38 * rows, rows)


# -- the matrix --------------------------------------------------------------------------------------------------------


def direct_fit(net: MLP, n: float, curvature: str = "ggn") -> Cost:
    """The matrix, p³/3 for its Cholesky factor, and 10 p² to judge both; p² are reduced, three times that held.

    Six arrays of p² are new: put in order by rows and columns, made symmetric, factored, half of it, absolute values.

    An eigendecomposition in its place, where A + λI is singular or another λ is wanted, takes 9 p³.
    """
    p = net.parameters
    kept = fits(net, n, curvature)
    judged = product(net, n, 1, curvature, kept).times(2) + once(net, n, 1, curvature, kept) + Cost(10 * p * p)
    square = ITEM * p * p
    own = Cost(p**3 / 3, 0, 3.5 * square, 8 * square, square, 6 * square if square > PAGED else 0.0)
    return first_pass(net, n) + MATRICES[curvature](net, n) + judged + own


def _pairs(net: MLP) -> float:
    """Σ o o' (i+1)(i'+1) over pairs of layers, of a layer with itself the upper half of its inputs': about p²/2."""
    total = 0.0
    for at, (i, o) in enumerate(net.layers):
        total += o * o * (i + 1) * (i + 2) / 2
        total += sum(o * e * (i + 1) * (j + 1) for j, e in net.layers[:at])
    return total


def _ggn_matrix(net: MLP, n: float) -> Cost:
    """n p²: 2n over all pairs of layers, Σ D ⊗ aa'ᵀ; each D 2n c o o'; F, c·2nΣ, and 4nw to check."""
    D = sum(o * e for at, (_, o) in enumerate(net.layers) for _, e in net.layers[: at + 1])
    gemm = 2 * n * (_pairs(net) + net.outputs * D + net.weights + net.parameters)
    own = Cost(gemm, streamed=ITEM * (n / 128 + 8) * net.parameters**2)
    return forward(net, n) + signals(net, n).times(net.outputs) + own


def _hessian_matrix(net: MLP, n: float) -> Cost:
    """The GGN's pairs; 4nΣ for each entry of a layer's results; what a layer's input has of the layers below it.

    That is 2n o o' (i'+1) of the next layer, of one further below 2n o (i+1) o' (i'+1).
    """
    crossed = 0.0
    for at, (i, o) in enumerate(net.layers):
        for down, (j, e) in enumerate(net.layers[:at]):
            crossed += o * e * (j + 1) * (1 if down == at - 1 else i + 1)
    gemm = 2 * n * (_pairs(net) + crossed) + 4 * n * net.inner * net.widths
    own = Cost(gemm, streamed=ITEM * (n / 128 + 8) * net.parameters**2)
    return forward(net, n) + signals(net, n).times(5) + own


def _empirical_fisher_matrix(net: MLP, n: float) -> Cost:
    """n p² and a little more: the rows' gradients with themselves, by stripes from the diagonal on."""
    p = net.parameters
    gemm = sum(2 * n * min(STRIPE, p - start) * (p - start) for start in range(0, p, STRIPE))
    own = Cost(gemm, streamed=8 * ITEM * net.parameters**2 + ITEM * n * net.parameters)
    return gradient_rows(net, n) + own


MATRICES: dict[str, Callable[[MLP, float], Cost]] = {
    "ggn": _ggn_matrix,
    "hessian": _hessian_matrix,
    "empirical_fisher": _empirical_fisher_matrix,
}


def direct_solve(net: MLP, k: int) -> Cost:
    """4 p² k: by the factor, and to judge."""
    p = net.parameters
    return Cost(4 * p * p * k, 0, ITEM * (2 * p * p + 5 * k * p), ITEM * (3 * p * p + 10 * k * p))
