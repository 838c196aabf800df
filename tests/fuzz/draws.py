"""Curvatures of draws: each case with one draw a row, and many draws against the matrix of which they are estimates."""

from dataclasses import replace

import torch
from fuzz import runner
from fuzz.cases import choice
from fuzz.losses import class_weights
from scipy.stats import poisson

from skinvert import SampledFisher, SampledGGN

KINDS = {"sampled_ggn": SampledGGN, "sampled_fisher": SampledFisher}
MANY = 300
# The share of cases whose mean over draws is held too: one in so many.
SHARE = 2
# Labels that no draw is.
RARE = 1e-7 / MANY


def run(case, shared):
    """Return what became of a case; raise Silent where draws are of another mean, or other ones in other batches."""
    case = replace(case, curvature=_kind(case))
    found = runner.solved(case, shared)
    if found.refusal:
        return found.refusal
    outcome = runner.judged(case, found)
    if outcome != "no oracle" and choice(case, "mean", SHARE) == 0:
        _hold_draws(case, found)
        _hold_mean(case, found)
    return outcome


def _kind(case):
    """Return the curvature of a case: that of labels seldom where no likelihood is known, which is refused."""
    likely = case.loss in CLASSES or case.loss in MOMENTS or choice(case, "unlikely", 9) == 0
    return "sampled_fisher" if choice(case, "labels", 2) and likely else "sampled_ggn"


def dense(case, found, curvature, batch_size):
    """Return the matrix of a curvature as batches of a size make it."""
    # By a method whose fit takes no pass over the data.
    case = replace(case, method="cg", blocks=None, perturbation=1.0)
    inverter = runner.inverter_of(case, found.loss, curvature=curvature, batch_size=batch_size)
    fitted, _, refusal = runner.tried(
        case, lambda: inverter.fit(found.module, runner.data_of(case, found.X, found.y), found.weights)
    )
    return None if refusal else fitted.curvature_.to_dense().double()


def _hold_draws(case, found):
    """A row's draws are its own, whatever the batches are."""
    one = found.inverter.curvature_.to_dense().double()
    other = dense(case, found, case.curvature, 1 if case.batch_size != 1 else 5)
    if other is not None and not float((one - other).norm()) <= 1e4 * runner.eps_of(case) * float(one.norm()):
        raise runner.Silent(f"batches change draws by {float((one - other).norm() / one.norm()):.3g}\n{case!r}")


def _hold_mean(case, found):
    """The mean of many draws is the matrix itself, within what their own spread allows."""
    if case.curvature == "sampled_fisher" and not found.loss.is_fisher:
        return
    received = dense(case, found, KINDS[case.curvature](MANY, random_state=case.seed), case.batch_size)
    if received is None:
        return
    with torch.enable_grad():
        expected = found.oracle.ggn()
        variance, largest = spread(case, found.oracle)
    # Bernstein's inequality, for a norm.
    allowed = 6 * (variance / MANY) ** 0.5 + 6 * largest / MANY + 1e4 * runner.eps_of(case) * float(expected.norm())
    gap = float((received - expected).norm())
    if not gap <= allowed:
        raise runner.Silent(f"the mean of {MANY} draws off by {gap:.3g}, allowed {allowed:.3g}\n{case!r}")


def spread(case, oracle):
    """Return E‖Ã − G‖² of one draw a row in Frobenius's norm, or more, and how far a rare draw may go.

    Of signs E‖vvᵀ − G‖² ≤ (tr G)² + ‖G‖² with v = JᵀSε, whatever S is, and none is rare.
    """
    variance = largest = 0.0
    for i, share in enumerate((oracle.weights / oracle.mass()).tolist()):
        if not share:
            continue
        if case.curvature == "sampled_ggn":
            G = oracle.row_ggn(i)
            variance += share**2 * float(G.trace() ** 2 + G.square().sum())
        else:
            fourth, most = _of_labels(case, *oracle.row_jacobian(i), oracle.y[i])
            variance, largest = variance + share**2 * fourth, max(largest, share * most)
    return variance, largest


def _of_labels(case, J, f, y):
    """Return E‖v‖⁴, or more, and the largest ‖v‖² of a row's scores v = Jᵀe, e the labels less their means."""
    gram, f = J @ J.mT, f.detach()
    if case.loss in CLASSES:
        logits, weights = f.reshape(f.shape[1], -1), CLASSES[case.loss](f)
        parts = [_of_classes(gram, logits, t, weights, y) for t in range(logits.shape[1])]
    else:
        fourth, most = MOMENTS[case.loss](f.reshape(-1))
        own = gram.diagonal()
        parts = [*zip((fourth * own**2).tolist(), (most * own).tolist(), strict=True)]
    # Minkowski's inequality: of the parts' sum, which its parts bound.
    return sum(m**0.25 for m, _ in parts) ** 4, sum(b**0.5 for _, b in parts) ** 2


def _of_classes(gram, f, t, weights, y):
    """Return E‖v‖⁴ and the largest ‖v‖² of one position's label, drawn from the softmax of its logits f[:, t]."""
    at, label = torch.arange(len(f)) * f.shape[1] + t, int(y.reshape(-1)[t])
    p = f[:, t].softmax(0)
    errors = p - torch.eye(len(p), dtype=p.dtype)
    sizes = torch.einsum("yc,cd,yd->y", errors, gram[at][:, at], errors)
    weight = float(weights[label]) if label >= 0 else 0.0
    return weight**2 * float(p @ sizes**2), weight * float(sizes[p > RARE].max())


def _of_normals(f):
    return 12 * torch.ones_like(f), 80 * torch.ones_like(f)


def _of_bits(f):
    p = f.sigmoid()
    most = torch.where(torch.minimum(p, 1 - p) > RARE, torch.maximum(p, 1 - p), torch.minimum(p, 1 - p))
    return p * (1 - p) * (p**3 + (1 - p) ** 3), most**2


def _of_counts(f):
    rate = f.exp()
    return rate + 3 * rate**2, (torch.from_numpy(poisson.ppf(1 - RARE, rate)) - rate) ** 2


# The weight of each class, by which the Fisher counts a row of that true label.
CLASSES = {
    "cross_entropy": lambda f: torch.ones(f.shape[1]),
    "cross_entropy_sum": lambda f: torch.ones(f.shape[1]),
    "weighted": class_weights,
    "ignoring": lambda f: (torch.arange(f.shape[1]) > 0).double(),
}
# E e⁴ and the largest e² of an element's error e.
MOMENTS = {"mse": _of_normals, "mse_sum": _of_normals, "bce": _of_bits, "poisson": _of_counts}
