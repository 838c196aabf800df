"""Dense Kronecker-factored curvature in float64, written from the papers: loops, explicit krons, no code of skinvert's.

Networks are ``nn.Sequential``; a layer's factors come from the Jacobian of all outputs in an addition to its result.
"""

import copy

import numpy as np
import torch
from torch import nn

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)


class Conv1D(nn.Module):
    """The linear layer of GPT-2 in transformers, which is not installed: weights (in, out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.randn(nf) / 10)

    def forward(self, x):
        size_out = x.size()[:-1] + (self.nf,)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size_out)


LAYERS = (nn.Linear, *CONVOLUTIONS, nn.Embedding, Conv1D)


class KroneckerOracle:
    """G, A and the exact block of every layer with trained parameters, in the order [weight, bias] of (d, i) matrices.

    Each group of a grouped convolution counts as a layer.

    ``loss(f, y)`` is sᵢ of one row (1, ...), and ``mass(y)`` its mᵢ; L = Σ wᵢsᵢ / Σ wᵢmᵢ. ``empirical`` takes the true
    labels' gradients gᵢ = κ∇sᵢ over Σ wᵢ instead.
    """

    def __init__(self, net, X, y, loss, mass=None, weights=None, empirical=False):
        self.net = copy.deepcopy(net).double().eval()
        self.X, self.y, self.loss = X.double() if X.is_floating_point() else X, y, loss
        self.w = np.ones(len(X)) if weights is None else np.asarray(weights, dtype=float)
        self.m = np.array([1.0 if mass is None else float(mass(y[i : i + 1])) for i in range(len(X))])
        self.empirical = empirical
        self.modules = [
            k for k, layer in enumerate(self.net) if isinstance(layer, LAYERS) and any(trained(layer).values())
        ]
        self.layers = [(k, j) for k in self.modules for j in range(getattr(self.net[k], "groups", 1))]
        self.samples = [self.sample(i) for i in range(len(X))]

    def forward(self, x, additions):
        """The outputs of one row, an addition at each layer's result; and the layers' inputs."""
        inputs = {}
        for k, layer in enumerate(self.net):
            if k in self.modules:
                inputs[k] = x.detach()
            x = layer(x)
            if k in self.modules:
                x = x + additions[self.modules.index(k)]
        return x, inputs

    def sample(self, i):
        """Per layer (a (T, i), g (r, T, d)) of row i, with Σ g gᵀ its curvature before the average."""
        x, y = self.X[i : i + 1], self.y[i : i + 1]
        z, shapes = x, []
        for k, layer in enumerate(self.net):
            z = layer(z)
            if k in self.modules:
                shapes.append(z.shape)
        zeros = tuple(torch.zeros(shape, dtype=torch.float64) for shape in shapes)
        f, inputs = self.forward(x, zeros)
        if self.empirical:
            columns = torch.autograd.functional.jacobian(lambda *e: self.loss(self.forward(x, e)[0], y)[None], zeros)
            J = [c.reshape(1, -1) for c in columns]
        else:
            J = torch.autograd.functional.jacobian(lambda *e: self.forward(x, e)[0].reshape(-1), zeros)
            H = torch.autograd.functional.hessian(lambda v: self.loss(v.reshape(f.shape), y), f.detach().reshape(-1))
            values, vectors = torch.linalg.eigh(H)
            S = vectors * values.clamp(min=0).sqrt()
            J = [S.mT @ part.reshape(f.numel(), -1) for part in J]
        out = []
        for k, part, shape in zip(self.modules, J, shapes, strict=True):
            layer = self.net[k]
            g = part.reshape(len(part), *shape[1:])
            if isinstance(layer, CONVOLUTIONS):
                g = g.flatten(2).transpose(1, 2)
            g = g.reshape(len(part), -1, g.shape[-1])
            d = g.shape[2] // getattr(layer, "groups", 1)
            for j in range(getattr(layer, "groups", 1)):
                out.append((homogeneous(layer, inputs[k][0], j * d).numpy(), g[:, :, j * d : (j + 1) * d].numpy()))
        return out

    @property
    def W(self):
        return (self.w * self.m).sum()

    def denominator(self):
        """The factor on wᵢ Σ g gᵀ."""
        return (self.w.sum() / self.W) ** 2 / self.w.sum() if self.empirical else 1 / self.W

    def factors(self, layer, approx="expand"):
        """G, A."""
        A = G = 0.0
        for one, w, m in zip(self.samples, self.w, self.m, strict=True):
            a, g = one[layer]
            T = len(a)
            if approx == "expand":
                A = A + w * m * sum(np.outer(a[t], a[t]) for t in range(T)) / self.W
                G = G + w * sum(np.outer(g[r, t], g[r, t]) for t in range(T) for r in range(len(g))) / T
            else:
                A = A + w * m * np.outer(a.mean(0), a.mean(0)) / self.W
                G = G + w * sum(np.outer(g[r].sum(0), g[r].sum(0)) for r in range(len(g)))
        return G * self.denominator(), A

    def exact(self, layer):
        """The layer's block of the curvature: rows Σₜ vec(g aᵀ)."""
        block = 0.0
        for one, w in zip(self.samples, self.w, strict=True):
            a, g = one[layer]
            for r in range(len(g)):
                v = (g[r].T @ a).reshape(-1)
                block = block + w * np.outer(v, v)
        return block * self.denominator()

    def kfac(self, approx="expand"):
        """The dense matrix in the flat order of the parameters."""
        return self.placed([np.kron(*self.factors(layer, approx)) for layer in range(len(self.layers))])

    def ekfac(self, approx="expand"):
        blocks = []
        for layer in range(len(self.layers)):
            G, A = self.factors(layer, approx)
            Q = np.kron(np.linalg.eigh(G)[1], np.linalg.eigh(A)[1])
            blocks.append(Q @ np.diag(np.diag(Q.T @ self.exact(layer) @ Q)) @ Q.T)
        return self.placed(blocks)

    def block_diagonal(self):
        return self.placed([self.exact(layer) for layer in range(len(self.layers))])

    def placed(self, blocks):
        """Blocks of vec[W, b] where the flat rows have W, then b."""
        p = sum(len(block) for block in blocks)
        matrix, start = np.zeros((p, p)), 0
        for (k, j), block in zip(self.layers, blocks, strict=True):
            own = trained(self.net[k])
            weights, biases = places(self.net[k], start)
            d = len(weights) // getattr(self.net[k], "groups", 1)
            group = slice(j * d, (j + 1) * d)
            columns = ([weights[group]] if own["weight"] else []) + ([biases[group, None]] if own["bias"] else [])
            flat = np.concatenate(columns, axis=1).reshape(-1)
            matrix[np.ix_(flat, flat)] = block
            if j == getattr(self.net[k], "groups", 1) - 1:
                start += sum(q.numel() for q in self.net[k].parameters() if q.requires_grad)
        return matrix


def places(layer, start):
    """Where the weights of each output channel (d, i), and its bias (d,), lie in a flat row."""
    own, weight = trained(layer), layer.weight
    n = weight.numel() if own["weight"] else 0
    numbers = start + np.arange(weight.numel()).reshape(weight.shape)
    if isinstance(layer, nn.Embedding | Conv1D):
        rows = numbers.T
    elif isinstance(layer, TRANSPOSED):
        # (in, out / groups, kernel): output channel o of group j has the weights of the group's input channels.
        parts = np.split(numbers, layer.groups)
        rows = np.stack([part[:, o].reshape(-1) for part in parts for o in range(weight.shape[1])])
    else:
        rows = numbers.reshape(len(weight), -1)
    return rows, start + n + np.arange(len(rows))


def trained(layer):
    return {
        role: getattr(layer, role, None) is not None and getattr(layer, role).requires_grad
        for role in ("weight", "bias")
    }


def homogeneous(layer, a, channel=0):
    """The rows (T, i) that an output channel sees of one sample's input, with the coordinate of a trained bias."""
    of = {nn.Linear: linear_rows, Conv1D: linear_rows, nn.Embedding: one_hot_rows}.get(type(layer), patches)
    rows = of(layer, a, channel)
    own = trained(layer)
    parts = ([rows] if own["weight"] else []) + ([torch.ones(len(rows), 1)] if own["bias"] else [])
    return torch.cat([part.double() for part in parts], 1)


def linear_rows(layer, a, channel):
    return a.reshape(-1, a.shape[-1])


def one_hot_rows(layer, a, channel):
    rows = torch.zeros(a.numel(), layer.num_embeddings, dtype=torch.float64)
    for t, index in enumerate(a.reshape(-1).tolist()):
        if index != layer.padding_idx:
            rows[t, index] = 1
    return rows


def patches(layer, a, channel):
    """The patch of each output position, by probing: the derivative of a channel's results in its weights."""
    probe = copy.deepcopy(layer).double()
    weight = torch.zeros_like(probe.weight, requires_grad=True)
    z = torch.func.functional_call(probe, {"weight": weight}, (a[None],))[0, channel].reshape(-1)
    own = places(layer, 0)[0][channel]
    return torch.stack([torch.autograd.grad(v, weight, retain_graph=True)[0].reshape(-1)[own] for v in z])
