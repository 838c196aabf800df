"""What every curvature of a model shares: products batch by batch, from graphs that are kept while they fit."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from .._checksum import checksum
from .._memory import working_memory
from .._types import Batch
from ..models import map_tensors
from ..operators import LinearOperator
from .objective import MeanLoss
from .products import Products, Share
from .saved import counted

__all__ = ["Curvature"]

# A batch's operations are recorded for products with so many rows at once: that costs a few gradient passes, and halves
# the price of a row. More where it is for one product alone.
AT_ONCE, ONLY_ONCE = 8, 32


class Curvature(LinearOperator):
    r"""A = Σᵢ wᵢhᵢ / Σᵢ wᵢ + penalty over all the data, with hᵢ (p, p) a row's own term, as an operator on rows.

    A subclass defines ``graph``; all the rest follows, whatever the batches: the mean, the penalty, the memory,
    minibatches. hᵢ is a curvature of ℓᵢ, the row's loss on the scale of L (``objective.losses``). A curvature with a
    factor, hᵢ = FᵢᵀFᵢ, is a ``Factored`` one. ``register_curvature`` gives it a name for ``HessianInverter``. Where
    processes share the data, each makes one of its own rows, over the denominators of all, and these are added up.

    Parameters
    ----------
    objective : Objective
        L at θ: ``model`` (its ``theta``, ``forward(batch)`` and ``per_sample_loss(outputs, batch)``), ``batches``,
        ``scale``, ``losses(batch)`` (m,) with gradients on, and ``gradients(batch)`` (m, p).

    Attributes
    ----------
    name : str
        What messages call it.
    is_psd : bool
        Whether it is positive semi-definite by construction.
    scores_itself : bool
        Whether held-out scores are by this curvature, a ``Factored`` one, rather than by the GGN.
    advice : str
        What to try where it turns out to be indefinite.
    penalty : tensor of shape (p,) or None
        The penalty's Hessian, a diagonal.

    Examples
    --------
    The Hessian, whose hᵢ is ∇²ℓᵢ: of squared error it is 2 XᵀX / n.

    >>> from skinvert.curvature import CURVATURES, register_curvature
    >>> from skinvert.curvature.products import flat_products
    >>> from skinvert import HessianInverter
    >>> class SecondDerivative(Curvature):
    ...     def graph(self, batch, weights):
    ...         model, losses = self.objective.model, self.objective.losses(batch)
    ...         return flat_products(model.gradient_of((weights * losses).sum(), create_graph=True), model.theta)
    >>> register_curvature("second_derivative", SecondDerivative)
    >>> data, net = (torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)), torch.nn.Linear(2, 1, bias=False)
    >>> inverter = HessianInverter("direct", curvature="second_derivative", loss="mse").fit(net, data)
    >>> inverter.curvature_.to_dense()
    tensor([[1., 0.],
            [0., 4.]])
    >>> del CURVATURES["second_derivative"]
    """

    name: ClassVar[str] = ""
    scores_itself: ClassVar[bool] = False
    advice: ClassVar[str] = 'Try curvature="ggn", which is positive semi-definite.'
    objective: MeanLoss

    _transient: tuple[str, ...] = ("_graphs", "_double")
    # Whether no second product is to come: of a minibatch.
    _once = False
    # Whether products may be recorded: until a batch is met whose operations have no rules, or are slower by them.
    _has_rules = True

    def __init__(self, objective: MeanLoss) -> None:
        super().__init__(objective.size, objective.dtype, objective.device)
        self.objective, self.penalty = objective, objective.penalty
        self._graphs: dict[bool, _Kept] | None = None
        self._proven: set[tuple[object, ...]] = set()
        self._double: Curvature | None = None
        if not self.is_psd:
            norm = f"The gradient's norm at θ is {objective.gradient_norm:.3g} (not a minimum?)."
            self.hint = f"{norm} {self.advice}"

    @abstractmethod
    def graph(self, batch: Batch, weights: torch.Tensor) -> Products:
        """Return the function V (k, p) -> Σᵢ wᵢhᵢ V (k, p) over the m rows of a batch, with weights w (m,).

        It is kept for every batch while all of them fit scikit-learn's ``working_memory``, and made anew for every
        product otherwise. What autograd saves for it is measured; a ``Share`` says what it holds beside that.
        """

    def data_of(self, batch: Batch) -> Batch:
        """Return the model's part of a batch: all of it."""
        return batch

    @property
    def of_data(self) -> MeanLoss:
        """The objective over the data as they were given: ``objective``, whose batches may carry more."""
        return self.objective

    @property
    def gradient_norm(self) -> float:
        """‖∇L(θ)‖."""
        return self.objective.gradient_norm

    @property
    def eps(self) -> float:
        """The relative rounding of its products."""
        return self.objective.eps

    @property
    def n_samples(self) -> int:
        """Number n of samples."""
        return self.objective.batches.n_samples

    @property
    def unreached(self) -> tuple[str, ...]:
        """The selected parameters that no row's loss depends on."""
        return self.objective.unreached

    def apply(self, V: torch.Tensor) -> torch.Tensor:
        """Return the products with the rows of V (k, p), summed over all batches, plus the penalty's."""
        product = torch.zeros_like(V)
        if not len(V):
            return product
        for share in self._shares(len(V)):
            product += share(V)
        product /= self.objective.weight_sum
        return product if self.penalty is None else product.addcmul_(V, self.penalty)

    def minibatch(self, rows: torch.Tensor) -> LinearOperator:
        """Return an unbiased estimate of the curvature from the samples ``rows`` (m,), a tensor of indices.

        It is (n/m) Σ over these samples, with the denominator of all of them and the whole penalty; so its mean over
        samples drawn uniformly is the curvature, sample weights included.
        """
        part = self._over(self.objective.on_samples(rows))
        part._once = True
        return part

    def in_float64(self) -> Curvature | None:
        """Return the curvature of the same θ and data in float64; None where the model does not take it.

        Made once, by a pass over the data, and held against a product of this one.
        """
        if self.dtype == torch.float64:
            return self
        if self._double is None:
            objective = self.objective.in_float64()
            if objective is None:
                return None
            double = self._over(objective)
            double.dtype = torch.float64
            if not _same_product(self, double):
                return None
            self._double = double
        return self._double

    def in_autocast(self, dtype: torch.dtype) -> Curvature:
        """Return the curvature with forward and backward passes under ``torch.autocast``, and sums as they were."""
        part = self._over(self.objective.in_autocast(dtype))
        # What is recorded is held against autograd to more digits than these passes have.
        part._has_rules = False
        return part

    def _over(self, objective: MeanLoss) -> Curvature:
        """Return this curvature of another objective, with nothing kept from this one's."""
        part = copy.copy(self)
        part.objective, part.size, part.penalty = objective, objective.size, objective.penalty
        for name in self._transient:
            setattr(part, name, None)
        part._double, part._proven = None, set()
        return part

    def share(self, batch: Batch, weights: torch.Tensor, many: bool) -> Products:
        """Return ``graph``, or where ``many`` rows are to come what serves those faster."""
        return self.graph(batch, weights)

    def _known(self, batch: Batch) -> tuple[tuple[object, ...], bool]:
        """Return by what a batch is known, and whether its recorded products were held against autograd before.

        Where they are not kept they are made anew for each product, of the same numbers.
        """
        found: list[object] = []
        map_tensors(lambda tensor: found.append(checksum(tensor)), batch)
        return tuple(found), tuple(found) in self._proven

    def _shares(self, rows: int) -> Iterator[Products]:
        """Yield the batches' shares, for products with so many rows.

        The number of rows alone decides which: the same call gives the same digits, whatever came before.
        """
        lasting = self.objective.batches.kept is not None and not self._once
        many = rows >= (AT_ONCE if lasting else ONLY_ONCE)
        kept = {} if self._graphs is None else self._graphs
        if many in kept:
            yield from kept[many].shares
            return
        found = _Kept([], 0)
        free = working_memory() - sum(one.nbytes for one in kept.values())
        keep: bool | None = None
        for batch, weights in self.objective.batches:
            if keep is None:
                share, size = _measured(lambda: self.share(batch, weights, many))  # noqa: B023 (called at once)
                # A graph may hold its batch, which the memory holds anyway where the data are kept.
                size += _nbytes(batch) if self.objective.batches.kept is None else 0
                found.nbytes = size * self.objective.batches.n_samples // len(weights)
                keep = found.nbytes <= free
            else:
                share = self.share(batch, weights, many)
            if keep:
                found.shares.append(share)
            yield share
        if keep:
            self._graphs = {**kept, many: found}


@dataclass
class _Kept:
    """The shares of all batches, and the bytes that they hold."""

    shares: list[Products]
    nbytes: int


def _measured(build: Callable[[], Products]) -> tuple[Products, int]:
    """Return what ``build`` returns, and the bytes that it holds: what its graph saves, and what it says itself."""
    built, saved = counted(build)
    if isinstance(built, Share) and built.alone:
        return built, built.nbytes
    return built, saved + (built.nbytes if isinstance(built, Share) else 0)


def _same_product(A: LinearOperator, double: LinearOperator) -> bool:
    """Return whether the two give one random row the same product, as far as float32 goes."""
    generator = torch.Generator("cpu").manual_seed(0)
    v = torch.randn(1, A.size, generator=generator, dtype=torch.float64, device="cpu").to(A.device)
    expected = double.apply(v)
    return bool((A.apply(v.to(A.dtype)) - expected).norm() <= 1e-2 * expected.norm())


def _nbytes(batch: Batch) -> int:
    sizes: list[int] = []
    map_tensors(lambda tensor: sizes.append(tensor.nbytes), batch)
    return sum(sizes)
