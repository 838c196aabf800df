"""Bad input, in a table: every fault raises, and its message says what, must be, got and, where it helps, try."""

import warnings

import numpy as np
import pytest
import scipy.sparse
import torch
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.tree import DecisionTreeClassifier
from torch import nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from skinvert import HessianInverter, PerSampleGradient, TorchTwiceDifferentiable, solve_hvp
from skinvert.methods import CG, Direct

# -- good input, from which each row of the table departs in one thing -------------------------------------------------

N, P = 12, 8
generator = np.random.default_rng(0)
X = generator.standard_normal((N, 3))
Y = np.arange(N) % 2
COLUMN = generator.standard_normal((N, 1))
B = np.ones((2, P))
X_NAN, X_INF = X.copy(), X.copy()
X_NAN[0, 0], X_INF[0, 0] = np.nan, np.inf


def classifier():
    return nn.Linear(3, 2).double()


def regressor():
    return nn.Linear(3, 1).double()


def fit(X=X, y=Y, net=None, data=None, sample_weight=None, **settings):
    """Fit a classifier over (X, y)."""
    inverter = HessianInverter("direct", 0.1, **{"loss": "cross_entropy", **settings})
    return inverter.fit(net or classifier(), (X, y) if data is None else data, sample_weight)


def regress(y, loss="mse", net=None, **settings):
    """Fit a regressor over (X, y)."""
    return fit(X, y, net or regressor(), loss=loss, **settings)


def plain(*args, **settings):
    """Fit plain rows."""
    return HessianInverter(*args, **settings).fit(X)


def transform(b, method="direct"):
    return HessianInverter(method, 0.1, loss="cross_entropy").fit(classifier(), (X, Y)).transform(b)


def dataset(n=N):
    return TensorDataset(torch.from_numpy(X[:n]), torch.from_numpy(Y[:n]))


def squared_error(output, target):
    return ((output - target) ** 2).mean()


def neither_mean_nor_sum(output, target):
    return ((output - target) ** 2).mean() * len(output) ** 0.5


def not_convex(output, target):
    return torch.sin(3 * (output - target)).mean()


def filled(value, layer):
    nn.init.constant_(layer.weight, value)
    return layer


class AlwaysDropout(nn.Linear):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x))


class Centred(nn.Linear):
    def forward(self, x):
        outputs = super().forward(x)
        return outputs - outputs.mean(0)


class Scalar(nn.Linear):
    def forward(self, x):
        return super().forward(x).mean()


class ToDouble(nn.Linear):
    """Of float32 and float64 layers, with a cast between them that names its dtype."""

    def __init__(self):
        super().__init__(3, 4)
        self.last = nn.Linear(4, 2).double()

    def forward(self, x):
        return self.last(super().forward(x).double())


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 2, dtype=torch.complex128))

    def forward(self, x):
        return ((x + 0j) @ self.weight).abs()


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


def csr(array):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "Sparse CSR tensor support is in beta state"
        return torch.from_numpy(array).to_sparse_csr()


def uninitialised():
    skorch = pytest.importorskip("skorch")
    return HessianInverter().fit(skorch.NeuralNetClassifier(classifier, criterion=nn.CrossEntropyLoss), (X, Y))


def skorch_with_a_loss():
    skorch = pytest.importorskip("skorch")
    net = skorch.NeuralNetClassifier(classifier, criterion=nn.CrossEntropyLoss).initialize()
    return HessianInverter(loss="cross_entropy").fit(net, (X, Y))


# -- the table: id, call, exception, words of the message --------------------------------------------------------------

DATA = [
    ("NaN in X", lambda: fit(X_NAN), ValueError, ["finite", "NaN", "impute"]),
    ("infinity in X", lambda: fit(X_INF), ValueError, ["finite", "infinity"]),
    ("NaN in y", lambda: regress(COLUMN * np.nan), ValueError, ["finite", "NaN"]),
    ("infinity in y", lambda: regress(COLUMN * np.inf), ValueError, ["finite", "infinity"]),
    ("NaN in a loader", lambda: fit(data=[(torch.from_numpy(X_NAN), torch.from_numpy(Y))]), ValueError, ["NaN"]),
    ("complex X", lambda: fit(X + 0j), ValueError, ["X", "real", "complex128"]),
    ("complex tensor X", lambda: fit(torch.from_numpy(X) + 0j), TypeError, ["X", "real", "complex128"]),
    ("sparse X", lambda: fit(scipy.sparse.csr_array(X)), TypeError, ["X", "dense", ".toarray()"]),
    ("sparse tensor X", lambda: fit(torch.from_numpy(X).to_sparse()), TypeError, ["X", "dense", "sparse_coo"]),
    ("sparse CSR tensor X", lambda: fit(csr(X)), TypeError, ["X", "dense", "sparse_csr"]),
    ("masked X", lambda: fit(np.ma.masked_less(X, 0.0)), ValueError, ["X", "without masked entries", ".filled(...)"]),
    ("a list for a tuple", lambda: fit(data=[*dataset().tensors]), ValueError, ["batch", "tuple `(X, y)`"]),
    ("numbered batches", lambda: fit(data=[*enumerate([dataset().tensors])]), ValueError, ["number 0", "enumerate"]),
    ("an empty batch", lambda: fit(data=[dataset().tensors, dataset(0).tensors]), ValueError, ["batch 1", "one row"]),
    ("object X", lambda: fit(X.astype(object)), ValueError, ["X", "numeric", "object", ".astype(float)"]),
    ("string X", lambda: fit(X.astype(str)), ValueError, ["X", "numeric", "<U"]),
    ("string y", lambda: fit(y=Y.astype(str)), ValueError, ["y", "numeric", "encode the labels"]),
    ("object y", lambda: fit(y=np.array([None] * N)), ValueError, ["y", "numeric", "object"]),
    ("wrong width of X", lambda: fit(X[:, :2]), ValueError, ["data", "(12, 2)", "12x2 and 3x2"]),
    ("integer X for a float model", lambda: fit(X.astype(int)), ValueError, ["data", "int64"]),
    ("X and y of other lengths", lambda: fit(y=Y[:5]), ValueError, ["X and y", "same length", "12", "5"]),
    ("no rows", lambda: fit(X[:0], Y[:0]), ValueError, ["at least one row", "0 samples"]),
    ("empty data set", lambda: fit(data=dataset(0)), ValueError, ["at least one row", "0 samples"]),
    ("empty loader", lambda: fit(data=DataLoader(dataset(0))), ValueError, ["at least one row", "0 samples"]),
    ("empty list", lambda: fit(data=[]), ValueError, ["at least one row", "0 samples"]),
    ("a generator", lambda: fit(data=(b for b in [dataset().tensors])), TypeError, ["generator", "only once", "list("]),
    ("an iterator of a loader", lambda: fit(data=iter(DataLoader(dataset()))), TypeError, ["only once", "list("]),
    ("fit(model) without data", lambda: HessianInverter(loss="mse").fit(regressor()), ValueError, ["(X, y)", "None"]),
    ("labels missing", lambda: fit(data=X), TypeError, ["(X, y)", "shape (12, 3)"]),
    ("labels None", lambda: fit(data=(X, None)), ValueError, ["(X, y)", "None"]),
    (
        "labels missing with model=",
        lambda: HessianInverter(model=classifier(), loss="cross_entropy").fit(X),
        TypeError,
        ["(X, y)", "shape (12, 3)"],
    ),
    ("labels missing in batches", lambda: fit(data=TensorDataset(torch.from_numpy(X))), ValueError, ["pair", "of 1"]),
    ("three entries in a batch", lambda: fit(data=TensorDataset(*dataset().tensors, torch.ones(N))), ValueError, ["3"]),
    ("three entries in the tuple", lambda: fit(data=(X, Y, Y)), ValueError, ["(X, y)", "3 entries"]),
    ("a string as data", lambda: fit(data="digits"), TypeError, ["data", "str"]),
    ("a mapping as data", lambda: fit(data={"X": X, "y": Y}), TypeError, ["data", "dict", "try `(X, y)`"]),
    ("weights too short", lambda: fit(sample_weight=np.ones(5)), ValueError, ["sample_weight", "length 12", "5"]),
    ("weights negative", lambda: fit(sample_weight=-np.ones(N)), ValueError, ["sample_weight", "non-negative", "-1"]),
    ("weights all zero", lambda: fit(sample_weight=np.zeros(N)), ValueError, ["sample_weight", "positive", "zero"]),
    ("weights 2-D", lambda: fit(sample_weight=np.ones((N, 1))), ValueError, ["sample_weight", "1D", "(12, 1)"]),
    ("weights NaN", lambda: fit(sample_weight=np.full(N, np.nan)), ValueError, ["sample_weight", "finite"]),
    ("weights a number", lambda: fit(sample_weight=2.0), ValueError, ["sample_weight", "one weight per row", "2.0"]),
    (
        "weights with a custom sampler",
        lambda: fit(data=DataLoader(dataset(), sampler=SubsetRandomSampler(range(N))), sample_weight=np.ones(N)),
        ValueError,
        ["DataLoader", "SubsetRandomSampler", "Subset`"],
    ),
    ("one held-out row", lambda: fit().score((X[:1], Y[:1])), ValueError, ["two weighted rows", "1 sample"]),
]

TARGETS = [
    ("class too large", lambda: fit(y=Y + 1), ValueError, ["[0, 2)", "from 1 to 2"]),
    ("class negative", lambda: fit(y=Y - 1), ValueError, ["[0, 2)", "from -1 to 0"]),
    ("classes as floats", lambda: fit(y=Y * 1.0), ValueError, ["integer", "float64", "y.long()"]),
    ("nll classes as floats", lambda: fit(y=Y * 1.0, loss="nll"), ValueError, ["integer", "float64"]),
    ("classes as a column", lambda: fit(y=Y[:, None]), ValueError, ["(12,)", "(12, 1)", "y.ravel()"]),
    (
        "classes against (n,)",
        lambda: regress(Y, "cross_entropy", nn.Sequential(regressor(), nn.Flatten(0))),
        ValueError,
        ["outputs", "(n, c)", "(12,)"],
    ),
    ("(n,) against (n, 1): mse", lambda: regress(COLUMN[:, 0]), ValueError, ["(12,)", "(12, 1)", "reshape(-1, 1)"]),
    ("integer (n,) against (n, 1): mse", lambda: regress(Y), ValueError, ["(12,)", "(12, 1)", "reshape(-1, 1)"]),
    ("(n,) against (n, 1): bce", lambda: regress(Y * 1.0, "bce_with_logits"), ValueError, ["(12,)", "(12, 1)"]),
    ("(n,) against (n, 1): huber", lambda: regress(COLUMN[:, 0], "huber"), ValueError, ["(12,)", "(12, 1)"]),
    ("(n,) against (n, 1): callable", lambda: regress(COLUMN[:, 0], squared_error), ValueError, ["(12,)", "(12, 1)"]),
    ("integer (n,) against (n, 1): callable", lambda: regress(Y, squared_error), ValueError, ["(12,)", "(12, 1)"]),
    (
        "(n, 1) against (n,)",
        lambda: regress(COLUMN, net=nn.Sequential(regressor(), nn.Flatten(0))),
        ValueError,
        ["(12, 1)", "(12,)", "y.ravel()"],
    ),
    ("a loss without curvature", lambda: regress(COLUMN, nn.L1Loss()), ValueError, ["twice differentiable", "huber"]),
    ("bce above one", lambda: regress(Y[:, None] * 2.0, "bce_with_logits"), ValueError, ["[0, 1]", "0 to 2"]),
    ("poisson below zero", lambda: regress(-np.ones((N, 1)), "poisson_nll"), ValueError, ["non-negative", "-1"]),
    (
        "all ignored",
        lambda: fit(y=np.full(N, -1), loss=nn.CrossEntropyLoss(ignore_index=-1)),
        ValueError,
        ["targets", "at least one", "all ignored"],
    ),
]

MODELS = [
    ("a scalar for outputs", lambda: fit(net=Scalar(3, 2).double()), ValueError, ["output", "a scalar", "`loss=`"]),
    ("a complex parameter", lambda: fit(net=Complex()), ValueError, ["parameter weight", "complex128", "`params=`"]),
    ("a cast to a fixed dtype", lambda: fit(net=ToDouble()), ValueError, ["same dtype", "that of a weight"]),
    ("no trainable parameter", lambda: fit(net=classifier().requires_grad_(False)), ValueError, ["requires_grad_"]),
    ("no parameter at all", lambda: fit(net=nn.ReLU()), ValueError, ["trainable parameters", "none"]),
    (
        "a module class",
        lambda: HessianInverter(loss="mse").fit(nn.Linear, (X, Y)),
        TypeError,
        ["class Linear", "instance"],
    ),
    ("a module class as model=", lambda: HessianInverter(model=nn.Linear).fit(X, Y), TypeError, ["class Linear"]),
    (
        "a model of another kind",
        lambda: HessianInverter().fit(DecisionTreeClassifier(), (X, Y)),
        TypeError,
        ["LogisticRegression", "DecisionTreeClassifier", "register_model"],
    ),
    ("uninitialised skorch net", uninitialised, NotFittedError, ["initialised", "net.initialize()"]),
    ("skorch net with a loss", skorch_with_a_loss, ValueError, ["loss", "None", "criterion"]),
    ("meta device model", lambda: fit(net=nn.Linear(3, 2, device="meta")), ValueError, ["device", "meta"]),
    ("bfloat16 model", lambda: fit(net=nn.Linear(3, 2).bfloat16()), ValueError, ["bfloat16", "dtype=torch.float32"]),
    ("NaN in the parameters", lambda: fit(net=filled(np.nan, classifier())), ValueError, ["finite", "parameters"]),
    (
        "BatchNorm without running statistics",
        lambda: fit(net=nn.Sequential(classifier(), nn.BatchNorm1d(2, track_running_stats=False).double())),
        ValueError,
        ["running statistics", "track_running_stats=False", "per sample"],
    ),
    (
        "SyncBatchNorm without running statistics",
        lambda: fit(net=nn.Sequential(classifier(), nn.SyncBatchNorm(2, track_running_stats=False).double())),
        ValueError,
        ["running statistics", "track_running_stats=False", "per sample"],
    ),
    ("dropout in eval mode", lambda: fit(net=AlwaysDropout(3, 2).double()), ValueError, ["same", "self.training"]),
    ("rows that depend on each other", lambda: fit(net=Centred(3, 2).double()), ValueError, ["one row's own"]),
    (
        "Embedding max_norm",
        lambda: fit(Y[:, None], net=nn.Sequential(nn.Embedding(5, 2, max_norm=1.0), nn.Flatten())),
        ValueError,
        ["max_norm", "1.0", "Renormalise"],
    ),
    ("tuple outputs", lambda: fit(net=Pair(3, 2).double()), TypeError, ["tensor", "tuple", "override `outputs`"]),
    (
        "a loss beside an adapted model",
        lambda: fit(net=TorchTwiceDifferentiable(classifier(), "cross_entropy")),
        ValueError,
        ["loss", "brings its own"],
    ),
]

SETTINGS = [
    *(
        (
            f"λ = {value!r}",
            lambda value=value: plain(hessian_perturbation=value),
            kind,
            ["'hessian_perturbation' parameter of HessianInverter", "[0.0, inf)", repr(value)],
        )
        for value, kind in [
            (-1, ValueError),
            (np.nan, ValueError),
            (np.inf, ValueError),
            ("1", TypeError),
            (True, TypeError),
            (None, TypeError),
        ]
    ),
    (
        "λ for the function",
        lambda: solve_hvp(
            "direct", TorchTwiceDifferentiable(classifier(), "cross_entropy"), (X, Y), B, hessian_perturbation=-1
        ),
        ValueError,
        ["hessian_perturbation", "[0.0, inf)", "-1"],
    ),
    ("unknown method", lambda: plain("newton"), ValueError, ["'arnoldi', 'auto', 'cg'", "'newton'"]),
    ("a method class", lambda: plain(CG), TypeError, ["instance", "CG"]),
    ("unknown curvature", lambda: fit(curvature="fishy"), ValueError, ["'hessian', 'ggn'", "'fishy'"]),
    ("ggn for plain arrays", lambda: plain(curvature="ggn"), ValueError, ["'auto'", "'ggn'", "give a model"]),
    (
        "ggn of a loss that is not convex",
        lambda: regress(COLUMN, not_convex, curvature="ggn"),
        ValueError,
        ["convex", 'curvature="hessian"'],
    ),
    ("unknown loss", lambda: fit(loss="hinge"), ValueError, ["'cross_entropy', 'mse'", "'hinge'", "callable"]),
    ("no loss for a bare module", lambda: fit(loss=None), ValueError, ["'cross_entropy'", "callable", "None"]),
    ("a loss class", lambda: regress(COLUMN, nn.MSELoss), TypeError, ["class", "MSELoss()"]),
    ("a loss that is a number", lambda: fit(loss=3), TypeError, ["loss", "callable", "3"]),
    ("neither mean nor sum", lambda: regress(COLUMN, neither_mean_nor_sum), ValueError, ["a mean or a sum", "doubled"]),
    ("a loss that gives a number", lambda: regress(COLUMN, lambda output, target: 3.0), TypeError, ["tensor", "float"]),
    ("unknown device", lambda: fit(device="abacus"), ValueError, ["device", '"auto"', "'abacus'"]),
    ("absent device", lambda: fit(device="cuda:99"), ValueError, ["device", "this machine", "'cuda:99'", '"auto"']),
    ("meta device", lambda: fit(device="meta"), ValueError, ["device", "numbers", "'meta'"]),
    ("half precision", lambda: fit(dtype=torch.float16), ValueError, ["float32 or float64", "float16"]),
    ("unknown dtype", lambda: fit(dtype="single-ish"), ValueError, ["float32 or float64", "'single-ish'"]),
    ("a glob that matches nothing", lambda: fit(params="conv*"), ValueError, ["['weight', 'bias']", "'conv*'"]),
    ("one glob that matches nothing", lambda: fit(params=["*", "conv*"]), ValueError, ["'conv*'"]),
    ("no glob", lambda: fit(params=[]), ValueError, ["['weight', 'bias']", "[]"]),
    ("a number as glob", lambda: fit(params=3), TypeError, ["glob", "3"]),
    ("batch_size 0", lambda: fit(batch_size=0), ValueError, ["'batch_size' parameter", "[1, inf)", "0"]),
    ("batch_size 1.5", lambda: fit(batch_size=1.5), TypeError, ["'batch_size' parameter", "an int", "1.5"]),
    (
        "batch_size 0 for gradients",
        lambda: PerSampleGradient(classifier(), loss="cross_entropy", batch_size=0).fit(X, Y),
        ValueError,
        ["'batch_size' parameter of PerSampleGradient", "0"],
    ),
    ("weight_decay negative", lambda: fit(weight_decay=-1), ValueError, ["weight_decay", "[0.0, inf)", "-1"]),
    ("unknown blocks", lambda: fit(blocks="rows"), ValueError, ["blocks", "'layer'", "'rows'"]),
    ("CG(rtol=-1)", lambda: plain(CG(rtol=-1)), ValueError, ["'rtol' parameter of CG", "-1"]),
    ("CG(maxiter=0)", lambda: plain(CG(maxiter=0)), ValueError, ["'maxiter' parameter of CG", "[1, inf)", "0"]),
    ("Direct(rtol=-1)", lambda: plain(Direct(rtol=-1)), ValueError, ["'rtol' parameter of Direct", "-1"]),
    ("x0 of another shape", lambda: transform(B, CG(x0=np.ones((3, 3)))), ValueError, ["x0", "(2, 8)", "(3, 3)"]),
    ("x0 NaN", lambda: transform(B, CG(x0=B * np.nan)), ValueError, ["x0", "finite", "NaN"]),
    (
        "fit_transform with a model",
        lambda: HessianInverter(model=classifier()).fit_transform(X, Y),
        TypeError,
        ["plain rows", "PerSampleGradient"],
    ),
]

RIGHT_SIDES = [
    ("tensor b NaN", lambda: transform(torch.from_numpy(B * np.nan)), ValueError, ["b", "finite", "NaN"]),
    (
        "tensor b of a wrong width",
        lambda: transform(torch.ones(2, 7)),
        ValueError,
        ["(k, 8)", "(2, 7)", "feature_names"],
    ),
    ("tensor b 1-D", lambda: transform(torch.ones(8)), ValueError, ["(k, 8)", "(8,)", "b.reshape(1, -1)"]),
    ("tensor b complex", lambda: transform(torch.from_numpy(B + 0j)), TypeError, ["b", "real", "complex128"]),
    ("tensor b sparse", lambda: transform(torch.from_numpy(B).to_sparse()), TypeError, ["b", "dense", "sparse_coo"]),
    ("tensor b sparse CSR", lambda: transform(csr(B)), TypeError, ["b", "dense", "sparse_csr"]),
    (
        "function's b of a wrong width",
        lambda: solve_hvp("direct", TorchTwiceDifferentiable(classifier(), "cross_entropy"), (X, Y), np.ones((2, 7))),
        ValueError,
        ["b", "(k, 8)", "(2, 7)"],
    ),
    ("residual's x of another shape", lambda: fit().residual(B, B[:1]), ValueError, ["x", "(2, 8)", "(1, 8)"]),
    (
        "flatten with a name missing",
        lambda: fit().flatten({"weight": np.ones((2, 3))}),
        ValueError,
        ["missing ['bias']"],
    ),
    (
        "flatten of a wrong shape",
        lambda: fit().flatten({"weight": np.ones((2, 2)), "bias": np.ones(2)}),
        ValueError,
        ["weight must be of shape (2, 3)", "Got shape (2, 2)"],
    ),
    ("unflatten of a wrong width", lambda: fit().unflatten(np.ones((1, 7))), ValueError, ["(k, 8)", "(1, 7)"]),
    ("unflatten of plain rows", lambda: plain("direct").unflatten(X), TypeError, ["model", "plain rows"]),
]

# scikit-learn's own words, which say the same things.
SKLEARN = [
    ("NaN in plain rows", lambda: HessianInverter().fit(X_NAN), ValueError, ["X", "NaN"]),
    ("b NaN", lambda: transform(B * np.nan), ValueError, ["X", "NaN"]),
    ("b infinite", lambda: transform(B * np.inf), ValueError, ["X", "infinity"]),
    ("b of a wrong width", lambda: transform(np.ones((2, 7))), ValueError, ["7 features", "expecting 8"]),
    ("b 1-D", lambda: transform(np.ones(8)), ValueError, ["Expected 2D", "1D", "reshape(1, -1)"]),
    ("b complex", lambda: transform(B + 0j), ValueError, ["Complex data not supported"]),
    ("b sparse", lambda: transform(scipy.sparse.csr_array(B)), TypeError, ["Sparse", "dense", ".toarray()"]),
    ("b of objects", lambda: transform(np.full((2, 8), "a", dtype=object)), ValueError, ["could not convert", "'a'"]),
    ("b of strings", lambda: transform(np.full((2, 8), "a")), ValueError, ["could not convert", "'a'"]),
    ("no plain rows", lambda: HessianInverter().fit(X[:0]), ValueError, ["0 sample(s)", "minimum of 1"]),
    # GridSearchCV looks at X before it knows of any estimator.
    (
        "DataLoader under GridSearchCV",
        lambda: GridSearchCV(
            HessianInverter(model=classifier(), loss="cross_entropy"), {"hessian_perturbation": [0.1]}
        ).fit(DataLoader(dataset())),
        TypeError,
        ["DataLoader"],
    ),
    *(
        (f"unfitted {name}", call, NotFittedError, ["HessianInverter instance is not fitted yet", "'fit'"])
        for name, call in [
            ("transform", lambda: HessianInverter().transform(B)),
            ("solve", lambda: HessianInverter().solve(torch.from_numpy(B))),
            ("score", lambda: HessianInverter().score(X)),
            ("residual", lambda: HessianInverter().residual(B, B)),
            ("inverse_transform", lambda: HessianInverter().inverse_transform(B)),
            ("get_feature_names_out", lambda: HessianInverter().get_feature_names_out()),
            ("aslinearoperator", lambda: HessianInverter().aslinearoperator()),
            ("flatten", lambda: HessianInverter().flatten({})),
        ]
    ),
    ("unfitted gradients", lambda: PerSampleGradient().transform((X, Y)), NotFittedError, ["not fitted yet"]),
]

OURS = DATA + TARGETS + MODELS + SETTINGS + RIGHT_SIDES


@pytest.mark.parametrize(("call", "kind", "words"), [pytest.param(*row[1:], id=row[0]) for row in OURS + SKLEARN])
def test_bad_input_raises_and_says_why(call, kind, words):
    with pytest.raises(kind) as error:
        call()
    message = str(error.value)
    missing = [word for word in words if word not in message]
    assert not missing, message


@pytest.mark.parametrize("call", [pytest.param(row[1], id=row[0]) for row in OURS])
def test_our_messages_say_what_must_be_and_got(call):
    with pytest.raises((ValueError, TypeError)) as error:
        call()
    assert " must be " in str(error.value)
    assert " Got " in str(error.value)


def test_the_good_input_is_good():
    for call in (fit, lambda: regress(COLUMN), plain, lambda: transform(B), lambda: fit(data=DataLoader(dataset()))):
        call()
