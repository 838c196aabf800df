"""A model, its gradients, buffers and mode, and the caller's arrays are bit-identical after every public call."""

import pickle

import numpy as np
import pytest
import torch
from problems import problem
from sklearn.base import clone

from skinvert import HessianInverter, PerSampleGradient, TorchTwiceDifferentiable, solve_hvp
from skinvert.methods import CG

P = problem("batchnorm_dropout", "cross_entropy").p


class Scene:
    """A model in training mode with gradients, and arrays; ``state`` is a bit-exact record of all."""

    def __init__(self, model):
        case = problem(model, "cross_entropy")
        self.net = case.module.train()
        for i, tensor in enumerate(self.net.parameters()):
            tensor.grad = torch.full_like(tensor, i + 0.5) if i % 2 and tensor.requires_grad else None
        self.X, self.y = case.X.numpy().copy(), case.y.numpy().copy()
        self.tensors = case.X.clone(), case.y.clone()
        self.weights = np.linspace(0, 1, len(self.y))
        self.b, self.b_tensor = case.right_hand_sides(3), torch.from_numpy(case.right_hand_sides(3))
        self.x0 = np.ones((3, case.p))

    def fitted(self, method="direct", **settings):
        inverter = HessianInverter(method, 1e3, model=self.net, loss="cross_entropy", batch_size=5, **settings)
        return inverter.fit(self.X, self.y, self.weights)

    def state(self):
        named = [*self.net.named_parameters(remove_duplicate=False), *self.net.named_buffers(remove_duplicate=False)]
        return [
            [
                (name, id(t), t.data_ptr(), t._version, t.requires_grad, t.detach().numpy().tobytes())
                for name, t in named
            ],
            [None if t.grad is None else (id(t.grad), t.grad.numpy().tobytes()) for t in self.net.parameters()],
            [(name, module.training, len(module._forward_hooks)) for name, module in self.net.named_modules()],
            [array.tobytes() for array in (self.X, self.y, self.weights, self.b, self.x0)],
            [(t._version, t.numpy().tobytes()) for t in (*self.tensors, self.b_tensor)],
        ]


CALLS = {
    "fit direct": lambda s: s.fitted(),
    "fit cg": lambda s: s.fitted("cg").transform(s.b),
    "fit ggn": lambda s: s.fitted(curvature="ggn").transform(s.b),
    "fit empirical_fisher": lambda s: s.fitted(curvature="empirical_fisher").transform(s.b),
    "fit float32": lambda s: s.fitted(dtype="float32").transform(s.b),
    "fit on a loader": lambda s: HessianInverter("direct", 1e3, loss="cross_entropy").fit(
        s.net, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*s.tensors), 5, shuffle=True)
    ),
    "fit on tensors": lambda s: HessianInverter("cg", 1e3, loss="cross_entropy").fit(s.net, s.tensors),
    "params": lambda s: s.fitted(params="*weight*"),
    "transform": lambda s: (s.fitted().transform(s.b), s.fitted().transform(s.b_tensor)),
    "solve": lambda s: s.fitted().solve(s.b),
    "solve with x0": lambda s: s.fitted(CG(x0=s.x0)).solve(s.b_tensor),
    "solve from x0": lambda s: s.fitted("cg").solve(s.b, s.x0),
    "inverse_transform": lambda s: s.fitted("cg").inverse_transform(s.b),
    "residual": lambda s: s.fitted().residual(s.b, s.b),
    "score": lambda s: s.fitted().score(s.X, s.y, s.weights),
    "score empirical_fisher": lambda s: s.fitted(curvature="empirical_fisher").score(s.X, s.y),
    "aslinearoperator": lambda s: s.fitted("cg").aslinearoperator() @ s.b.T,
    "curvature's faces": lambda s: (s.fitted().curvature_.aslinearoperator() @ s.b.T, s.fitted().curvature_.diagonal()),
    "unflatten": lambda s: s.fitted().flatten(s.fitted().unflatten(s.b)),
    "clone": lambda s: clone(s.fitted()),
    "pickle": lambda s: pickle.loads(pickle.dumps(s.fitted())).transform(s.b),
    "PerSampleGradient": lambda s: PerSampleGradient(s.net, loss="cross_entropy", batch_size=5).fit_transform(s.X, s.y),
    "PerSampleGradient on tensors": lambda s: (
        PerSampleGradient(s.net, loss="cross_entropy").fit(s.X, s.y).transform(s.tensors)
    ),
    "solve_hvp direct": lambda s: solve_hvp("direct", adapted(s), s.tensors, s.b_tensor, hessian_perturbation=1e3),
    "solve_hvp cg": lambda s: solve_hvp("cg", adapted(s), (s.X, s.y), s.b, hessian_perturbation=1e3),
    "grad": lambda s: adapted(s).grad(*s.tensors, create_graph=True),
    "hessian": lambda s: adapted(s).hessian(*s.tensors),
}


def adapted(scene):
    return TorchTwiceDifferentiable(scene.net, "cross_entropy")


@pytest.mark.one_in(2)
@pytest.mark.parametrize("model", ["batchnorm_dropout", "tied", "lstm", "sparse_embedding", "frozen_and_dead"])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_nothing_changes(call, model):
    scene = Scene(model)
    expected = scene.state()
    call(scene)
    assert scene.state() == expected


def test_later_training_does_not_reach_a_fit():
    scene = Scene("mlp")
    inverter = scene.fitted("cg")
    expected = inverter.transform(scene.b)
    net = scene.net
    saved = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.no_grad():
        for tensor in net.parameters():
            tensor.add_(1.0)
    received = inverter.transform(scene.b)
    net.load_state_dict(saved)
    np.testing.assert_array_equal(received, expected)


def test_a_result_is_the_callers_own():
    scene = Scene("mlp")
    inverter = scene.fitted()
    first = inverter.transform(scene.b_tensor)
    expected = first.clone()
    first.zero_()
    assert torch.equal(inverter.transform(scene.b_tensor), expected)
