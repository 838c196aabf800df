"""Why a row ended as it did: each reason by a solve that ends so, and what is derived from it."""

import warnings

import numpy as np
import pytest
import torch

from skinvert import HessianInverter, InverseHvpResult, Reason
from skinvert.curvature import Gram
from skinvert.methods import CG, MINRES, Diagonal, Direct, HarmonicMean, LiSSA, Nystroem
from skinvert.methods.blocks import invert_blocks
from skinvert.operators import BlockDiagonal, Dense, DiagonalMatrix

ONES, ODD = torch.ones(1, 3), torch.tensor([[0.3, 0.7, 1.1]])
MANY = torch.linspace(0.3, 1.1, 8)[None]
# The first is beyond float32 where it is divided by 1e-30.
FAR = torch.tensor([[1e20, 1e20], [1.0, 1.0]])


def diagonal(*values):
    return DiagonalMatrix(torch.tensor(values))


def full():
    """Of eigenvalues 1 and 4; its diagonal is 2."""
    return Dense(torch.eye(3) + torch.ones(3, 3))


def measured():
    """Of no round number."""
    return Gram(torch.from_numpy(np.random.default_rng(0).standard_normal((20, 8))).float())


def in_blocks(method, *values):
    """Two blocks, of which the second is 1."""
    A = BlockDiagonal([diagonal(*values), diagonal(1.0)])
    return invert_blocks(method, A, 0.0).judged_by(diagonal(*values, 1.0))


# How to end so: an inverse, and right-hand sides.
ENDS = {
    Reason.CONVERGED: [
        lambda: (Direct().invert(full(), 0.0), ONES),
        lambda: (CG().invert(full(), 0.0), ONES),
        lambda: (Diagonal().invert(diagonal(1.0, 2.0, 3.0), 0.0).judged_by(diagonal(1.0, 2.0, 3.0)), ONES),
    ],
    Reason.MAX_ITERATIONS: [
        lambda: (CG(maxiter=1).invert(diagonal(1.0, 2.0, 3.0), 0.0), ONES),
        lambda: (CG(maxiter=1, block=True).invert(diagonal(1.0, 2.0, 3.0), 0.0), ONES),
        lambda: (MINRES(maxiter=1).invert(diagonal(1.0, 2.0, 3.0), 0.0), ONES),
        lambda: (MINRES(maxiter=1, block=True).invert(diagonal(1.0, 2.0, 3.0), 0.0), ONES),
        lambda: (LiSSA(maxiter=1).invert(Gram(torch.diag(torch.tensor([1.0, 10.0, 99.0]))), 1.0), ONES),
        lambda: (in_blocks(CG(maxiter=1), 1.0, 2.0), ONES),
    ],
    Reason.STAGNATED: [
        lambda: (CG(rtol=0.0).invert(measured(), 0.3), MANY),
        lambda: (MINRES(rtol=0.0).invert(measured(), 0.3), MANY),
        lambda: (MINRES(rtol=0.0, block=True).invert(measured(), 0.3), MANY),
        lambda: (MINRES(block=True).invert(diagonal(0.0, 2.0, 3.0), 0.0), ONES),
        lambda: (Direct(rtol=0.0).invert(measured(), 0.3), MANY),
    ],
    Reason.NEGATIVE_CURVATURE: [
        lambda: (CG().invert(diagonal(-1.0, 2.0, 3.0), 0.0), ONES),
        lambda: (CG(block=True).invert(diagonal(-1.0, 2.0, 3.0), 0.0), ONES),
        lambda: (in_blocks(CG(), -1.0, 2.0), ONES),
    ],
    Reason.SINGULAR: [
        lambda: (Direct().invert(diagonal(0.0, 2.0, 3.0), 0.0), ONES),
        lambda: (CG().invert(diagonal(0.0, 2.0, 3.0), 0.0), ONES),
        lambda: (Diagonal().invert(diagonal(0.0, 2.0, 3.0), 0.0).judged_by(diagonal(0.0, 2.0, 3.0)), ONES),
        lambda: (Nystroem(rank=3).invert(diagonal(0.0, 2.0, 3.0), 0.0).judged_by(diagonal(0.0, 2.0, 3.0)), ONES),
        lambda: (in_blocks(Direct(), 0.0, 2.0), ONES),
    ],
    Reason.OUT_OF_RANGE: [
        lambda: (CG().invert(diagonal(1e-30, 2e-30), 0.0), FAR),
        lambda: (MINRES().invert(diagonal(1e-30, 2e-30), 0.0), FAR),
        lambda: (MINRES(block=True).invert(diagonal(1e-30, 2e-30), 0.0), FAR),
        lambda: (LiSSA().invert(Gram(1e-15 * torch.eye(2)), 1e-30), FAR),
        lambda: (Direct().invert(diagonal(1e-30, 2e-30), 0.0), FAR),
        lambda: (Direct().invert(diagonal(-1e-30, 2e-30), 0.0), FAR),
        lambda: (Nystroem(rank=2).invert(diagonal(1e-30, 2e-30), 0.0).judged_by(diagonal(1e-30, 2e-30)), FAR),
        lambda: (Diagonal().invert(diagonal(1e-30, 2e-30), 0.0).judged_by(diagonal(1e-30, 2e-30)), FAR),
        lambda: (HarmonicMean().invert(Gram(1e-15 * torch.eye(2)), 1e-30), FAR[:1]),
        lambda: (in_blocks(CG(), 1e-30, 2e-30), torch.cat([FAR, torch.ones(2, 1)], dim=1)),
    ],
    Reason.APPROXIMATE: [
        lambda: (Diagonal().invert(full(), 0.0).judged_by(full()), ODD),
        lambda: (Nystroem(rank=1).invert(full(), 0.1).judged_by(full()), ODD),
    ],
    Reason.NOT_JUDGED: [
        lambda: (Diagonal().invert(full(), 0.0).unjudged(), ONES),
        lambda: (Nystroem(rank=1).invert(full(), 0.1).judged_by(full()).unjudged(), ONES),
    ],
}


def solved(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inverse, b = make()
        return inverse.solve(b)


def test_every_reason_has_an_end_and_a_cure():
    assert set(ENDS) == set(Reason) and all(ENDS.values())
    assert [reason for reason in Reason if not reason.cure] == [Reason.CONVERGED]
    assert all(reason.cure.startswith("Try ") for reason in Reason if reason.cure)


@pytest.mark.parametrize(
    ("reason", "make"),
    [
        pytest.param(reason, make, id=f"{reason.name} {i}")
        for reason, ends in ENDS.items()
        for i, make in enumerate(ends)
    ],
)
def test_ends_for_its_reason(reason, make):
    info = solved(make).info
    assert info["reason"].dtype == torch.int8
    assert info["reason"][0] == reason
    assert bool(info["converged"][0]) is (reason == Reason.CONVERGED)
    # Rows beside it are their own.
    assert (info["reason"][1:] == Reason.CONVERGED).all()
    assert bool(info["stagnated"][0]) is (reason in (Reason.STAGNATED, Reason.SINGULAR))
    assert bool(info["negative_curvature"][0]) is (reason == Reason.NEGATIVE_CURVATURE)


def test_a_row_below_the_range_of_its_own_dtype_is_out_of_range():
    inverter = HessianInverter("direct", 1e6).fit(np.eye(3, dtype=np.float32) * 1e3)
    with pytest.warns(match="below the range of b's dtype"):
        info = inverter.solve(np.array([[1e-35, 2e-35, 3e-35], [1, 2, 3]], dtype=np.float32)).info
    assert info["reason"].tolist() == [Reason.OUT_OF_RANGE, Reason.CONVERGED]
    assert info["stagnated"].dtype == bool and not info["stagnated"].any()


def test_what_follows_from_reasons_is_not_said_otherwise():
    reason = np.array([Reason.STAGNATED, Reason.CONVERGED], dtype=np.int8)
    info = InverseHvpResult(None, {"reason": reason, "stagnated": np.array([False, True])}).info
    assert info["stagnated"].tolist() == [True, False]
    assert InverseHvpResult(None, {"converged": [True]}).info == {"converged": [True]}
