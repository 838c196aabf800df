"""The house stands: every import in skinvert/ runs downward.

A *room* is a module or a sub-package directly under ``skinvert/``. The rules:

- A room stands in FLOORS; one that does not is an error.
- A room imports only from itself, from a lower floor, or from a room that FLOORS lists before it on its own
  floor. So there is no cycle, and no second table for who may use whom on one floor.
- FORBIDDEN pairs hold whatever the floors say.
- Imports inside skinvert are relative, and never leave it.
- Imports stand at the top of the file, or there under ``if TYPE_CHECKING:``. OPTIONAL packages, and they
  alone, are imported where they are used, since ``import skinvert`` must work without them.
- What else is imported is the standard library or a declared dependency.
- An ``__init__.py`` holds imports and literal dunder names: no logic.
"""

import ast
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from skinvert import HessianInverter

PACKAGE = Path(__file__).parents[1] / "skinvert"

FLOORS = {
    "_types": 0,
    "_namespaces": 0,
    "_progress": 0,
    "_callbacks": 0,
    "_autograd": 0,
    "_check": 0,
    "_memory": 0,
    "_storage": 0,
    "_checksum": 0,
    "_checkpoint": 0,
    "_distributed": 0,
    "_lazy": 0,
    "_state": 0,
    "_schema": 0,
    "_telling": 0,
    "_shown": 0,
    "_naming": 0,
    "reasons": 0,
    "results": 0,
    "parameters": 0,
    "_scaling": 0,
    "_rows": 0,
    "_fitting": 0,
    "_frames": 0,
    "_linear_map": 0,
    "operators": 1,
    "perturbation": 1.2,
    "models": 2,
    "data": 2,
    "curvature": 3.1,
    "solvers": 1.5,
    "methods": 3.2,
    "_arguments": 3.3,
    "system": 3.3,
    "registry": 3.3,
    "scores": 3.3,
    "encoding": 3.3,
    "answers": 3.3,
    "persistence": 3.3,
    "files": 3.3,
    "identity": 3.3,
    "checkpoint": 3.3,
    "columns": 3.3,
    "at_hand": 3.3,
    "covariance": 3.3,
    "posterior": 3.3,
    "summary": 3.3,
    "fitting": 3.3,
    "inverter": 4,
    "gradients": 4,
    "selection": 5,
    "metrics": 5,
    "plotting": 5,
    "influence": 5,
    "dask": 5,
    "testing": 5,
    "__init__": 6,
}
FORBIDDEN = {
    ("curvature", "methods"),
    ("methods", "curvature"),
    ("methods", "models"),
    ("methods", "data"),
    ("solvers", "methods"),
    ("solvers", "curvature"),
}
DEPENDENCIES = {"numpy", "psutil", "scipy", "sklearn", "torch", "tqdm"}
# skorch is installed with skinvert, but a machine without it can use everything else.
OPTIONAL = {"dask", "distributed", "matplotlib", "pandas", "polars", "pytest", "safetensors", "skops", "skorch"}


def test_imports_run_downward():
    assert PACKAGE.is_dir()
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("operators.py", "from .inverter import HessianInverter", "inverter is not below operators"),
        ("_memory.py", "from .parameters import blocks", "parameters is not below _memory"),
        ("operators.py", "def f():\n    from .models import torch", "models is not below operators"),
        ("inverter.py", "from . import __version__", "__init__ is not below inverter"),
        ("operators.py", "from . import data", "data is not below operators"),
        ("curvature/ggn.py", "from ..methods.cg import CG", "curvature may not import methods"),
        ("methods/cg.py", "from ..curvature import GGN", "methods may not import curvature"),
        ("methods/cg.py", "from .. import models", "methods may not import models"),
        ("methods/cg.py", "from ..data import batches", "methods may not import data"),
        ("curvature/ggn.py", "if TYPE_CHECKING:\n    from ..methods import CG", "may not import methods"),
        ("cellar.py", "", "cellar has no floor"),
        ("inverter.py", "from .cellar import wine", "cellar has no floor"),
        ("inverter.py", "from skinvert.operators import Dense", "must be relative"),
        ("inverter.py", "import skinvert.operators", "must be relative"),
        ("inverter.py", "from ..tests import oracle", "leaves skinvert"),
        ("inverter.py", "def f():\n    import numpy", "must be imported at the top"),
        ("inverter.py", "def f():\n    from .operators import Dense", "must be imported at the top"),
        ("inverter.py", "try:\n    import torch\nexcept ImportError: ...", "must be imported at the top"),
        ("plotting.py", "from matplotlib import pyplot", "matplotlib must be imported where it is used"),
        ("inverter.py", "import formulaic", "formulaic is not a declared dependency"),
        ("__init__.py", "if True:\n    x = 1", "no logic"),
        ("methods/__init__.py", "def find(): ...", "no logic"),
        ("__init__.py", "__version__ = version('skinvert')", "no logic"),
    ],
)
def test_a_violation_is_reported(tmp_path, path, source, expected):
    received = violations(build(tmp_path, {path: source}))
    assert [text for text in received if text.startswith(f"{path}:") and expected in text], received


def test_a_sound_house_is_left_alone(tmp_path):
    files = {
        "__init__.py": '"""Doc."""\nfrom .inverter import A\n__version__ = "0.1"\n__all__ = ["A"]',
        "_memory.py": "import math\nimport numpy as np\nfrom ._check import must_be",
        "methods/__init__.py": "from .cg import CG",
        "methods/cg.py": "from .base import Method\nfrom ..operators import Dense\nfrom .. import results",
        "models/skorch.py": "if TYPE_CHECKING:\n    from skorch import NeuralNet\n    from .torch import Model",
        "plotting.py": "def plot():\n    import matplotlib.pyplot as plt",
    }
    assert violations(build(tmp_path, files)) == []


def build(folder, files):
    for path, source in files.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(source, encoding="utf-8")
    return folder


def violations(package):
    """Every broken rule under ``package``, as "file:line: what"."""
    found = []
    for file in sorted(package.rglob("*.py")):
        path = file.relative_to(package)
        tree = ast.parse(file.read_text(encoding="utf-8"))
        found += [f"{path.as_posix()}:{line}: {what}" for line, what in _violations_of_file(path, tree)]
    return found


def _violations_of_file(path, tree):
    room = path.parts[0].removesuffix(".py")
    if room not in FLOORS:
        return [(1, _no_floor(room))]
    found = _logic(tree) if path.name == "__init__.py" else []
    for node, at_top in _imports(tree):
        for level, name in _imported(node):
            what = _inside(path, room, level, name, at_top) if level else _outside(name, at_top)
            found += [(node.lineno, text) for text in what]
    return found


def _inside(path, room, level, name, at_top):
    """The broken rules of a relative import: ``level`` dots, then ``name``."""
    # Each dot leaves a folder; what is left of the path, and then the name, is the target.
    if level > len(path.parts):
        return [f"the import of {name} leaves skinvert"]
    parts = [*path.parts[: len(path.parts) - level], *name.split(".")]
    target = "__init__" if parts[0].startswith("__") else parts[0]

    found = [] if at_top else [f"{target} must be imported at the top of the file"]
    if target not in FLOORS:
        found.append(_no_floor(target))
    elif (room, target) in FORBIDDEN:
        found.append(f"{room} may not import {target}")
    elif not _is_below(target, room):
        found.append(f"{target} is not below {room}")
    return found


def _outside(name, at_top):
    """The broken rules of an absolute import."""
    package = name.split(".")[0]
    if package == "skinvert":
        return [f"the import of {name} must be relative"]
    if package in OPTIONAL:
        return [f"{package} must be imported where it is used"] if at_top else []
    if package not in DEPENDENCIES | sys.stdlib_module_names:
        return [f"{package} is not a declared dependency"]
    return [] if at_top else [f"{package} must be imported at the top of the file"]


def _is_below(target, room):
    order = list(FLOORS)
    if FLOORS[target] == FLOORS[room]:
        return order.index(target) <= order.index(room)
    return FLOORS[target] < FLOORS[room]


def _no_floor(room):
    return f"{room} has no floor: add it to FLOORS"


def _imports(tree):
    """Every import, and whether it stands at the top of the file."""
    top = set(tree.body)
    # Under TYPE_CHECKING nothing is imported: an optional package may stand there, any other too.
    typing = {n for s in tree.body if isinstance(s, ast.If) and _is_type_checking(s) for n in ast.walk(s)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [name.split(".")[0] for level, name in _imported(node) if not level]
            optional = bool(names) and all(name in OPTIONAL for name in names)
            yield node, node in top or (node in typing and not optional)


def _is_type_checking(node):
    return ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _imported(node):
    """(dots, dotted name) of each thing that an import statement names."""
    if isinstance(node, ast.Import):
        return [(0, alias.name) for alias in node.names]
    if node.module:
        return [(node.level, node.module)]
    return [(node.level, alias.name) for alias in node.names]


def _logic(tree):
    found = []
    for index, node in enumerate(tree.body):
        docstring = index == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if not (docstring or isinstance(node, ast.Import | ast.ImportFrom) or _is_literal_dunder(node)):
            found.append((node.lineno, "no logic in __init__.py"))
    return found


def _is_literal_dunder(node):
    if not (isinstance(node, ast.Assign) and all(ast.unparse(t).startswith("__") for t in node.targets)):
        return False
    try:
        ast.literal_eval(node.value)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(
    ("method", "rooms"),
    [
        ("direct", ["inverter", "methods", "solvers", "operators"]),
        ("cg", ["inverter", "methods", "solvers", "operators", "curvature"]),
    ],
)
def test_the_rooms_above_the_foundation_that_rows_pass(method, rooms):
    net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    X, y = torch.randn(20, 4, dtype=torch.float64), torch.arange(20) % 3
    inverter = HessianInverter(method, 1.0, curvature="ggn", loss="cross_entropy").fit(net, (X, y))
    b = torch.randn(2, inverter.n_features_in_, dtype=torch.float64)
    assert _rooms_that_hold(b.shape, lambda: inverter.solve(b)) == rooms


def _rooms_that_hold(shape, call):
    """Return the rooms with a function that is given rows of this shape, in the order of the first such call."""
    found = {}

    def note(frame, event, _):
        package, _, module = frame.f_globals.get("__name__", "").partition(".")
        room = module.partition(".")[0]
        if event == "call" and package == PACKAGE.name and FLOORS.get(room, 0) > 0:
            given = [part for value in frame.f_locals.values() for part in (value if _is_pair(value) else [value])]
            if any(isinstance(value, torch.Tensor | np.ndarray) and value.shape == shape for value in given):
                found.setdefault(room)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return list(found)


def _is_pair(value):
    return type(value) in (list, tuple)
