"""Hold skinvert against pyDVL 0.10.0 line by line: the largest difference of each, relative to the largest score.

    PYTHONPATH=. .venv-bench/bin/python docs/benchmarks/migration.py

In the environment of ``make bench``. pyDVL's Up is n times skinvert's score, its Perturbation −n times.
"""

import logging
import warnings
from collections.abc import Callable

import torch
from pydvl.influence import InfluenceMode
from pydvl.influence.torch import (
    ArnoldiInfluence,
    CgInfluence,
    DirectInfluence,
)
from pydvl.influence.torch.functional import gauss_newton
from pydvl.influence.torch.operator import InverseHarmonicMeanOperator
from pydvl.influence.torch.util import BlockMode
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from skinvert import HessianInverter, InfluenceFunction
from skinvert.methods import Arnoldi

SHIFT, N = 1e-1, 60
torch.manual_seed(0)
X, y = torch.randn(N, 5, dtype=torch.float64), torch.randint(3, (N,))
BATCHES = DataLoader(TensorDataset(X, y), batch_size=20)
X_test, y_test = torch.randn(7, 5, dtype=torch.float64), torch.randint(3, (7,))
net = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).double()


def trained() -> None:
    """Bring the network near a minimum, so that H + λI is positive definite."""
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(net(X), y) + 5e-3 * sum(w.square().sum() for w in net.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)
    net.zero_grad()


def theirs(influence: object, mode: InfluenceMode = InfluenceMode.Up) -> torch.Tensor:
    """Return pyDVL's influences (7, n, ...)."""
    return influence.fit(BATCHES).influences(X_test, y_test, X, y, mode=mode)


def ours(method: object, curvature: str = "hessian", **settings: object) -> InfluenceFunction:
    """Return the fitted influence of skinvert."""
    inverter = HessianInverter(method, SHIFT, curvature=curvature, loss="cross_entropy", **settings)
    return InfluenceFunction(inverter).fit(net, (X, y))


def difference(expected: torch.Tensor, received: torch.Tensor) -> float:
    """Return the largest difference, relative to the largest expected value."""
    return float((expected.detach() - received.detach()).abs().max() / expected.detach().abs().max())


def lines() -> dict[str, Callable[[], float]]:
    """Return what is compared, by its line of the table."""
    test, p = (X_test, y_test), 39
    tight = {"rtol": 1e-8, "atol": 1e-16, "maxiter": 1000}
    model, row = (net, cross_entropy), torch.randn(p, dtype=torch.float64)
    return {
        "DirectInfluence": lambda: difference(
            theirs(DirectInfluence(*model, SHIFT)), N * ours("direct").transform(test)
        ),
        "CgInfluence": lambda: difference(
            theirs(CgInfluence(*model, SHIFT, **tight)), N * ours("cg").transform(test)
        ),
        "ArnoldiInfluence, rank 20": lambda: difference(
            theirs(ArnoldiInfluence(*model, SHIFT, rank=20)),
            N * ours(Arnoldi(rank=20, complement="drop")).transform(test),
        ),
        "ArnoldiInfluence, rank 20, Woodbury": lambda: difference(
            theirs(ArnoldiInfluence(*model, SHIFT, rank=20, use_woodbury=True)),
            N * ours(Arnoldi(rank=20)).transform(test),
        ),
        "gauss_newton, its scale mended": lambda: difference(
            # It divides by p for each batch but the first, in place of n.
            gauss_newton(*model, BATCHES) * p * (len(BATCHES) - 1) / N,
            ours("direct", "empirical_fisher").inverter_.curvature_.to_dense(),
        ),
        "InverseHarmonicMeanOperator, one row": lambda: difference(
            InverseHarmonicMeanOperator(*model, BATCHES, SHIFT).apply(row),
            ours("harmonic_mean", "empirical_fisher").inverter_.transform(row[None])[0],
        ),
        "DirectInfluence, LAYER_WISE": lambda: difference(
            theirs(DirectInfluence(*model, SHIFT, block_structure=BlockMode.LAYER_WISE)),
            N * ours("direct", blocks="layer").transform(test),
        ),
        "DirectInfluence, Perturbation": lambda: difference(
            theirs(DirectInfluence(*model, SHIFT), InfluenceMode.Perturbation),
            -N * ours("direct").feature_influence(range(N), test),
        ),
    }  # fmt: skip


if __name__ == "__main__":
    logging.getLogger("pydvl").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    trained()
    print("| pyDVL 0.10.0 | relative difference |\n|---|---|")
    for name, compare in lines().items():
        print(f"| {name} | {compare():.0e} |")
