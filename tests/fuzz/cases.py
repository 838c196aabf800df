"""Random cases: a model, a loss, data in some form, right-hand sides, and what to ask; and what a user may be told."""

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from fuzz import losses as L
from fuzz import models as M
from hypothesis import strategies as st

METHODS = (
    "auto",
    "direct",
    "cg",
    "minres",
    "lissa",
    "arnoldi",
    "nystroem",
    "diagonal",
    "kfac",
    "ekfac",
    "harmonic_mean",
    "cg+jacobi",
    "cg+nystroem",
    "cg+ekfac",
)
CURVATURES = ("auto", "hessian", "ggn", "fisher", "empirical_fisher")
FORMS = ("tuple", "arrays", "dataset", "loader", "shuffled", "batches", "weighted")
RIGHT_HAND_SIDES = ("normal", "zero", "tiny", "huge", "duplicate", "one", "p", "more", "integers", "gradients")


@dataclass(frozen=True)
class Case:
    """All that a case is, in plain values: its repr builds it again."""

    seed: int
    domain: str
    layers: tuple
    activations: tuple
    outputs: int
    dense: bool
    dead: bool
    loss: str
    n: int
    batch_size: int | None
    form: str
    model_dtype: torch.dtype
    dtype: torch.dtype | None
    input_scale: float
    weight_decay: float
    perturbation: float
    method: str
    curvature: str
    blocks: str | None
    rhs: str
    b_dtype: str
    ambient: str
    # Of the variant `wrapped` alone.
    wrapper: str = "none"
    layout: str = "plain"
    # Of the variant `rough` alone.
    autocast: str | None = None

    @property
    def log_probabilities(self):
        return self.loss == "nll"


@st.composite
def cases(draw):
    """Draw a case, in no particular state and not wrapped: variants are made of it."""
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    domain = pick("vector", "vector", "sequence", "image", "tokens")
    table = {"vector": tuple(M.VECTOR), "sequence": tuple(M.SEQUENCE), "image": tuple(M.IMAGE), "tokens": M.TOKENS}[
        domain
    ]
    count = 1 if domain in ("tokens", "image") else draw(st.integers(0, 2))
    dense = domain != "vector" and pick(False, False, True)
    outputs = 5 if dense and domain == "tokens" else draw(st.integers(1, 4))
    loss = pick(*L.LOSSES)
    if loss == "callable_gaussian":
        outputs, dense = 2, False
    if loss in L.CLASSIFYING:
        outputs = max(outputs, 2)
    n = draw(st.integers(1, 13))
    return Case(
        seed=draw(st.integers(0, 10**6)),
        domain=domain,
        layers=tuple(pick(*table) for _ in range(count)),
        activations=tuple(pick(*M.ACTIVATIONS) for _ in range(count)),
        outputs=outputs,
        dense=dense,
        dead=pick(False, False, False, True),
        loss=loss,
        n=n,
        batch_size=pick(None, 1, 2, 3, outputs, 5, n),
        form=pick(*FORMS),
        model_dtype=pick(torch.float32, torch.float64),
        dtype=pick(None, None, torch.float32, torch.float64),
        input_scale=pick(1.0, 1.0, 1.0, 1e-3, 30.0),
        weight_decay=pick(0.0, 0.0, 0.1),
        perturbation=pick(0.0, 1e-3, 0.1, 1.0, 10.0),
        method=pick(*METHODS),
        curvature=pick(*CURVATURES),
        blocks=pick(None, None, None, None, "layer"),
        rhs=pick(*RIGHT_HAND_SIDES),
        b_dtype=pick("same", "same", "float64", "float32", "numpy"),
        ambient="plain",
    )


def choice(case, what, count):
    """Return a number below ``count`` that the case itself says: seeds are drawn small, and often the same."""
    return zlib.crc32(f"{what} {case!r}".encode()) % count


def right_hand_sides(case, p, gradients):
    """Return b (k, p) in float64."""
    generator = np.random.default_rng(case.seed)
    # Thousands of steps of many rows are slow, and show nothing more.
    k = 3 if case.method == "lissa" else {"one": 1, "p": p, "more": p + 3}.get(case.rhs, 3)
    b = torch.from_numpy(generator.standard_normal((k, p)))
    if case.rhs == "zero":
        b[1] = 0
    elif case.rhs == "tiny":
        b = b * torch.tensor([[1e-12], [1e-25], [1e-30]], dtype=torch.float64)
    elif case.rhs == "huge":
        b = b * torch.tensor([[1e12], [1e20], [1e30]], dtype=torch.float64)
    elif case.rhs == "duplicate":
        b[2] = b[0]
    elif case.rhs == "integers":
        b = b.mul(5).round()
    elif case.rhs == "gradients":
        b = gradients[:4]
    return b
