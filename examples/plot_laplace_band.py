"""
A predictive band by Laplace
============================

The inverse curvature at the minimum is the posterior covariance of the parameters, to second order; through the
outputs' Jacobian it gives each prediction a variance: small where there are data, large where there are none.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.nn import Linear, Sequential, Tanh, functional

from skinvert import HessianInverter

# %%
# Noisy data with a gap, and a network trained to the minimum of squared error with weight decay.
torch.manual_seed(0)
torch.set_num_threads(1)
x = torch.cat([torch.linspace(-3, -1, 40), torch.linspace(1.2, 3, 40)]).double()[:, None]
noise, decay = 0.15, 2e-4
y = torch.sin(2 * x) + noise * torch.randn(x.shape).double()
net = Sequential(Linear(1, 20), Tanh(), Linear(20, 1)).double()
optimizer = torch.optim.LBFGS(net.parameters(), max_iter=3000, tolerance_grad=1e-9, line_search_fn="strong_wolfe")


def closure():
    optimizer.zero_grad()
    objective = functional.mse_loss(net(x), y) + decay / 2 * sum(w.square().sum() for w in net.parameters())
    objective.backward()
    return objective


optimizer.step(closure)

# %%
# The variance of the mean, and with that of the noise σ², which the residuals estimate; φ is 2σ² with torch's mse.
inverter = HessianInverter("direct", curvature="ggn", loss="mse", weight_decay=decay).fit(net, (x, y))
grid = torch.linspace(-4, 4, 200).double()[:, None]
with torch.no_grad():
    mean = net(grid).numpy()[:, 0]
    dispersion = float((net(x) - y).square().mean())
deviation = inverter.predictive_variance(grid, dispersion=2 * dispersion)[:, 0].sqrt().numpy()
total = np.sqrt(deviation**2 + dispersion)
print(f"noise {np.sqrt(dispersion):.3f}, deviation at the data {deviation[50]:.3f}, in the gap {deviation[100]:.3f}")

# %%
# Two standard deviations each way.
figure, ax = plt.subplots(figsize=(7, 4.2), layout="constrained")
for width, alpha, name in ((total, 0.2, "with noise"), (deviation, 0.4, "of the mean")):
    ax.fill_between(
        grid[:, 0].numpy(), mean - 2 * width, mean + 2 * width, color="C0", alpha=alpha, linewidth=0, label=name
    )
ax.plot(grid.numpy(), mean, color="C0", label="network")
ax.plot(grid.numpy(), np.sin(2 * grid.numpy()), color="0.4", linestyle="--", linewidth=1, label="truth")
ax.plot(x.numpy(), y.numpy(), ".", color="C3", markersize=4, label="data")
ax.set(xlabel="x", ylabel="y", ylim=(-4, 4))
ax.legend(ncols=2)

output = Path(__file__).parent / "output" / "laplace_band.png"
output.parent.mkdir(exist_ok=True)
figure.savefig(output, dpi=120)
