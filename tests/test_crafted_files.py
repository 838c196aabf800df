"""Files written on purpose, with a checksum that fits: none runs code; each is an error or gives the same answer."""

import copy
import itertools
import json
import warnings

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import scipy.linalg
import torch
from torch import nn

import skinvert
from skinvert import HessianInverter
from skinvert._state import Packed
from skinvert.encoding import decode_state
from skinvert.methods import EKFAC, KFAC, Arnoldi, Direct, Nystroem
from skinvert.methods.dense import CholeskyInverse
from skinvert.operators import Dense
from skinvert.persistence import HEADER_BYTES, _checksum


def fitted(method="direct", on="rows", dtype=torch.float64, **settings):
    X = np.random.default_rng(0).standard_normal((20, 3))
    if on == "rows":
        return HessianInverter(method, 0.1, dtype=dtype, **settings).fit(X)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    y = np.arange(20) % 3
    settings = {"curvature": "ggn", "loss": "cross_entropy", **settings}
    return HessianInverter(method, 0.1, **settings).fit(net, (X, y))


def read(path):
    with safetensors.safe_open(path, framework="numpy") as file:
        header = file.metadata()
    return header, json.loads(header["state"]), safetensors.numpy.load_file(path)


def write(path, header, state, arrays):
    """Write a file with this state, and with the checksum that fits."""
    header = {**header, "state": state if isinstance(state, str) else json.dumps(state)}
    header["sha256"] = _checksum(header, arrays)
    safetensors.numpy.save_file(arrays, path, header)


def entry(state, name):
    """Return the root's [key, value] of this name."""
    return next(pair for pair in state["root"][1] if pair[0] == name)


def crafted(tmp_path, change, inverter=None):
    """Save, change the decoded state in place, and return the path."""
    path = tmp_path / "file"
    (inverter or fitted()).save(path)
    header, state, arrays = read(path)
    change(state, arrays)
    write(path, header, state, arrays)
    return path


# -- no name of a file is looked up beyond closed lists ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["cond", "save", "load", "_import_dotted_name", "hub", "Tensor", "float32x", ""])
@pytest.mark.parametrize("kind", ["dtype", "numpy dtype"])
def test_a_dtype_is_one_of_a_list(kind, name):
    with pytest.raises(ValueError, match="A dtype's name must be one of"):
        Packed(kind, name).unpack()


FUNCTION = ["packed", "dtype", "save", []]


@pytest.mark.parametrize("name", ["method", "method_", "inverse_", "dtype", "loss", "model", "random_state", "_layout"])
def test_no_function_stands_anywhere(name, tmp_path):
    def change(state, arrays):
        entry(state, name)[1] = FUNCTION

    with pytest.raises(ValueError, match="a state that cannot be read"):
        skinvert.load(crafted(tmp_path, change))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("inverse_", None, "inverse_ must be of type InverseOperator"),
        ("method_", "direct", "method_ must be of type Method"),
        ("method_", ["object", 1], "method_ must be of type Method"),
        ("n_features_in_", 10**15, "the inverse's|The inverse must be of size|layout"),
        ("check_residual", None, "check_residual must be of type bool"),
        ("check_residual", 0.5, "check_residual must be of type bool"),
        ("n_features_in_", 10**400, "n_features_in_ must be of type int"),
        ("hessian_perturbation_", float("nan"), "must be of type float"),
        ("answer", ["packed", "tensor", ["array", "array0"], [0, 1]], "answer must be of"),
        ("answer", ["packed", "tensor", ["array", "array0"], [0, 0]], "axes must be"),
        ("_layout", ["list", []], "_layout must be of type"),
    ],
)
def test_each_entry_has_its_type(name, value, message, tmp_path):
    def change(state, arrays):
        entry(state, name)[1] = value

    with pytest.raises(ValueError, match=message):
        skinvert.load(crafted(tmp_path, change))


@pytest.mark.parametrize("name", ["_model", "_data", "curvature_", "transform", "__class__", "solve"])
def test_no_further_entry_is_taken(name, tmp_path):
    def change(state, arrays):
        state["root"][1].append([name, None])

    with pytest.raises(ValueError, match="alone"):
        skinvert.load(crafted(tmp_path, change))
    with pytest.raises(ValueError, match="alone"):
        skinvert.load(crafted(tmp_path, lambda state, arrays: state["objects"][-1][1][1].append([name, None])))


def test_an_object_is_no_part_of_itself(tmp_path):
    def change(state, arrays):
        blocks = next(found for found in state["objects"] if found[0].endswith("BlockInverse"))
        where = next(i for i, found in enumerate(state["objects"]) if found is blocks)
        next(pair for pair in blocks[1][1] if pair[0] == "inverses")[1] = ["list", [["object", where]]]

    with pytest.raises(ValueError, match="no part of itself"):
        skinvert.load(crafted(tmp_path, change, fitted(on="net", blocks="layer")))


def fields_of(state, class_name):
    """Return the [key, value] pairs of the objects of this class."""
    return [found[1][1] for found in state["objects"] if found[0].endswith(f".{class_name}")]


def pair_of(fields, name):
    return next(pair for pair in fields if pair[0] == name)


@pytest.mark.parametrize("letter", ["cholesky", "matrix"])
def test_two_arrays_of_one_shape_are_not_exchanged(letter, tmp_path):
    def change(state, arrays):
        cholesky = pair_of(fields_of(state, "CholeskyInverse")[0], "cholesky")[1]
        matrix = pair_of(fields_of(state, "Dense")[0], "matrix")[1]
        if letter == "cholesky":
            cholesky[2] = matrix[2]
        else:
            matrix[2] = cholesky[2]

    with pytest.raises(ValueError, match="another answer"):
        skinvert.load(crafted(tmp_path, change))


@pytest.mark.parametrize(
    ("method", "field"),
    [
        *itertools.product(["diagonal", "kfac", "ekfac", Arnoldi(rank=5), Nystroem(rank=5)], ["spectrum"]),
        *itertools.product([Arnoldi(rank=5), Nystroem(rank=5)], ["complement"]),
    ],
)
def test_another_spectrum_is_refused(method, field, tmp_path):
    def change(state, arrays):
        fields = fields_of(state, "SpectralInverse")[0]
        if field == "spectrum":
            arrays[pair_of(fields, field)[1][2][1]] += 0.3
        else:
            pair_of(fields, field)[1] = 1.0

    with pytest.raises(ValueError, match="another answer"):
        skinvert.load(crafted(tmp_path, change, fitted(method, on="net")))


@pytest.mark.parametrize(
    ("saved", "class_name", "field", "value", "message"),
    [
        # One block has a Cholesky factor, so that the whole is never asked for another λ, and one eigenvectors.
        ("mixed", "SpectralInverse", "basis", None, "basis must be of type Basis"),
        ("mixed", "SpectralInverse", "spectrum", None, "spectrum must be of type tensor"),
        ("mixed", "SpectralInverse", "spectrum", np.flip, "eigendecomposition must be"),
        ("mixed", "SpectralInverse", "spectrum", lambda theta: theta[:1], "spectrum must be of length"),
        ("mixed", "Eigenvectors", "rows", np.transpose, "eigendecomposition must be"),
        ("mixed", "SpectralInverse", "source", "basis", "source must be of type LinearOperator"),
        ("mixed", "SpectralInverse", "positive_definite", True, "SpectralInverse.positive_definite must be"),
        ("mixed", "SpectralInverse", "approximate", True, "SpectralInverse.approximate must be"),
        ("mixed", "SpectralInverse", "filter", "none", "filter must be one of"),
        # What θ, λ and the basis decide is in no file.
        ("mixed", "SpectralInverse", "cut", 0.5, "alone"),
        ("mixed", "SpectralInverse", "inverted", "spectrum", "alone"),
        ("mixed", "SpectralInverse", "_inverted", "spectrum", "alone"),
        ("mixed", "BlockInverse", "positive_definite", True, "BlockInverse.positive_definite must be"),
        ("mixed", "BlockInverse", "keeps_operator", True, "BlockInverse.keeps_operator must be"),
        ("direct", "CholeskyInverse", "positive_definite", False, "alone"),
        ("direct", "CholeskyInverse", "_spectral", "curvature", "alone"),
        ("direct", "CholeskyInverse", "cholesky", None, "cholesky must be of type tensor"),
        ("direct", "CholeskyInverse", "rtol", 0.5, "rtol of the inverse must be"),
        ("direct", "CholeskyInverse", "rtol", -1.0, "rtol of the inverse must be"),
        ("sample space", "SampleSpaceInverse", "positive_definite", False, "a positive definite one"),
        ("sample space", "SampleSpaceInverse", "penalty", "inverse_shift", "shift must be that of λ"),
        ("sample space", "SampleSpaceInverse", "damped", "shift", "a Cholesky factor, or"),
        ("arnoldi", "SpectralInverse", "approximate", False, "SpectralInverse.approximate must be"),
        ("arnoldi", "SpectralInverse", "positive_definite", False, "SpectralInverse.positive_definite must be"),
        ("arnoldi", "SpectralInverse", "rtol", 0.5, "rtol of the inverse must be"),
        ("diagonal", "SpectralInverse", "approximate", False, "SpectralInverse.approximate must be"),
        ("diagonal", "SpectralInverse", "positive_definite", False, "SpectralInverse.positive_definite must be"),
        ("diagonal", "StandardBasis", "length", 10**12, "The inverse must be of size"),
        ("kfac", "SpectralInverse", "approximate", False, "SpectralInverse.approximate must be"),
        ("kfac", "SpectralInverse", "positive_definite", False, "SpectralInverse.positive_definite must be"),
        ("kfac", "SpectralInverse", "spectrum", np.flip, "eigendecomposition must be"),
        ("kfac", "SpectralInverse", "lost", "spectrum", "alone"),
        ("kfac", "SpectralInverse", "n_lost", 3, "alone"),
        ("kfac", "KroneckerBasis", "inputs", 7, "The inverse must be of size"),
        ("ekfac", "SpectralInverse", "spectrum", np.flip, "another answer"),
    ],
)
@pytest.mark.filterwarnings("ignore::scipy.linalg.LinAlgWarning")
def test_what_contradicts_itself_is_refused(saved, class_name, field, value, message, tmp_path):
    inverter = {
        "mixed": lambda: fitted(on="net", blocks="layer", curvature="hessian"),
        "sample space": lambda: fitted(on="net", curvature="empirical_fisher", weight_decay=0.1),
        "arnoldi": lambda: fitted(Arnoldi(rank=3), on="net"),
    }.get(saved, lambda: fitted(saved, on="net"))()

    def change(state, arrays):
        fields = fields_of(state, class_name)[0]
        if field not in dict(fields):
            fields.append([field, None])
        pair = pair_of(fields, field)
        if callable(value):
            name = pair[1][2][1]
            arrays[name] = np.ascontiguousarray(value(arrays[name]))
        else:
            pair[1] = dict(fields).get(value, value) if isinstance(value, str) else value

    with pytest.raises(ValueError, match=message):
        skinvert.load(crafted(tmp_path, change, inverter))


@pytest.mark.parametrize("frame", [True, False])
def test_names_are_those_of_the_fit_that_is_in_the_file(frame, tmp_path):
    def unnamed(state, arrays):
        entry(state, "_layout")[1] = None

    def named(state, arrays):
        state["root"][1].append(["feature_names_in_", ["list", ["a"]]])

    with pytest.raises(ValueError, match="The names must be"):
        skinvert.load(crafted(tmp_path, named if frame else unnamed, fitted(on="rows" if frame else "net")))


def test_a_false_claim_of_semi_definiteness_clamps_nothing(tmp_path):
    # Positive definite with λ, and indefinite without: the claim would make a negative eigenvalue zero.
    A = np.diag([-0.05, 1.0, 2.0])
    path = crafted_matrix(tmp_path, A)
    with pytest.warns(scipy.linalg.LinAlgWarning, match="indefinite"):
        received = skinvert.load(path).path(np.ones((1, 3)), [0.01])
    np.testing.assert_allclose(received[0, 0], 1 / (np.diag(A) + 0.01), rtol=1e-10)


def crafted_matrix(tmp_path, A):
    """Return the file of the inverse of A + 0.1 I, which claims that A is positive semi-definite."""
    inverter = fitted()
    A = Dense(torch.from_numpy(A))
    A.is_psd = True
    L = torch.linalg.cholesky(A.matrix + 0.1 * torch.eye(A.size))
    inverter.inverse_ = CholeskyInverse(A, L, 0.1, 1e-6)
    inverter.save(tmp_path / "file")
    return tmp_path / "file"


# -- and nothing large is made of something small ----------------------------------------------------------------------


def test_a_header_is_bounded_before_it_is_read(tmp_path):
    fitted().save(tmp_path / "file")
    content = (tmp_path / "file").read_bytes()
    for length in (2**62, HEADER_BYTES + 1, len(content), 0):
        (tmp_path / "file").write_bytes(length.to_bytes(8, "little") + content[8:])
        with pytest.raises(ValueError, match="a header of"):
            skinvert.load(tmp_path / "file")


def test_an_array_met_often_is_kept_once():
    reference = ["packed", "tensor", ["array", "a"], [0, 1]]
    content = {"root": ["dict", [["many", ["list", [reference] * 1000]]]], "objects": []}
    many = decode_state(content, {"a": np.zeros((600, 600))}, torch.device("cpu"))["many"]
    assert len({tensor.data_ptr() for tensor in many}) == 1


def test_an_array_in_many_orders_of_its_axes_is_kept_once():
    orders = [["packed", "tensor", ["array", "a"], list(axes)] for axes in itertools.permutations(range(4))]
    content = {"root": ["dict", [["many", ["list", orders]]]], "objects": []}
    array = np.arange(120.0).reshape(2, 3, 4, 5)
    many = decode_state(content, {"a": array}, torch.device("cpu"))["many"]
    assert len({tensor.data_ptr() for tensor in many}) == 1
    for tensor, order in zip(many, orders, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), array.transpose(np.argsort(order[3])))


@pytest.mark.parametrize("axes", [[0.0, 1.0], [False, True], "01"])
def test_axes_are_whole_numbers(axes):
    content = {"root": ["dict", [["one", ["packed", "tensor", ["array", "a"], axes]]]], "objects": []}
    with pytest.raises(ValueError, match="axes must be"):
        decode_state(content, {"a": np.zeros((2, 2))}, torch.device("cpu"))


def test_few_objects_are_not_reached_by_ways_without_end(tmp_path):
    # Blocks of blocks, all of them empty: 50 ways to each from the one above.
    def change(state, arrays):
        blocks = next(found for found in state["objects"] if found[0].endswith("BlockInverse"))
        below = next(i for i, found in enumerate(state["objects"]) if found is blocks)
        for _ in range(5):
            above = copy.deepcopy(blocks)
            next(pair for pair in above[1][1] if pair[0] == "inverses")[1] = ["list", [["object", below]] * 50]
            state["objects"].append(above)
            below = len(state["objects"]) - 1
        entry(state, "inverse_")[1] = ["object", below]

    with pytest.raises(ValueError, match="by many ways to one"):
        skinvert.load(crafted(tmp_path, change, fitted(on="net", blocks="layer")))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("parameter_names_", ["list", ["a", "b"]], "names of the parameters must be those of the layout"),
        ("hessian_perturbation_", 7.0, "λ of the inverse must be"),
    ],
)
def test_what_is_kept_twice_agrees(name, value, message, tmp_path):
    def change(state, arrays):
        entry(state, name)[1] = value

    with pytest.raises(ValueError, match=message):
        skinvert.load(crafted(tmp_path, change, fitted(on="net")))


@pytest.mark.parametrize("value", [3, ["list", []], ["dict", [["transform", 5]]], ["dict", [["predict", "pandas"]]]])
def test_the_container_of_outputs_is_one_of_scikit_learn_s(value, tmp_path):
    def change(state, arrays):
        state["root"][1] = [pair for pair in state["root"][1] if pair[0] != "_sklearn_output_config"]
        state["root"][1].append(["_sklearn_output_config", value])

    with pytest.raises(ValueError, match="_sklearn_output_config must be"):
        skinvert.load(crafted(tmp_path, change))


@pytest.mark.parametrize("levels", [40, 900, 100_000])
def test_a_deep_state_is_an_error(levels, tmp_path):
    fitted().save(tmp_path / "file")
    header, state, arrays = read(tmp_path / "file")
    text = json.dumps(state).replace('"random_state", null', '"random_state", ' + '["list", [' * levels + "]]" * levels)
    write(tmp_path / "file", header, text, arrays)
    with pytest.raises(ValueError, match="a state that cannot be read"):
        skinvert.load(tmp_path / "file")


# -- a fuzz of the decoded state ---------------------------------------------------------------------------------------

SAVED = [
    ("direct", "rows", {}),
    ("direct", "net", {"blocks": "layer"}),
    (Direct(rtol=1e-3), "net", {"params": ["0.*"], "curvature": "empirical_fisher"}),
    (Arnoldi(rank=3), "net", {}),
    (Nystroem(rank=3, random_state=1), "net", {"dtype": torch.float32}),
    ("diagonal", "net", {}),
    (KFAC(), "net", {"weight_decay": 0.1}),
    (EKFAC(), "net", {}),
    ("harmonic_mean", "net", {"curvature": "empirical_fisher"}),
    ("direct", "net", {"curvature": "empirical_fisher", "weight_decay": 0.1}),
    ("direct", "net", {"curvature": "hessian", "blocks": "layer"}),
]
ATOMS = [
    *(None, True, False, 0, 1, -1, 2, 3, 10**9, 10**30, 10**400, 0.0, -0.5, 1e-320, 1e308, float("nan"), float("inf")),
    *(
        "",
        "direct",
        "cpu",
        "cuda:7",
        "meta",
        "float32",
        "array0",
        "array1",
        "tensor",
        "dtype",
        "save",
        "os.system",
        "dict",
    ),
    *([], {}, ["list", []], ["dict", []], ["object", 0], ["object", 1], ["array", "array0"], FUNCTION),
    *(
        "methods.dense.CholeskyInverse",
        "operators.simple.DiagonalMatrix",
        "methods.spectral_inverse.SpectralInverse",
        "parameters.ParameterLayout",
    ),
]


def places(value, found):
    """Collect (container, key) of every part of a JSON value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        found.append((value, key))
        places(value[key], found)
    return found


def mutate(state, generator):
    """Change one to three parts: another's value, an atom, an exchange, a part less or twice."""
    for _ in range(generator.integers(1, 4)):
        found = places(state, [])
        (one, i), (other, j) = (found[k] for k in generator.integers(len(found), size=2))
        kind = generator.integers(4)
        if kind == 0:
            one[i] = copy.deepcopy(other[j])
        elif kind == 1:
            one[i] = copy.deepcopy(ATOMS[generator.integers(len(ATOMS))])
        elif kind == 2:
            one[i], other[j] = copy.deepcopy(other[j]), copy.deepcopy(one[i])
        elif isinstance(one, list) and generator.integers(2):
            one.insert(i, copy.deepcopy(one[i]))
        else:
            del one[i]


def outcomes(saved, trials, seed, tmp_path):
    """Return how many mutated files are errors; assert that the others give the same answer."""
    method, on, settings = saved
    generator, failed, path = np.random.default_rng(seed), 0, tmp_path / "file"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inverter = fitted(method, on, **settings)
        b = generator.standard_normal((2, inverter.n_features_in_))
        inverter.save(path)
        header, state, arrays = read(path)
        expected = answers(inverter, b)
        for _ in range(trials):
            changed = copy.deepcopy(state)
            mutate(changed, generator)
            write(path, header, changed, arrays)
            try:
                received = answers(skinvert.load(path).set_output(transform="default"), b)
            except ValueError as error:
                assert "must be" in str(error)
                failed += 1
            else:
                for one, other in zip(received, expected, strict=True):
                    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-8, err_msg=json.dumps(changed))
    return failed


def answers(inverter, b):
    """Return all that a file can answer of rows b, and claim of it."""
    x, info = inverter.solve(b)
    path = inverter.path(b, [0.05, 0.7])
    claims = [float(info["approximate"]), float(inverter.inverse_.positive_definite)]
    return x, path, inverter.inverse_transform(b), claims


@pytest.mark.parametrize("case", range(len(SAVED)))
def test_mutated_states_are_errors_or_change_nothing(case, tmp_path):
    assert outcomes(SAVED[case], 30, case, tmp_path) > 15


@pytest.mark.slow
@pytest.mark.parametrize("case", range(len(SAVED)))
def test_10_000_mutated_states(case, tmp_path):
    trials = -(-10_000 // len(SAVED))
    assert outcomes(SAVED[case], trials, 100 + case, tmp_path) > trials // 2
