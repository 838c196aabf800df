"""The rule of auto, row by row."""

import pytest
import torch

from skinvert import HessianInverter
from skinvert.methods import CG, MINRES, Auto, Direct
from skinvert.operators import DiagonalMatrix, LowRank


def hessian(p):
    return DiagonalMatrix(torch.ones(p))


def semi_definite(p):
    A = hessian(p)
    A.is_psd = True
    return A


@pytest.mark.parametrize(
    ("A", "shift", "expected"),
    [
        (hessian(5000), 0.0, Direct),
        (hessian(5001), 0.0, MINRES),
        (semi_definite(5001), 0.0, CG),
        (LowRank(torch.ones(3, 5001)), 0.1, Direct),
        (LowRank(torch.ones(3, 5001)), 0.0, CG),
        (LowRank(torch.ones(5001, 1).expand(5001, 5002)), 0.1, CG),
    ],
)
def test_chooses(A, shift, expected):
    assert type(Auto().choose(A, shift)) is expected


def test_a_small_memory_keeps_no_matrix(monkeypatch):
    monkeypatch.setattr("skinvert.operators.base.available_memory", lambda device: 4 * 4 * 100**2)
    assert type(Auto().choose(hessian(100), 0.0)) is MINRES
    assert type(Auto().choose(hessian(99), 0.0)) is Direct


def test_says_what_it_chose():
    inverter = HessianInverter(hessian_perturbation=0.1).fit(torch.eye(3))
    assert isinstance(inverter.method_, Direct)
