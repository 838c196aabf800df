"""Whose scores foretell retraining better, method by method: skinvert's, or those of pyDVL and dattri?

All on the retrainings of ``lds.py``, by its linear datamodeling score. Everyone is given the same module in float32 and
the same λ, that of ``lds.py`` plus the weight decay, which here is part of nobody's curvature. The peers' scores come
from their own calls, which ``lds_peers_check.py`` holds against their formulas. dattri's arrays are transposed; TRAK's
are of the margin, which falls as the loss rises. The interval is of ours less theirs, paired.

    OMP_NUM_THREADS=1 .venv-bench/bin/python docs/benchmarks/lds_peers.py --model softmax --retrainings softmax.npz
"""

import logging
import warnings
from functools import partial

import numpy as np
import torch
from dattri.algorithm.influence_function import (
    IFAttributorArnoldi,
    IFAttributorCG,
    IFAttributorDataInf,
    IFAttributorEKFAC,
    IFAttributorExplicit,
)
from dattri.algorithm.trak import TRAKAttributor
from dattri.task import AttributionTask
from lds import (
    WEIGHT_DECAY,
    arguments,
    as_rows,
    by_method,
    digits,
    mlp,
    n_parameters,
    retrainings,
    softmax,
    timed,
    trak,
)
from pydvl.influence.torch import (
    ArnoldiInfluence,
    CgInfluence,
    DirectInfluence,
    EkfacInfluence,
    InverseHarmonicMeanInfluence,
    NystroemSketchInfluence,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from skinvert.metrics import linear_datamodeling_score

RANKS = {"arnoldi": 100, "nystroem": 200, "trak": 512}
# CG's steps in dattri, which has no tolerance.
STEPS = 40


def main():
    parser = arguments(__doc__)
    parser.add_argument("--perturbation", default="1e-1 rel", help="λ of every method, such as '1e-1 rel'")
    parser.add_argument("--peers", nargs="+", default=list(PEERS), help="names of the table")
    args = parser.parse_args()
    train, test = digits(args.test_rows)
    problem = softmax(train) if args.model == "softmax" else mlp(args, train)
    retrained = retrainings(problem, train, test, args)
    compare(problem, train, test, retrained, args)


def compare(problem, train, test, retrained, args):
    """Print a line for each peer's method, beside ours: of one module, at one λ."""
    net, ours = as_net(problem["scored"]), {}
    rows = [as_rows(net, part) for part in (train, test)]
    large = n_parameters(net) > LARGEST_DIRECT
    ekfac = by_method("ekfac", args.perturbation, problem["settings"])
    inverter = ekfac.fit(problem["scored"], as_rows(problem["scored"], train)).inverter_
    shift = inverter.hessian_perturbation_ + WEIGHT_DECAY
    print(f"{args.model}, {len(retrained.subsets)} subsets, {args.test_rows} test rows, λ = {shift:.3g}", flush=True)
    print("| peer | LDS | 95 % | skinvert | LDS | skinvert less peer | 95 % | s | s |\n" + 9 * "|---" + "|")
    for name in args.peers:
        peer, mine = PEERS[name]
        if (large and name in DENSE) or (len(net) > 1 and name == WITHOUT_BIAS):
            continue
        if mine not in ours:
            ours[mine] = timed(partial(our_scores, mine, net, *rows, shift))
        try:
            theirs = timed(partial(peer, net, *rows, shift))
        except (RuntimeError, ValueError) as failure:  # Out of memory, too, is a RuntimeError of torch.
            print(f"| {name} | {type(failure).__name__}: {str(failure).splitlines()[0][:80]} |", flush=True)
            continue
        print(line(name, *theirs, mine, *ours[mine], retrained), flush=True)


def our_scores(name, net, train, test, shift):
    if name == "TRAK pipeline":
        return trak(net, train, test)
    method, _, hessian = name.partition(", ")
    settings = {"loss": "cross_entropy", **({"curvature": "hessian"} if hessian else {})}
    return by_method(method, shift, settings).fit(net, train).transform(test).numpy()


def line(name, theirs, seconds, mine, scores, our_seconds, retrained):
    """Return a line of the table; scores that are not finite have no LDS."""
    if not np.isfinite(theirs).all():
        return f"| {name} | not finite | | {mine} | | | | {seconds:.1f} | {our_seconds:.1f} |"
    peer = linear_datamodeling_score(theirs, *retrained, random_state=0)
    score = linear_datamodeling_score(scores, *retrained, compare=theirs, random_state=0)
    low, high = peer.interval
    below, above = score.difference_interval
    return (
        f"| {name} | {peer.mean:.3f} | {low:.3f} to {high:.3f} | {mine} | {score.mean:.3f} | {score.difference:+.3f} | "
        f"{below:+.3f} to {above:+.3f} | {seconds:.1f} | {our_seconds:.1f} |"
    )


def as_net(model):
    """Return a module in float32, of its own gradients: the network, or the linear layer of a fitted regression."""
    if isinstance(model, nn.Module):
        return model
    net = nn.Linear(model.coef_.shape[1], len(model.coef_))
    for parameter, values in ((net.weight, model.coef_), (net.bias, model.intercept_)):
        # scikit-learn's may be in Fortran's order.
        parameter.data = torch.from_numpy(values).float().contiguous()
    return nn.Sequential(net)


# -- pyDVL: scores (n_test, n) -----------------------------------------------------------------------------------------


def pydvl(kind, batch_size=None, **settings):
    """Return a function of (net, train, test, shift) by one of its influence models; None is all rows as one batch."""

    def scores(net, train, test, shift):
        named = {"hessian_regularization": shift} if kind is EkfacInfluence else {"regularization": shift}
        loss = () if kind is EkfacInfluence else (nn.functional.cross_entropy,)
        influence = kind(net, *loss, **named, **settings).fit(loader(train, batch_size))
        found = influence.influences(*test, *train).detach().numpy()
        # It leaves its gradients in the model.
        net.zero_grad()
        return found

    return scores


def loader(rows, batch_size=None):
    return DataLoader(TensorDataset(*rows), batch_size=batch_size or len(rows[0]), shuffle=False)


# -- dattri ------------------------------------------------------------------------------------------------------------


def dattri(kind, at_once, shift_name="regularization", **settings):
    """Return a function of (net, train, test, shift) by one of its attributors, ``at_once`` test rows in a batch."""

    def scores(net, train, test, shift):
        attributor = kind(task(net, cross_entropy), **{shift_name: shift}, **settings)
        attributor.cache(loader(train))
        found = attributor.attribute(loader(train), loader(test, at_once)).detach().numpy().T
        net.zero_grad()
        return found

    return scores


def dattri_ekfac_without_bias(net, train, test, shift):
    """Return EKFAC's scores with biases as weights of a constant input: of one linear layer alone."""
    layer = nn.Linear(net[0].in_features + 1, net[0].out_features, bias=False)
    layer.weight.data = torch.cat([net[0].weight.data, net[0].bias.data[:, None]], 1)
    train, test = ((torch.cat([X, torch.ones(len(X), 1)], 1), y) for X, y in (train, test))
    return dattri(IFAttributorEKFAC, 100, "damping")(nn.Sequential(layer), train, test, shift)


def dattri_trak(net, train, test, _):
    def probability(params, data):
        return torch.exp(-cross_entropy(net)(params, data))

    projection = {"proj_dim": RANKS["trak"]}
    attributor = TRAKAttributor(task(net, margin), probability, projector_kwargs=projection)
    attributor.cache(loader(train))
    return attributor.attribute(loader(test)).detach().numpy().T


def task(net, measured):
    return AttributionTask(loss_func=measured(net), model=net, checkpoints=net.state_dict())


def cross_entropy(net):
    """Return the mean loss of rows, or that of one, as a function of (params, data)."""

    def loss(params, data):
        X, y = data
        outputs = torch.func.functional_call(net, params, X)
        return nn.functional.cross_entropy(outputs, y)

    return loss


def margin(net):
    """Return log(p / (1 − p)) of one row's class as a function of (params, data)."""

    def logit(params, data):
        X, y = data
        outputs = torch.func.functional_call(net, params, X)
        others = torch.arange(len(outputs)) != y
        return (outputs * ~others).sum() - outputs.masked_fill(~others, -torch.inf).logsumexp(0)

    return logit


# Our limit for matrices of p² numbers, in lds.py too.
LARGEST_DIRECT = 10_000
DENSE = ("pyDVL direct", "dattri explicit")
WITHOUT_BIAS = "dattri EKFAC, no bias"
# the peer's name -> its scores, the method of ours that it stands beside
PEERS = {
    "pyDVL direct": (pydvl(DirectInfluence, 64), "direct"),
    "dattri explicit": (dattri(IFAttributorExplicit, 200), "direct"),
    "pyDVL CG": (pydvl(CgInfluence, solve_simultaneously=True, rtol=3e-2, maxiter=500), "cg"),
    "dattri CG": (dattri(IFAttributorCG, 50, max_iter=STEPS), "cg"),
    "pyDVL EKFAC": (pydvl(EkfacInfluence, update_diagonal=True), "ekfac"),
    "pyDVL KFAC": (pydvl(EkfacInfluence), "kfac"),
    "dattri EKFAC": (dattri(IFAttributorEKFAC, 100, "damping"), "ekfac"),
    WITHOUT_BIAS: (dattri_ekfac_without_bias, "ekfac"),
    "pyDVL Arnoldi": (pydvl(ArnoldiInfluence, rank=RANKS["arnoldi"]), "arnoldi, Hessian"),
    "pyDVL Arnoldi, Woodbury": (pydvl(ArnoldiInfluence, rank=RANKS["arnoldi"], use_woodbury=True), "arnoldi, Hessian"),
    "dattri Arnoldi": (dattri(IFAttributorArnoldi, 200, proj_dim=RANKS["arnoldi"], max_iter=200), "arnoldi, Hessian"),
    "pyDVL Nyström": (pydvl(NystroemSketchInfluence, rank=RANKS["nystroem"]), "nystroem"),
    "pyDVL harmonic mean": (pydvl(InverseHarmonicMeanInfluence), "harmonic_mean"),
    "dattri DataInf": (dattri(IFAttributorDataInf, 20), "harmonic_mean"),
    "dattri TRAK": (dattri_trak, "TRAK pipeline"),
}

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("pydvl").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    main()
