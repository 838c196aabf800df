"""Derivatives along rows, by one kept graph: Jᵀu and J v without forward mode."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from .._autograd import flat
from .tangents import Program, Recording, UnservedError, recorded

__all__ = [
    "BothPasses",
    "Products",
    "Share",
    "both_passes",
    "flat_products",
    "forward_products",
    "is_faster",
    "recorded_products",
]

# Rows (k, ...) to rows (k, ...).
Products: TypeAlias = Callable[[torch.Tensor], torch.Tensor]

# A program of so many rows at once was the faster one on every model that was timed, by 1.1 to 5 times; one of fewer is
# from 3 times slower (recurrent layers, whose kernels it takes apart) to 4 times faster.
PLENTY = 4


@dataclass(frozen=True)
class Share:
    """A batch's share of the products, and the bytes that it holds beside what autograd saves for it.

    Parameters
    ----------
    products : callable
        Rows (k, p) to rows (k, p).
    nbytes : int
        Of tensors that no graph has saved.
    alone : bool
        Whether these are all: no graph is kept.
    """

    products: Products
    nbytes: int = 0
    alone: bool = False

    def __call__(self, V: torch.Tensor) -> torch.Tensor:
        """Return the products with the rows of V."""
        return self.products(V)


def flat_products(value: torch.Tensor, variables: list[torch.Tensor], eps: float | None = None) -> Products:
    """Return the function that differentiates ``value`` along each row of V: (k, numel) -> (k, p).

    Row by row over one kept graph, which works for every network; on an accelerator in batches of rows, where the
    network allows it. ``eps`` is the rounding of the graph, where that is not its dtype's.
    """
    if not value.requires_grad:
        size = sum(t.numel() for t in variables)
        return lambda V: V.new_zeros(len(V), size)
    return _FlatProducts(value, variables, torch.finfo(value.dtype).eps if eps is None else eps)


def forward_products(outputs: torch.Tensor, theta: list[torch.Tensor], eps: float | None = None) -> Products:
    """Return V (k, p) -> J V (k, m, c), by differentiating Jᵀu along V: no forward mode needed."""
    if not outputs.requires_grad:
        # This batch reaches none of the parameters.
        return lambda V: V.new_zeros(len(V), len(outputs), outputs[:1].numel())
    # Not zeros: of them a kernel may take the logarithm, as `logcumsumexp` does. Jᵀu is linear in u.
    dummy = torch.ones_like(outputs, requires_grad=True)
    pulled = torch.autograd.grad(outputs, theta, dummy, create_graph=True, materialize_grads=True)
    along = flat_products(flat(pulled), [dummy], eps)
    return lambda V: along(V).reshape(len(V), len(outputs), -1)


@dataclass(frozen=True)
class BothPasses:
    """V -> J V and U -> Jᵀ U of a batch's outputs (m, ...), by the operations of the two passes."""

    outputs: torch.Tensor
    along: Program
    back: Program

    def through(self, V: torch.Tensor, middle: Products) -> torch.Tensor:
        """Return Jᵀ M J v for each row of V (k, p), with M given on (k, m, c)."""
        m = len(self.outputs)
        parts = torch.split(V, min(self.along.rows, self.back.rows))
        return torch.cat([self.back(middle(self.along(rows).reshape(len(rows), m, -1)).flatten(1)) for rows in parts])

    @property
    def nbytes(self) -> int:
        """Bytes that the two hold."""
        return self.along.nbytes + self.back.nbytes


def both_passes(
    forward: Callable[[], torch.Tensor], theta: list[torch.Tensor], proven: bool = False
) -> BothPasses | None:
    """Return the products with J and Jᵀ of outputs; None where an operation has no rule.

    ``proven`` where they were made of the same batch before: they are neither held against autograd nor timed again.
    """

    def compute() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        outputs = forward()
        dummy = torch.ones_like(outputs, requires_grad=True)
        if not outputs.requires_grad:
            # This batch reaches none of the parameters.
            return outputs, dummy, outputs.new_zeros(sum(t.numel() for t in theta))
        pulled = torch.autograd.grad(outputs, theta, dummy, create_graph=True, materialize_grads=True)
        return outputs, dummy, flat(pulled)

    record, (outputs, dummy, pulled) = recorded(compute)
    along = recorded_products(record, theta, outputs, flat_products(pulled, [dummy]), proven=proven)
    back = recorded_products(record, [dummy], pulled, flat_products(outputs, theta), theta, proven=proven)
    if along is None or back is None:
        return None
    if not proven and not (
        is_faster(along, flat_products(pulled, [dummy])) and is_faster(back, flat_products(outputs, theta))
    ):
        return None
    return BothPasses(outputs.detach(), along, back)


def recorded_products(
    record: Recording,
    inputs: Sequence[torch.Tensor],
    output: torch.Tensor,
    expected: Products,
    parts: Sequence[torch.Tensor] = (),
    proven: bool = False,
) -> Program | None:
    """Return V (k, Σ numel of the inputs) -> (k, numel of the output) by what was recorded.

    None where an operation has no rule, or where a random direction does not come out as by ``expected``: there it is
    held against autograd, in each of the ``parts`` that the output consists of, unless it is ``proven``.
    """
    try:
        program = Program(record, inputs, output)
        if proven:
            return program
        generator = torch.Generator(output.device).manual_seed(0)
        V = torch.randn(1, sum(program.sizes), generator=generator, dtype=output.dtype, device=output.device)
        found, wanted = program(V)[0], expected(V)[0]
    except torch.OutOfMemoryError:
        raise
    except (UnservedError, RuntimeError, NotImplementedError, ValueError, TypeError, IndexError):
        return None
    sizes = [part.numel() for part in parts] or [output.numel()]
    return program if _agree(found.split(sizes), wanted.split(sizes)) else None


def _agree(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> bool:
    """Return whether parts are equal, each to half its digits; of one that is tiny beside all, to the whole's."""
    gaps = torch.stack([(one - other).norm() for one, other in zip(found, wanted, strict=True)])
    sizes, eps = torch.stack([other.norm() for other in wanted]), torch.finfo(wanted[0].dtype).eps
    return bool((gaps <= math.sqrt(eps) * sizes + 10 * eps * sizes.norm()).all())


def is_faster(program: Program, other: Products) -> bool:
    """Return whether a program is faster a row than other products: by the clock where it takes but few at once."""
    if program.rows >= PLENTY:
        return True
    V = program.ones()
    return min(_seconds(program, V) for _ in range(2)) <= len(V) * min(_seconds(other, V[:1]) for _ in range(2))


def _seconds(products: Products, V: torch.Tensor) -> float:
    # On a CPU without what other processes take.
    clock = time.process_time if V.device.type == "cpu" else time.perf_counter
    start = clock()
    # To the end, on an accelerator too.
    float(products(V).sum())
    return clock() - start


class _FlatProducts:
    def __init__(self, value: torch.Tensor, variables: list[torch.Tensor], eps: float) -> None:
        self.value, self.variables, self.eps = value, variables, eps
        self.batched = value.device.type != "cpu"
        # Numbers of rows at which a batch was found right: a batching rule may be wrong for one of them alone.
        self.sound: set[int] = set()

    def __call__(self, V: torch.Tensor) -> torch.Tensor:
        if self.batched and len(V) > 1:
            try:
                parts = [self._grad(rows, True) for rows in torch.split(V, 64)]
                self.batched = all(
                    self._agree(rows, part) for rows, part in zip(torch.split(V, 64), parts, strict=True)
                )
            except RuntimeError:
                # Some layers have no batching rule.
                self.batched = False
            if self.batched:
                return torch.cat(parts)
        return torch.stack([self._grad(v, False) for v in V]) if len(V) else self._empty(V)

    def _agree(self, V: torch.Tensor, products: torch.Tensor) -> bool:
        """Return whether a random mixture of the products is that of the mixture."""
        if len(V) in self.sound:
            return True
        generator = torch.Generator("cpu").manual_seed(0)
        mixture = torch.randn(len(V), generator=generator, dtype=torch.float64, device="cpu").to(V)
        error = (mixture @ products - self._grad(mixture @ V, False)).norm()
        size = (mixture * products.norm(dim=1)).norm()
        if not bool(error <= math.sqrt(self.eps) * size):
            return False
        self.sound.add(len(V))
        return True

    def _grad(self, v: torch.Tensor, batched: bool) -> torch.Tensor:
        lead = v.shape[:-1]
        parts = torch.autograd.grad(
            self.value,
            self.variables,
            v.reshape(*lead, *self.value.shape),
            retain_graph=True,
            is_grads_batched=batched,
            allow_unused=True,
        )
        rows = [
            v.new_zeros(*lead, variable.numel()) if part is None else part.reshape(*lead, -1)
            for part, variable in zip(parts, self.variables, strict=True)
        ]
        return torch.cat(rows, dim=-1).detach()

    def _empty(self, V: torch.Tensor) -> torch.Tensor:
        return V.new_zeros(0, sum(variable.numel() for variable in self.variables))
