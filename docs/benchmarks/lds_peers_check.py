"""Do the peers' scores in ``lds_peers.py`` follow their formulas? A small problem, by dense matrices in float64.

Softmax regression with p = 250 on 300 random rows, at random parameters. Figures are the relative error of a matrix of
scores, ‖theirs − formula‖ / ‖formula‖, and the correlation of its entries with the formula's. dattri's EKFAC departs
from its formula, as 0.3.0 has it: it takes rows for eigenvectors where ``eigh`` returns columns, and a layer's weights
and bias in a row as if the bias were the weights' last column. ", as coded" is the formula with both.
pyDVL's harmonic mean is 1/n of its formula: a correlation of 1 is what ranks need.

    OMP_NUM_THREADS=1 .venv-bench/bin/python docs/benchmarks/lds_peers_check.py
"""

import logging
import warnings

import torch
from dattri.algorithm.influence_function import IFAttributorEKFAC
from dattri.func.projection import random_project
from lds_peers import PEERS, RANKS, WITHOUT_BIAS, cross_entropy, loader, task
from torch import nn

INPUTS, CLASSES, ROWS, SHIFT = 24, 10, 300, 1e-2


def main():
    torch.manual_seed(0)
    # Fewer than there are parameters.
    RANKS["trak"] = 100
    net = nn.Sequential(nn.Linear(INPUTS, CLASSES))
    train, test = ((torch.randn(n, INPUTS), torch.randint(CLASSES, (n,))) for n in (ROWS, 20))
    expected = formulas(net, train, test) | as_coded(net, train, test)
    print("| peer | relative error to its formula | correlation |\n|---|---|---|")
    for name, (peer, _) in PEERS.items():
        torch.manual_seed(0)
        theirs = torch.from_numpy(peer(net, train, test, SHIFT)).double()
        for spelt in (name, f"{name}, as coded"):
            if spelt in expected:
                found = error(theirs, expected[spelt]), correlation(theirs, expected[spelt])
                print("| {} | {:.1e} | {:.6f} |".format(spelt, *found), flush=True)


def error(received, expected):
    return float((received - expected).norm() / expected.norm())


def correlation(received, expected):
    return float(torch.corrcoef(torch.stack([received.flatten(), expected.flatten()]))[0, 1])


def formulas(net, train, test):
    """Return name -> scores (n_test, n) by dense matrices."""
    (A, R, P), (A_test, R_test, _) = parts(net, *train), parts(net, *test)
    g, g_test = flat(R[:, :, None] * A[:, None]), flat(R_test[:, :, None] * A_test[:, None])
    H = hessian(A, P)
    eye = torch.eye(len(H), dtype=H.dtype)
    exact = g_test @ torch.linalg.solve(H + SHIFT * eye, g.T)
    sketched, ranks = nystroem(H), RANKS["nystroem"]
    largest = low_rank(*torch.linalg.eigh(H), g, g_test)
    # Columns of pyDVL's one backward pass along Σ √p_c ∇log p_c.
    along = P.sqrt() - P * P.sqrt().sum(1, keepdim=True)
    mean_inverse = g_test @ sum(torch.linalg.inv(torch.outer(row, row) + SHIFT * eye) for row in g) @ g.T / len(g)
    pairs = R_test[:, :, None] * A_test[:, None], R[:, :, None] * A[:, None]
    empirical = ekfac(A, R, *pairs)
    sampled = [ekfac(A, along, *pairs, corrected) for corrected in (True, False)]
    return {
        "pyDVL direct": exact,
        "dattri explicit": exact,
        "pyDVL CG": exact,
        "dattri CG": exact,
        "pyDVL EKFAC": sampled[0],
        "pyDVL KFAC": sampled[1],
        "dattri EKFAC": empirical,
        WITHOUT_BIAS: empirical,
        "pyDVL Arnoldi": largest,
        "pyDVL Arnoldi, Woodbury": largest + complement(*torch.linalg.eigh(H), g, g_test),
        "dattri Arnoldi": low_rank(*krylov(H), g, g_test),
        "pyDVL Nyström": low_rank(*sketched, g, g_test, ranks) + complement(*sketched, g, g_test, ranks),
        "pyDVL harmonic mean": mean_inverse,
        "dattri DataInf": mean_inverse,
        "dattri TRAK": trak(A, P, train[1], A_test, parts(net, *test)[2], test[1]),
    }


def as_coded(net, train, test):
    """Return dattri's EKFAC as it stands: rows depend on the columns' signs, so that these are its own."""
    attributor = IFAttributorEKFAC(task(net, cross_entropy), damping=SHIFT)
    attributor.cache(loader(train))
    net.zero_grad()
    bases = [basis.double().T for basis in attributor.cached_q["0"]]
    (A, R, _), (A_test, R_test, _) = parts(net, *train), parts(net, *test)
    pairs = R_test[:, :, None] * A_test[:, None], R[:, :, None] * A[:, None]
    return {
        "dattri EKFAC, as coded": ekfac(A, R, *map(misplaced, pairs), bases=bases),
        f"{WITHOUT_BIAS}, as coded": ekfac(A, R, *pairs, bases=bases),
    }


def parts(net, X, y):
    """Return inputs with a constant (n, d + 1), p − onehot(y) (n, c), and probabilities p (n, c), in float64."""
    A = torch.cat([X, torch.ones(len(X), 1)], 1).double()
    P = (A @ torch.cat([net[0].weight, net[0].bias[:, None]], 1).double().T).softmax(1).detach()
    return A, P - nn.functional.one_hot(y, CLASSES), P


def flat(gradients):
    """Return (n, c, d + 1) as rows in the order of parameters: weights, then biases."""
    return torch.cat([gradients[:, :, :-1].flatten(1), gradients[:, :, -1]], 1)


def hessian(A, P):
    """Return Σ (diag p − ppᵀ) ⊗ aaᵀ / n, in the order of ``flat``."""
    outer = torch.diag_embed(P) - P[:, :, None] * P[:, None]
    blocks = torch.einsum("ncd,ni,nj->cidj", outer, A, A) / len(A)
    rows = flat(blocks.reshape(-1, *blocks.shape[2:]))
    return flat(rows.T.reshape(-1, *blocks.shape[:2]))


def low_rank(values, vectors, g, g_test, rank=RANKS["arnoldi"]):
    """Return g_testᵀ V (Θ + λ)⁻¹ Vᵀ g of the largest eigenpairs."""
    values, V = values[-rank:], vectors[:, -rank:]
    return (g_test @ V) / (values + SHIFT) @ (g @ V).T


def complement(_, vectors, g, g_test, rank=RANKS["arnoldi"]):
    """Return what is left of the scores where the other eigenvalues are 0."""
    V = vectors[:, -rank:]
    return (g_test @ g.T - g_test @ V @ (g @ V).T) / SHIFT


def krylov(H):
    """Return Ritz pairs of the 199 rows that 200 of dattri's steps leave, from its start."""
    torch.manual_seed(0)
    basis = [torch.rand(len(H)).double()]
    basis[0] /= basis[0].norm()
    while len(basis) < 199:
        Q = torch.stack(basis)
        row = H @ basis[-1]
        for _ in range(2):
            row = row - Q.T @ (Q @ row)
        basis.append(row / row.norm())
    Q = torch.stack(basis)
    values, vectors = torch.linalg.eigh(Q @ H @ Q.T)
    return values, Q.T @ vectors


def nystroem(H):
    """Return eigenpairs of (HΩ)(ΩᵀHΩ)⁻¹(HΩ)ᵀ, Ω as pyDVL draws it."""
    torch.manual_seed(0)
    sketch = torch.randn(len(H), RANKS["nystroem"]).double()
    product = H @ sketch
    return torch.linalg.eigh(product @ torch.linalg.solve(sketch.T @ product, product.T))


def ekfac(A, R, tested, trained, corrected=True, bases=None):
    """Return EKFAC's scores by given bases, or those of E[aaᵀ] and E[rrᵀ]; KFAC's, where not corrected."""
    (a, U), (s, V) = torch.linalg.eigh(A.T @ A / len(A)), torch.linalg.eigh(R.T @ R / len(R))
    if bases is not None:
        U, V = bases
    scale = (R @ V).square().T @ (A @ U).square() / len(A) if corrected else s[:, None] * a
    turned = [V.T @ rows @ U for rows in (tested, trained)]
    return (turned[0] / (scale + SHIFT)).flatten(1) @ turned[1].flatten(1).T


def misplaced(gradients):
    """Return (n, c, d + 1) with weights and biases in a row, cut into columns as if they were not."""
    return flat(gradients).reshape(gradients.shape)


def trak(A, P, y, A_test, P_test, y_test):
    """Return φ(ΦᵀΦ)⁻¹Φᵀ Q of projected gradients of the margin; dattri divides them by √p."""
    features, tested = (project(flat(margins(*each))) for each in ((A, P, y), (A_test, P_test, y_test)))
    doubt = 1 - P[torch.arange(len(y)), y]
    return tested @ torch.linalg.solve(features.T @ features, features.T) * doubt


def margins(A, P, y):
    """Return the gradients (n, c, d + 1) of f_y − log Σ_{c≠y} exp f_c."""
    hot = nn.functional.one_hot(y, CLASSES)
    others = P * (1 - hot)
    return (hot - others / others.sum(1, keepdim=True))[:, :, None] * A[:, None]


def project(rows):
    rows = rows.float() / rows.shape[1] ** 0.5
    return random_project(rows, len(rows), RANKS["trak"], 32, 0)(rows, ensemble_id=0).double()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("pydvl").setLevel(logging.ERROR)
    main()
