"""Who does the work: skinvert through its public face, and its peers by the fastest of theirs for the same system.

Every system is (H + λI) x = b, H the mean cross-entropy's curvature over all rows. The settings favour the peers: all
rows as one batch where memory allows it, their checks of determinism off, columns in chunks where they are faster so,
and tolerances that just reach what ``LIMITS`` demands.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from curvlinops import (
    CGInverseLinearOperator,
    EKFACLinearOperator,
    GGNLinearOperator,
    HessianLinearOperator,
    KFACInverseLinearOperator,
    KFACLinearOperator,
)
from curvlinops.examples import IdentityLinearOperator
from dattri.func.hessian import ihvp_at_x_cg, ihvp_at_x_explicit
from pydvl.influence.torch import EkfacInfluence
from pydvl.influence.torch.functional import hessian
from pydvl.influence.torch.operator import CgOperator, DirectSolveOperator, HessianOperator
from torch import nn
from workloads import Workload

from skinvert import HessianInverter
from skinvert.methods import CG

# The work in, B's solutions X (k, p) out: all that is timed.
Solve = Callable[[Workload], torch.Tensor]

LIMITS = {"direct": 1e-5, "cg": 1e-4}
# skinvert's cg solves to 1e-5 by default; this, as the peers' tolerances, just reaches the limit.
RTOL = 7e-5
# Columns at once in curvlinops: 256 together took 1.6 times as long.
CHUNK = 64


@dataclass(frozen=True)
class Row:
    """A piece of work, what is to be solved, how accurately (None: as well as the approximation does), and by whom."""

    work: str
    task: str
    curvature: str
    limit: float | None
    contestants: dict[str, Solve]
    slow: bool = False

    @property
    def name(self) -> str:
        """Work and task."""
        return f"{self.work} {self.task}"


# -- skinvert ----------------------------------------------------------------------------------------------------------


def skinvert(method: str | CG, curvature: str, check_residual: bool = True) -> Solve:
    """By the estimator and its defaults; with ``check_residual=False`` it judges as little as the peers do."""

    def solve(work: Workload) -> torch.Tensor:
        settings = {"curvature": curvature, "loss": "cross_entropy", "check_residual": check_residual}
        inverter = HessianInverter(method, work.hessian_perturbation, **settings).fit(work.model, work.data)
        return inverter.solve(work.B).x

    return solve


# -- curvlinops --------------------------------------------------------------------------------------------------------

CURVATURES = {"hessian": HessianLinearOperator, "ggn": GGNLinearOperator}


def curvlinops_dense(curvature: str) -> Solve:
    """Products with the identity, then Cholesky."""

    def solve(work: Workload) -> torch.Tensor:
        H, p = _operator(work, curvature), work.B.shape[1]
        columns = torch.eye(p).split(CHUNK, dim=1)
        A = torch.cat([H @ part for part in columns], dim=1) + work.hessian_perturbation * torch.eye(p)
        return torch.cholesky_solve(work.B.T, torch.linalg.cholesky(A)).T

    return solve


def curvlinops_cg(curvature: str, tolerance: float) -> Solve:
    """Conjugate gradients of a chunk of rows in step; ``tolerance`` is of the mean of the relative residuals."""

    def solve(work: Workload) -> torch.Tensor:
        H = _operator(work, curvature)
        shapes = [tuple(t.shape) for t in work.model.parameters()]
        identity = IdentityLinearOperator(shapes, torch.device("cpu"), torch.float32)
        A = H + work.hessian_perturbation * identity
        inverse = CGInverseLinearOperator(A, tolerance=tolerance, max_iter=1000)
        return torch.cat([(inverse @ part.T).T for part in work.B.split(CHUNK)])

    return solve


def curvlinops_kronecker(kind: type[KFACLinearOperator]) -> Solve:
    """KFAC and EKFAC of the exact output Hessian, weight and bias together, damped exactly: what skinvert computes."""

    def solve(work: Workload) -> torch.Tensor:
        settings = {"fisher_type": "type-2", "separate_weight_and_bias": False, "check_deterministic": False}
        curvature = kind(work.model, nn.CrossEntropyLoss(), [*work.model.parameters()], [work.data], **settings)
        inverse = KFACInverseLinearOperator(curvature, damping=work.hessian_perturbation, use_exact_damping=True)
        return (inverse @ work.B.T).T.detach()

    return solve


def _operator(work: Workload, curvature: str) -> HessianLinearOperator | GGNLinearOperator:
    settings = {"check_deterministic": False, "num_data": len(work.data[0])}
    return CURVATURES[curvature](work.model, nn.CrossEntropyLoss(), [*work.model.parameters()], [work.data], **settings)


# -- pyDVL -------------------------------------------------------------------------------------------------------------


def pydvl_direct(batch_size: int) -> Solve:
    """``torch.func.hessian`` a batch, then LU."""

    def solve(work: Workload) -> torch.Tensor:
        batches = [*zip(*(part.split(batch_size) for part in work.data), strict=True)]
        matrix = hessian(work.model, nn.functional.cross_entropy, batches)
        operator = DirectSolveOperator(matrix, work.hessian_perturbation, in_place_regularization=True)
        return operator.apply(work.B)

    return solve


def pydvl_cg(tolerance: float) -> Solve:
    """Block conjugate gradients; it stops a row at rtol²·‖b‖ (0.10.0), so that ``rtol`` is the tolerance's root."""

    def solve(work: Workload) -> torch.Tensor:
        H = HessianOperator(work.model, nn.functional.cross_entropy, [work.data])
        settings = {"rtol": tolerance**0.5, "atol": 1e-12, "maxiter": 1000, "use_block_cg": True}
        return CgOperator(H, work.hessian_perturbation, **settings).apply(work.B)

    return solve


def pydvl_ekfac(work: Workload) -> torch.Tensor:
    """EKFAC, with one backward pass along Σ √p_c ∇log p_c instead of the exact output Hessian."""
    influence = EkfacInfluence(work.model, update_diagonal=True, hessian_regularization=work.hessian_perturbation)
    try:
        # It has no public solve of given rows.
        return influence.fit([work.data])._solve_hvp(work.B)
    finally:
        # It leaves its gradients in the model.
        work.model.zero_grad()


# -- dattri ------------------------------------------------------------------------------------------------------------


def dattri_explicit(work: Workload) -> torch.Tensor:
    """``torch.func.hessian``, then LU; batches are not to be had: it adds inverses of batches up."""
    theta, loss = _flat(work)
    return ihvp_at_x_explicit(loss, theta, regularization=work.hessian_perturbation)(work.B)


def dattri_cg(iterations: int) -> Solve:
    """A fixed number of conjugate gradients, all rows in step; it has no tolerance."""

    def solve(work: Workload) -> torch.Tensor:
        theta, loss = _flat(work)
        settings = {"max_iter": iterations, "regularization": work.hessian_perturbation}
        return ihvp_at_x_cg(loss, theta, **settings)(work.B)

    return solve


def _flat(work: Workload) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """Return θ (p,) and the mean loss of all rows as its function."""
    named = {name: t.detach() for name, t in work.model.named_parameters()}
    x, y = work.data

    def loss(theta: torch.Tensor) -> torch.Tensor:
        parts = theta.split([t.numel() for t in named.values()])
        values = {name: part.view(t.shape) for (name, t), part in zip(named.items(), parts, strict=True)}
        return nn.functional.cross_entropy(torch.func.functional_call(work.model, values, (x,)), y)

    return torch.cat([t.flatten() for t in named.values()]), loss


# -- the table ---------------------------------------------------------------------------------------------------------


def rows() -> list[Row]:
    """Return all the work, in the order of the table."""
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    logging.getLogger("pydvl").setLevel(logging.ERROR)
    direct, cg = LIMITS["direct"], LIMITS["cg"]
    return [
        Row("W1", "Hessian, direct", "hessian", direct, {
            "skinvert direct": skinvert("direct", "hessian"),
            "curvlinops products, Cholesky": curvlinops_dense("hessian"),
            "pyDVL direct": pydvl_direct(1797),
            "dattri explicit": dattri_explicit,
        }),
        Row("W2", "Hessian, cg", "hessian", cg, {
            "skinvert cg": skinvert("cg", "hessian"),
            "skinvert CG, rtol as the peers'": skinvert(CG(rtol=RTOL), "hessian"),
            "curvlinops CG": curvlinops_cg("hessian", 2e-5),
            "pyDVL block CG": pydvl_cg(8e-5),
            "dattri CG": dattri_cg(30),
        }),
        Row("W2", "Hessian, dense", "hessian", direct, {
            "skinvert direct": skinvert("direct", "hessian"),
            "curvlinops products, Cholesky": curvlinops_dense("hessian"),
            "pyDVL direct": pydvl_direct(128),
            "dattri explicit": dattri_explicit,
        }),
        Row("W2", "GGN, cg", "ggn", cg, {
            "skinvert cg": skinvert("cg", "ggn"),
            "skinvert CG, rtol as the peers'": skinvert(CG(rtol=RTOL), "ggn"),
            "curvlinops CG": curvlinops_cg("ggn", 2e-5),
        }),
        Row("W2", "GGN, dense", "ggn", direct, {
            "skinvert direct": skinvert("direct", "ggn"),
            "curvlinops products, Cholesky": curvlinops_dense("ggn"),
        }),
        *_kronecker("W2", slow=False),
        Row("W3", "Hessian, cg", "hessian", cg, {
            "skinvert cg": skinvert("cg", "hessian"),
            "skinvert CG, rtol as the peers'": skinvert(CG(rtol=RTOL), "hessian"),
            "skinvert auto": skinvert("auto", "hessian"),
            "curvlinops CG": curvlinops_cg("hessian", 2e-5),
            "pyDVL block CG": pydvl_cg(8e-5),
            "dattri CG": dattri_cg(30),
        }),
        Row("W4", "Hessian, cg", "hessian", cg, {
            "skinvert cg": skinvert("cg", "hessian"),
            "skinvert CG, rtol as the peers'": skinvert(CG(rtol=RTOL), "hessian"),
            "curvlinops CG": curvlinops_cg("hessian", 2e-5),
            "pyDVL block CG": pydvl_cg(8e-5),
            "dattri CG": dattri_cg(30),
        }),
        *_kronecker("W4", slow=True),
    ]  # fmt: skip


def _kronecker(work: str, slow: bool) -> list[Row]:
    kfac = {
        "skinvert kfac": skinvert("kfac", "ggn", check_residual=False),
        "curvlinops KFAC": curvlinops_kronecker(KFACLinearOperator),
    }
    ekfac = {
        "skinvert ekfac": skinvert("ekfac", "ggn", check_residual=False),
        "curvlinops EKFAC": curvlinops_kronecker(EKFACLinearOperator),
    }
    one_pass = {
        "skinvert ekfac, sampled_ggn": skinvert("ekfac", "sampled_ggn", check_residual=False),
        "pyDVL EKFAC": pydvl_ekfac,
    }
    return [
        Row(work, "KFAC", "ggn", None, kfac, slow),
        Row(work, "EKFAC", "ggn", None, ekfac, slow),
        Row(work, "EKFAC, one backward pass", "ggn", None, one_pass, slow),
    ]
