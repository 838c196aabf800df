"""LiSSA: a Neumann series by minibatches, averaged over its tail and judged on all the data."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NoReturn, Self

import numpy as np
import torch

from .._check import check_number, check_shift, finite_rows, must_be
from .._progress import progress
from .._scaling import norms
from ..operators import LinearOperator
from ..reasons import Reason, reasons
from ..results import InverseHvpResult
from ..solvers.extremes import smallest_eigenvalue
from ..solvers.krylov import Problem, starting_point, warn_of_lost, within
from .base import InverseOperator, Method, shifted, warn_not_converged, warn_of_overflow

__all__ = ["LiSSA"]

# Minibatches that the scale is taken from, and Lanczos steps on each.
SCALE_BATCHES, SCALE_STEPS = 8, 12
# Steps between two looks at the residual where one minibatch is all the data.
FULL_STEPS = 10
# A residual that grew by this much will not come back.
GROWTH = 100.0


class LiSSA(Method):
    r"""A stochastic Neumann series: each step takes one minibatch's curvature, for all right-hand sides together.

    .. math:: x_{t+1} = x_t + \frac{1}{s} (b - (A_t + λI) x_t)

    with :math:`A_t` the unbiased estimate of A from minibatch t and s the ``scale``. The iterates are averaged over
    the last half to three quarters of the steps so far, by windows that start at epochs 1, 2, 4, 8, …; a row stops when
    the *full-data* residual of its average, looked at once an epoch, is within ``rtol``. Where that residual has
    halved, the recursion begins anew for the correction, A d = b − A x, so that its noise shrinks with what is left
    to solve. The best average seen is returned. Where ``batch_size`` holds all the data, plain Richardson steps on A,
    without an average.

    A + λI must be positive definite and s larger than half the largest eigenvalue of any A_t + λI: divergence raises,
    and names a λ or a scale. The number of steps grows as s/λ, where that of ``cg`` grows as its root. Cost: a step is
    one product with a minibatch, a look n/batch_size of them. Memory: eight arrays of the size of b.

    Parameters
    ----------
    rtol : float, default=None
        A row has converged when the true ‖Ax − b‖ ≤ rtol ‖b‖. None is 1e-3.
    maxiter : int, default=10_000
        Most products with minibatches, full-data looks counted as what they cost, in each repetition; at least one
        epoch is made.
    scale : float, default=None
        s > 0; None is twice the largest eigenvalue that 12 Lanczos steps find on 8 minibatches, plus λ.
    batch_size : int, default=256
        Samples of a minibatch, drawn anew for each step; n/batch_size steps are an epoch.
    h0 : array or tensor of shape (k, p) or (1, p), default=None
        Where to start; copied, never written to. None is zero.
    repetitions : int, default=1
        Independent runs, whose results are averaged.
    random_state : int or None, default=None
        Seed of the minibatches: the same in every solve. None is 0.

    References
    ----------
    Agarwal, Bullins & Hazan (2017), "Second-order stochastic optimization for machine learning in linear time", sec. 3.
    Koh & Liang (2017), "Understanding black-box predictions via influence functions", sec. 3. The average, the stopping
    rule, the corrections and the scale are ours: the papers return the last iterate after a fixed number of steps.
    Polyak & Juditsky (1992), "Acceleration of stochastic approximation by averaging".

    Examples
    --------
    >>> from skinvert.curvature import Gram
    >>> inverse = LiSSA(rtol=1e-5).invert(Gram(2.0 * torch.eye(2)), 2.0)
    >>> x, info = inverse.solve(torch.tensor([[4.0, 8.0]]))
    >>> x, info["converged"]  # A = XᵀX / n + 2I is 4I
    (tensor([[1.0000, 2.0000]]), tensor([True]))
    """

    name: ClassVar[str] = "lissa"
    requires: ClassVar[tuple[str, ...]] = ("minibatch",)
    cost: ClassVar[str] = "one minibatch product per step"
    memory: ClassVar[str] = "3 k p"
    exactness: ClassVar[str] = "to `rtol`, by minibatches"
    choose_it_for: ClassVar[str] = "n so large that one full product is dear"
    keeps_operator: ClassVar[bool] = True
    accuracy: ClassVar[float] = 1e-4

    @classmethod
    def tight(cls) -> Self:
        """Return it asked for all digits."""
        return cls(rtol=1e-4, maxiter=100_000)

    def __init__(
        self,
        *,
        rtol: float | None = None,
        maxiter: int = 10_000,
        scale: float | None = None,
        batch_size: int = 256,
        h0: Any = None,
        repetitions: int = 1,
        random_state: int | None = None,
    ) -> None:
        self.rtol, self.maxiter, self.scale, self.batch_size = rtol, maxiter, scale, batch_size
        self.h0, self.repetitions, self.random_state = h0, repetitions, random_state

    def invert(self, A: LinearOperator, hessian_perturbation: float, verbose: int = 0) -> InverseOperator:
        """Check the settings, and estimate the largest eigenvalue unless a scale is given."""
        settings = copy.copy(self)
        settings.rtol = check_number(1e-3 if self.rtol is None else self.rtol, "rtol", owner="LiSSA", low=0.0)
        counts = {"maxiter": self.maxiter, "batch_size": self.batch_size, "repetitions": self.repetitions}
        for name, count in counts.items():
            check_number(count, name, owner="LiSSA", low=1, integer=True)
        seed = 0 if self.random_state is None else self.random_state
        settings.random_state = check_number(seed, "random_state", owner="LiSSA", low=0, integer=True)
        if self.scale is not None:
            check_number(self.scale, "scale", owner="LiSSA", low=torch.finfo(A.dtype).tiny)
        largest = None if self.scale is not None else _largest(A, settings)
        return LiSSAInverse(A, check_shift(hessian_perturbation, A.dtype), settings, largest, verbose)


@dataclass
class LiSSAInverse(InverseOperator):
    """(A + λI)⁻¹ by LiSSA; ``largest`` is the largest eigenvalue found on minibatches of A."""

    curvature: LinearOperator
    hessian_perturbation: float
    settings: LiSSA
    largest: float | None
    verbose: int = 0
    keeps_operator: bool = True

    @property
    def scale(self) -> float:
        """The s of the recursion."""
        if self.settings.scale is not None:
            return float(self.settings.scale)
        # A curvature of zero at λ = 0 has no solutions: the residual will say so.
        return 2 * (max(self.largest or 0.0, 0.0) + self.hessian_perturbation) or 1.0

    @property
    def tolerance(self) -> float:
        """``rtol``."""
        return float(self.settings.rtol or 0.0)

    def at(self, hessian_perturbation: float) -> LiSSAInverse:
        """Return the inverse at another λ; the eigenvalue behind the scale is used again."""
        return replace(self, hessian_perturbation=check_shift(hessian_perturbation, self.dtype)).judged_as(self)

    @property
    def x0(self) -> Any:
        """``h0``."""
        return self.settings.h0

    @property
    def maxiter(self) -> int:
        """Most steps of a row."""
        return self.settings.maxiter

    def roughly(self, rtol: float, maxiter: int) -> Self:
        """Return this inverse with steps that stop at ``rtol``, or after ten times ``maxiter``: each does less."""
        settings = copy.copy(self.settings)
        settings.rtol, settings.maxiter = max(self.tolerance, rtol), min(settings.maxiter, 10 * maxiter)
        return replace(self, settings=settings).judged_as(self)

    def started_at(self, x0: torch.Tensor | None) -> Self:
        """Return this inverse with ``x0`` (k, p) as its ``h0``."""
        settings = copy.copy(self.settings)
        settings.h0 = x0
        return replace(self, settings=settings).judged_as(self)

    def scale_free(self) -> Self:
        """Return this inverse without ``h0``, which is on the scale of b."""
        return self.started_at(None)

    def solve(self, B: torch.Tensor) -> InverseHvpResult:
        """Return the averages of each row.

        ``info`` holds ``residual`` (k,), ``converged`` (k,), ``n_iter`` (k,), the steps of all repetitions together,
        and ``scale``.
        """
        problem = Problem.of(self.operator, B, x0=starting_point(self.settings.h0, B, "h0"), size=self.scale)
        mean, n_iter = torch.zeros_like(B), torch.zeros(len(B), dtype=torch.int64, device=B.device)
        for repetition in range(self.settings.repetitions):
            # Seeds of its own: how long the last one ran depends on the other rows.
            seed = int(self.settings.random_state or 0) + 1_000_003 * repetition
            run = _Run(self, problem, torch.Generator("cpu").manual_seed(seed))
            run.complete()
            mean += run.best / self.settings.repetitions
            n_iter += run.n_iter
        # Of one run the last look has told it.
        residual = run.residual() if self.settings.repetitions == 1 else problem.residual(mean)
        rtol = float(self.settings.rtol or 0.0)
        mean, lost = problem.back(mean, residual)
        held = finite_rows(warn_of_overflow("lissa", mean))
        converged = within(residual, problem.B, rtol)
        if not bool(converged[held].all()):
            warn_not_converged("lissa", residual[held], converged[held], rtol, self._hint())
        warn_of_lost("lissa", lost, B.dtype)
        converged &= ~lost
        info = {
            "residual": residual,
            "converged": converged,
            "reason": reasons(converged, Reason.MAX_ITERATIONS, (Reason.OUT_OF_RANGE, lost | ~held)),
            "n_iter": n_iter,
            "scale": self.scale,
            "approximate": False,
        }
        return InverseHvpResult(mean, info)

    def fail(self, steps: int) -> NoReturn:
        """Raise for a recursion that diverged: an indefinite curvature, or a scale too small."""
        indefinite = self._indefinite()
        if indefinite:
            raise ValueError(indefinite)
        largest = self.hessian_perturbation + _largest(self.curvature, self.settings, 4 * SCALE_BATCHES)
        better = 2 * max(largest, self.scale)
        hint = f"Try scale={better:.3g}, or a larger batch_size."
        must = f"larger than half of any minibatch's largest eigenvalue, such as {largest:.3g}"
        raise ValueError(
            must_be("scale for lissa here", must, f"{self.scale:.3g}, which diverged in step {steps}", hint)
        )

    def _indefinite(self) -> str:
        """Return what to say where A + λI has a negative eigenvalue; else nothing."""
        if self.operator.is_psd:
            return ""
        theta, error = smallest_eigenvalue(self.operator)
        lowest = theta - self.hessian_perturbation
        if not np.isfinite(error) or theta >= -error:
            return ""
        must = (
            f"hessian_perturbation must be > {-lowest:.3g} for lissa here: the curvature has eigenvalue {lowest:.3g}."
        )
        return f"{must} Try hessian_perturbation={1.5 * (abs(lowest) + error):.6g}. {self.operator.hint}"

    def _hint(self) -> str:
        A: Any = self.curvature
        small = self.settings.batch_size < A.n_samples
        ways = "a larger `maxiter`, a larger `batch_size`," if small else "a larger `maxiter`,"
        return self._indefinite() or f'Try {ways} a larger hessian_perturbation, or method="cg".'


class _Run:
    """One repetition: for every row an anchor, its residual R, and the recursion for the correction d with A d = R."""

    def __init__(self, inverse: LiSSAInverse, problem: Problem, generator: torch.Generator) -> None:
        self.inverse, self.products, self.generator, B = inverse, problem.products, generator, problem.B
        self.B, self.scale = B, math.ldexp(inverse.scale, -problem.products.exponent)
        A: Any = inverse.curvature
        self.A, size = A, inverse.settings.batch_size
        self.whole = A.n_samples <= size
        self.steps_of_epoch = FULL_STEPS if self.whole else -(-A.n_samples // size)
        self.anchor = torch.zeros_like(B) if problem.X is None else problem.X.clone()
        self.R = B.clone() if problem.R is None else problem.R.clone()
        # The best average of every row so far, and the norm of its residual.
        self.best, self.size = self.anchor.clone(), norms(self.R)
        self.goal = 0.99 * problem.tolerance(float(inverse.settings.rtol or 0.0))
        self.n_iter = torch.zeros(len(B), dtype=torch.int64, device=B.device)
        self.D, self.total = torch.zeros_like(B), torch.zeros_like(B)
        # Epochs since a row's anchor was set, and steps in its average.
        self.age, self.count = torch.zeros_like(self.n_iter), torch.zeros_like(self.n_iter)
        self.rows = torch.nonzero(self.size > self.goal)[:, 0]

    def complete(self) -> None:
        """Run until every row has converged or ``maxiter`` is spent."""
        cost = FULL_STEPS + 1 if self.whole else 2 * self.steps_of_epoch
        epochs = range(max(1, self.inverse.settings.maxiter // cost))
        for epoch in progress(epochs, "lissa", self.inverse.verbose):
            if not len(self.rows):
                return
            self._epoch()
            self._look((epoch + 1) * self.steps_of_epoch)

    def residual(self) -> torch.Tensor:
        """Return the true residuals of the best averages, as each was looked at: ‖Ax − b‖ / ‖b‖ (k,), of b = 0 ‖Ax‖."""
        size = norms(self.B)
        return torch.where(size > 0, self.size / size, self.size)

    def _epoch(self) -> None:
        rows, age = self.rows, self.age[self.rows]
        # Windows double: the average forgets the start, and keeps half of the steps at least.
        fresh = rows[torch.full_like(age, self.whole, dtype=torch.bool) | ((age & (age - 1)) == 0)]
        self.total[fresh], self.count[fresh] = 0.0, 0
        R, D, total = self.R[rows], self.D[rows], self.total[rows]
        for A in self._minibatches():
            product = self.products.like(shifted(A, self.inverse.hessian_perturbation).apply)
            D = D + (R - product(D)) / self.scale
            # Nothing is noisy with all the data: the last iterate is the best.
            total = D * self.steps_of_epoch if self.whole else total + D
        self.D[rows], self.total[rows] = D, total
        for counter, add in ((self.age, 1), (self.count, self.steps_of_epoch), (self.n_iter, self.steps_of_epoch)):
            counter[rows] += add

    def _minibatches(self) -> Iterator[Any]:
        """Yield the curvature of each step of an epoch."""
        for _ in range(self.steps_of_epoch):
            yield self.A if self.whole else _minibatch(self.A, self.inverse.settings.batch_size, self.generator)

    def _look(self, steps: int) -> None:
        """Judge the averages on all the data; rows within the tolerance leave, halved residuals are new anchors."""
        rows = self.rows
        X = self.anchor[rows] + self.total[rows] / self.count[rows, None]
        R = self.B[rows] - self.products(X)
        size, before = norms(R), norms(self.R[rows])
        # Not (a ≤ b): NaN compares false.
        if not bool((size <= GROWTH * before).all()):
            self.inverse.fail(steps)
        better, half = size < self.size[rows], size <= 0.5 * before
        self.best[rows[better]], self.size[rows[better]] = X[better], size[better]
        anchored = rows[half]
        self.anchor[anchored], self.R[anchored] = X[half], R[half]
        self.D[anchored], self.total[anchored], self.age[anchored] = 0.0, 0.0, 0
        self.rows = rows[size > self.goal[rows]]


def _minibatch(A: Any, size: int, generator: torch.Generator) -> Any:
    """Return the curvature of a minibatch, independent of every other: shuffled epochs would bias the average."""
    n = A.n_samples
    # A permutation repeats no sample, which has less variance, but costs O(n).
    if n <= 100 * size:
        return A.minibatch(torch.randperm(n, generator=generator, device="cpu")[:size])
    return A.minibatch(torch.randint(n, (size,), generator=generator, device="cpu"))


def _largest(A: Any, settings: LiSSA, batches: int = SCALE_BATCHES) -> float:
    """Return the largest eigenvalue found on some minibatches of A; on A itself where one holds all."""
    generator, size = torch.Generator("cpu").manual_seed(int(settings.random_state or 0)), settings.batch_size
    if A.n_samples <= size:
        return _lanczos(A, generator)
    return max(_lanczos(_minibatch(A, size, generator), generator) for _ in range(batches))


def _lanczos(A: LinearOperator, generator: torch.Generator) -> float:
    """Return the largest Ritz value of a few Lanczos steps: at most the largest eigenvalue, and close to it."""
    v = torch.randn(1, A.size, generator=generator, dtype=torch.float64, device="cpu").to(A.device, A.dtype)
    V = v / norms(v)[:, None].to(v)
    products = torch.empty_like(V[:0])
    for _ in range(min(SCALE_STEPS, A.size)):
        products = torch.cat([products, A.apply(V[-1:])])
        # Against all vectors, twice: one pass leaves their rounding in.
        w = products[-1:] - (products[-1:] @ V.mT) @ V
        w = w - (w @ V.mT) @ V
        size = norms(w)
        if len(V) == A.size or float(size) <= 1e-6 * float(norms(products[-1])):
            break
        V = torch.cat([V, (w / size[:, None]).to(V)])
    basis = V[: len(products)]
    return float(torch.linalg.eigvalsh(basis @ products.mT)[-1])
