"""
Every method: error against time
================================

One system, (H + λI) x = b for 32 gradients, by every method: what does an answer cost, and how far is it from the exact
one? Methods that iterate, or have a rank, give more for more; the others are a point each.
"""

import time
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch.nn import Linear, Sequential, Tanh, functional

from skinvert import HessianInverter, PerSampleGradient
from skinvert.methods import CG, MINRES, Arnoldi, LiSSA, Nystroem

# %%
# A network on 1,200 digits, p = 1,210; right-hand sides are gradients of digits that it has not seen.
torch.manual_seed(0)
torch.set_num_threads(1)
pixels, digits = load_digits(return_X_y=True)
X, y = torch.tensor(pixels / 16), torch.tensor(digits)
net = Sequential(Linear(64, 16), Tanh(), Linear(16, 10)).double()
optimizer = torch.optim.Adam(net.parameters(), 1e-2, weight_decay=1e-4)
for _ in range(300):
    optimizer.zero_grad()
    functional.cross_entropy(net(X[:1200]), y[:1200]).backward()
    optimizer.step()
b = PerSampleGradient(net, loss="cross_entropy").fit_transform(X[1200:1232], y[1200:1232])

# %%
# The exact solution, dense and in float64, by torch alone from the matrix of the GGN.
shift = 1e-2
exact = HessianInverter("direct", shift, curvature="ggn", loss="cross_entropy").fit(net, (X[:1200], y[:1200]))
A = exact.curvature_.to_dense() + shift * torch.eye(b.shape[1]).double()
solution = torch.linalg.solve(A, b.T).T


# %%
# CPU seconds of fit and solve on one thread, without the residuals that a solve reports unless told not to, and the
# relative error of the solutions. What stops early warns, as it should.
def measured(method):
    curvature = "empirical_fisher" if method == "harmonic_mean" else "ggn"  # Its error is that of the curvature too.
    settings = {"curvature": curvature, "loss": "cross_entropy", "check_residual": False, "random_state": 0}
    start = time.process_time()
    x = HessianInverter(method, shift, **settings).fit(net, (X[:1200], y[:1200])).transform(b)
    return time.process_time() - start, float(((x - solution).norm(dim=1) / solution.norm(dim=1)).median())


methods = {name: [name] for name in ("direct", "auto", "kfac", "ekfac", "diagonal", "harmonic_mean")}
methods |= {name: [kind(maxiter=m) for m in (1, 2, 4, 8)] for name, kind in (("cg", CG), ("minres", MINRES))}
ranked = (("arnoldi", Arnoldi), ("nystroem", Nystroem))
methods |= {name: [kind(rank=r) for r in (20, 60, 180)] for name, kind in ranked}
methods["lissa"] = [LiSSA(rtol=rtol) for rtol in (0.5, 0.3)]
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for method in ("direct", CG(maxiter=1)):  # First calls warm up.
        measured(method)
    found = {name: [measured(method) for method in settings] for name, settings in methods.items()}
for name, points in found.items():
    print(f"{name:<14}" + "".join(f"  {seconds:.3f} s: {error:.1e}" for seconds, error in points))

# %%
# Down is exact, left is fast.
figure, ax = plt.subplots(figsize=(9, 4.8), layout="constrained")
for i, (name, points) in enumerate(found.items()):
    label = "harmonic_mean,\nof the empirical Fisher" if name == "harmonic_mean" else name
    style = {"marker": "osD^vPX<>*d"[i], "color": f"C{i}" if i < 10 else "black", "markerfacecolor": "none"}
    ax.loglog(*zip(*points, strict=True), **style, linestyle="-" if len(points) > 1 else "", label=label)
ax.set(xlabel="CPU seconds of fit and solve, one thread", ylabel="Relative error against the exact solution")
ax.set_title(f"GGN of a network, p = {b.shape[1]:,}, λ = {shift:g}: median over {len(b)} right-hand sides", fontsize=10)
figure.legend(loc="outside right center", fontsize=9)

output = Path(__file__).parent / "output" / "methods_error_against_time.png"
output.parent.mkdir(exist_ok=True)
figure.savefig(output, dpi=120)
