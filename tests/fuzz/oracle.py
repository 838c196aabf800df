"""Dense float64 curvatures by plain backward passes over a deep copy: nothing of skinvert's, nothing batched."""

import copy
from functools import wraps

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def once(compute):
    """Keep what a method returns: variants of a case share its oracle."""

    @wraps(compute)
    def kept(self):
        if compute.__name__ not in self.known:
            self.known[compute.__name__] = compute(self)
        return self.known[compute.__name__]

    return kept


class Oracle:
    """The curvatures of a case: rows are repeated as often as they weigh."""

    def __init__(self, case, module, X, y, loss, weights):
        self.known = {}
        self.module = copy.deepcopy(module).double().eval()
        self.X = X.double() if X.is_floating_point() else X
        self.y = y.double() if y.is_floating_point() else y
        self.loss, self.weight_decay = loss, case.weight_decay
        self.weights = torch.ones(len(X), dtype=torch.float64) if weights is None else torch.as_tensor(weights).double()
        self.theta = [p for p in self.module.parameters() if p.requires_grad]
        self.p = sum(t.numel() for t in self.theta)
        # Fused kernels have second derivatives that are wrong, or none: gradients are differenced there.
        fused = any(name.startswith(("weight_norm", "bag")) for name in (*case.layers, case.wrapper))
        self.differenced = fused or "hardsigmoid" in case.activations

    def outputs(self, rows=slice(None)):
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            return self.module(self.X[rows])

    @once
    def mass(self):
        """Σ wᵢ mᵢ."""
        f = self.outputs().detach()
        return sum(
            float(w) * self.loss.denominator(f[i : i + 1], self.y[i : i + 1]) for i, w in enumerate(self.weights)
        )

    def total(self):
        f = self.outputs()
        return sum(w * self.loss.summed(f[i : i + 1], self.y[i : i + 1]) for i, w in enumerate(self.weights) if w)

    def flat(self, parts):
        return torch.cat(
            [(torch.zeros_like(t) if g is None else g).reshape(-1) for g, t in zip(parts, self.theta, strict=True)]
        )

    def derivative(self, value, **settings):
        if not value.requires_grad:
            return torch.zeros(self.p, dtype=torch.float64)
        return self.flat(torch.autograd.grad(value, self.theta, allow_unused=True, **settings))

    @once
    def gradient(self):
        return self.derivative(self.total()).detach() / self.mass() + self.weight_decay * self.flat(self.theta).detach()

    @once
    def hessian(self):
        if self.differenced:
            H = self._differences()
        else:
            g = self.derivative(self.total(), create_graph=True)
            H = torch.stack([self.derivative(g[i], retain_graph=True) for i in range(self.p)]).detach()
        return (H + H.mT) / 2 / self.mass() + self._penalty()

    @once
    def ggn(self):
        G = torch.zeros(self.p, self.p, dtype=torch.float64)
        for i, w in enumerate(self.weights):
            if w:
                G += w * self.row_ggn(i)
        return G / self.mass() + self._penalty()

    def row_jacobian(self, i):
        """J of a row's outputs, flattened, and the outputs."""
        f = self.outputs(slice(i, i + 1))
        return torch.stack([self.derivative(e, retain_graph=True) for e in f.reshape(-1)]).detach(), f

    def row_ggn(self, i):
        """JᵀDJ of a row's loss before the average."""
        J, f = self.row_jacobian(i)
        free = f.detach().requires_grad_(True)
        (r,) = torch.autograd.grad(self.loss.summed(free, self.y[i : i + 1]), free, create_graph=True)
        columns = [
            torch.autograd.grad(e, free, retain_graph=True, allow_unused=True)[0] if e.requires_grad else None
            for e in r.reshape(-1)
        ]
        D = torch.stack([torch.zeros_like(free).reshape(-1) if c is None else c.reshape(-1) for c in columns])
        return J.mT @ D @ J

    def row_by_logits(self, i):
        """The same where the outputs are log-probabilities, as it is by logits: the Fisher."""
        J, f = self.row_jacobian(i)
        return (J.mT * f.detach().reshape(-1).exp()) @ J

    @once
    def empirical_fisher(self):
        g = self.gradient_rows()
        return (g.mT * self.weights) @ g / self.weights.sum() + self._penalty()

    @once
    def gradient_rows(self):
        """The gᵢ, with κ = Σ w / Σ w m."""
        # Where all targets are ignored there is no L, and so no gradient: what is tried is that it is refused.
        scale = float(self.weights.sum()) / (self.mass() or 1.0)
        parts = []
        for i in range(len(self.X)):
            f = self.outputs(slice(i, i + 1))
            parts.append(scale * self.derivative(self.loss.summed(f, self.y[i : i + 1])).detach())
        return torch.stack(parts)

    @property
    def scale(self):
        """κ."""
        return float(self.weights.sum()) / self.mass()

    def losses(self, step):
        """The ℓᵢ at θ + step."""
        theta = self.flat([t.detach() for t in self.theta])
        self._put(theta + step)
        rows = range(len(self.X))
        found = [float(self.loss.summed(self.outputs(slice(i, i + 1)), self.y[i : i + 1])) for i in rows]
        self._put(theta)
        return self.scale * torch.tensor(found, dtype=torch.float64)

    def _penalty(self):
        return self.weight_decay * torch.eye(self.p, dtype=torch.float64)

    def _differences(self):
        theta, columns, h = self.flat([t.detach() for t in self.theta]), [], 1e-5
        for unit in torch.eye(self.p, dtype=torch.float64):
            ends = []
            for sign in (1, -1):
                self._put(theta + sign * h * unit)
                ends.append(self.derivative(self.total()).detach())
            columns.append((ends[0] - ends[1]) / (2 * h))
        self._put(theta)
        moves = ~self._padding()
        return torch.stack(columns) * moves * moves[:, None]

    def _padding(self):
        """Which entries are rows of padding: constants to torch, though outputs depend on them."""
        rows = {
            id(child.weight): child.padding_idx
            for child in self.module.modules()
            if isinstance(child, torch.nn.Embedding | torch.nn.EmbeddingBag) and child.padding_idx is not None
        }
        parts = [torch.zeros(t.shape, dtype=torch.bool) for t in self.theta]
        for t, part in zip(self.theta, parts, strict=True):
            if id(t) in rows:
                part[rows[id(t)]] = True
        return torch.cat([part.reshape(-1) for part in parts])

    def _put(self, theta):
        start = 0
        with torch.no_grad():
            for t in self.theta:
                t.copy_(theta[start : start + t.numel()].reshape(t.shape))
                start += t.numel()
