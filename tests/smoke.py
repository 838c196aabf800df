"""What an installed skinvert must do, on any machine: run as a script, from a folder without the sources."""

import sys
import tempfile
from importlib.metadata import version
from importlib.resources import files

import numpy as np
import torch
from sklearn.linear_model import LinearRegression

import skinvert
from skinvert import HessianInverter, InfluenceFunction, PerSampleGradient, load


def main():
    assert version("skinvert") == skinvert.__version__
    assert files("skinvert").joinpath("py.typed").is_file()

    # Plain rows: H = XᵀX / n = 2I, and λ = 2.
    X = np.array([[2.0, 0.0], [0.0, 2.0]])
    inverter = HessianInverter("direct", 2.0).fit(X)
    np.testing.assert_allclose(inverter.transform(np.array([[4.0, 8.0]])), [[1.0, 2.0]])
    with tempfile.TemporaryDirectory() as folder:
        inverter.save(f"{folder}/inverse.safetensors")
        np.testing.assert_array_equal(load(f"{folder}/inverse.safetensors").transform(X), inverter.transform(X))

    # A module: mse's Hessian is 2 XᵀX / n, its gradients 2 (xᵀθ − y) x.
    net = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.zeros_(net.weight)
    module = HessianInverter("cg", loss="mse").fit(net, (torch.eye(2), torch.zeros(2, 1)))
    torch.testing.assert_close(module.transform(torch.tensor([[1.0, 2.0]])), torch.tensor([[1.0, 2.0]]))
    gradients = PerSampleGradient(net, loss="mse").fit_transform(torch.eye(2), torch.ones(2, 1))
    torch.testing.assert_close(gradients, -2 * torch.eye(2))

    # The mean of two numbers: without the 3 it is 1, and the loss at 3 rises from ½ to 2.
    ones, y = np.ones((2, 1)), np.array([1.0, 3.0])
    model = LinearRegression(fit_intercept=False).fit(ones, y)
    scores = InfluenceFunction(removal="newton").fit(model, (ones, y)).transform((ones, y))
    np.testing.assert_allclose(scores, [[1.5, -0.5], [-0.5, 1.5]], atol=1e-6)
    print(f"skinvert {skinvert.__version__} works on Python {sys.version.split()[0]}, from {skinvert.__file__}")


if __name__ == "__main__":
    main()
