"""Dense float64 answers from torch and NumPy alone: all the data at once, differentiated; no code of skinvert's.

A weighted row counts as that many rows: weights here are small integers, and rows are repeated.
"""

import copy
from functools import cache

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


class Oracle:
    """L(θ) of a problem as a function of the flat θ, on a deep copy of the module in double precision.

    ``problem`` has ``module``, ``X``, ``y``, ``whole(f, y)`` (L of all outputs, penalty apart), ``summed(f, y)``
    (Σ sᵢ, before the average), ``weight_decay`` and integer ``counts`` or None.
    """

    def __init__(self, problem, penalty=None):
        self.module = copy.deepcopy(problem.module).double().eval()
        for child in self.module.modules():
            if hasattr(child, "sparse"):
                child.sparse = False
        self.whole, self.summed = problem.whole, problem.summed
        self.X, self.y = _double(problem.X), _double(problem.y)
        if problem.counts is not None:
            counts = torch.as_tensor(problem.counts)
            self.X, self.y = self.X.repeat_interleave(counts, 0), self.y.repeat_interleave(counts, 0)
        trained = {k: v.detach().clone() for k, v in self.module.named_parameters() if v.requires_grad}
        self.shapes = {name: value.shape for name, value in trained.items()}
        self.theta = torch.cat([value.reshape(-1) for value in trained.values()])
        self.p, self.n = len(self.theta), len(self.y)
        mu = problem.weight_decay if penalty is None else penalty
        self.penalty = torch.as_tensor(mu, dtype=torch.float64).expand(self.p)

    def outputs(self, theta, X):
        sizes = [shape.numel() for shape in self.shapes.values()]
        parts = zip(self.shapes.items(), theta.split(sizes), strict=True)
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.functional_call(self.module, {k: v.reshape(s) for (k, s), v in parts}, (X,))

    def loss(self, theta):
        return self.whole(self.outputs(theta, self.X), self.y) + 0.5 * (self.penalty * theta.square()).sum()

    @property
    def scale(self):
        """κ of ℓᵢ = κ sᵢ: what turns the sum of losses into n times their average."""
        f = self.outputs(self.theta, self.X)
        return float(self.n * self.whole(f, self.y) / self.summed(f, self.y))

    def gradient(self):
        theta = self.theta.clone().requires_grad_(True)
        return torch.autograd.grad(self.loss(theta), theta)[0].numpy()

    def hessian(self):
        H = torch.autograd.functional.hessian(self.loss, self.theta)
        return ((H + H.mT) / 2).numpy()

    def ggn(self):
        """JᵀHJ, with J the Jacobian of all outputs and H the Hessian of L in them; plus the penalty."""
        f = self.outputs(self.theta, self.X)
        J = torch.autograd.functional.jacobian(lambda t: self.outputs(t, self.X).reshape(-1), self.theta)
        H = torch.autograd.functional.hessian(lambda flat: self.whole(flat.reshape(f.shape), self.y), f.reshape(-1))
        return (J.mT @ H @ J + torch.diag(self.penalty)).numpy()

    def gradient_rows(self):
        """∇ℓᵢ, one backward pass a row."""
        return self.scale * np.stack([self._row_gradient(i) for i in range(self.n)])

    def ggn_rows(self):
        """κ Jᵢᵀ ∇²sᵢ Jᵢ, row by row."""
        return self.scale * np.stack([self._row_ggn(i) for i in range(self.n)])

    def empirical_fisher(self):
        g = self.gradient_rows()
        return g.T @ g / self.n + np.diag(self.penalty.numpy())

    def curvature(self, name):
        return {"hessian": self.hessian, "ggn": self.ggn, "empirical_fisher": self.empirical_fisher}[name]()

    def _row_gradient(self, i):
        theta = self.theta.clone().requires_grad_(True)
        loss = self.summed(self.outputs(theta, self.X[i : i + 1]), self.y[i : i + 1])
        (gradient,) = torch.autograd.grad(loss, theta)
        return gradient.numpy()

    def _row_ggn(self, i):
        X, y = self.X[i : i + 1], self.y[i : i + 1]
        f = self.outputs(self.theta, X)
        J = torch.autograd.functional.jacobian(lambda t: self.outputs(t, X).reshape(-1), self.theta)
        H = torch.autograd.functional.hessian(lambda flat: self.summed(flat.reshape(f.shape), y), f.reshape(-1))
        return (J.mT @ H @ J).numpy()


@cache
def oracle_matrix(problem, curvature="hessian"):
    """The dense curvature of a problem from the table; kept, because every method is held against it."""
    return Oracle(problem).curvature(curvature)


def perturbation_for(H, condition):
    """The least λ ≥ 0 with which H + λI is positive definite and of at most this condition number."""
    values = np.linalg.eigvalsh(H)
    return max(0.0, float((values[-1] - condition * values[0]) / (condition - 1)))


def solution(H, hessian_perturbation, b):
    """(H + λI)⁻¹ b for rows b, by LU."""
    return np.linalg.solve(H + hessian_perturbation * np.eye(len(H)), np.asarray(b, dtype=np.float64).T).T


def pseudo_solution(H, b, rank):
    """H⁺ b for rows b, by an SVD cut at a known rank."""
    U, s, Vt = np.linalg.svd(H)
    return (b @ U[:, :rank] / s[:rank]) @ Vt[:rank]


def held_out_quadratic(Z, g, h, penalty, w):
    """mean_i[ gᵢᵀzᵢ − ½ (W zᵢᵀH̄zᵢ − wᵢ zᵢᵀhᵢzᵢ)/(W − wᵢ) − ½ zᵢᵀRzᵢ ], one row after the other; h are (m, p, p)."""
    W, value = w.sum(), 0.0
    mean = np.einsum("i,ipq->pq", w, h) / W
    for z, gi, hi, wi in zip(Z, g, h, w, strict=True):
        rest = (W * z @ mean @ z - wi * z @ hi @ z) / (W - wi)
        value += wi * (gi @ z - rest / 2 - (penalty * z) @ z / 2)
    return value / W


def relative_error(received, expected):
    """The worst row's ‖x − x*‖ / ‖x*‖."""
    received, expected = np.asarray(received, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert received.shape == expected.shape
    return float((np.linalg.norm(received - expected, axis=-1) / np.linalg.norm(expected, axis=-1)).max())


def matrix_error(received, expected):
    """‖A − B‖ / ‖B‖, Frobenius; absolute where B is zero."""
    gap = np.linalg.norm(np.asarray(received, dtype=np.float64) - expected)
    return float(gap / (np.linalg.norm(expected) or 1.0))


def _double(value):
    value = torch.as_tensor(value)
    return value.double() if value.is_floating_point() else value
