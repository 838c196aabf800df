"""What is shipped: versions that agree, types, and an import that brings nothing heavy of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import skinvert

ROOT = Path(__file__).parents[1]
# What torch and scikit-learn bring by themselves, and what an import of skinvert must not add to.
HEAVY = {"dask", "IPython", "matplotlib", "narwhals", "pandas", "polars", "safetensors", "skops", "skorch", "sympy"}
PROGRAM = """
import json, sys, time
import numpy, scipy.linalg, scipy.sparse.linalg, scipy.stats, sklearn.base, sklearn.model_selection, torch
before, start = set(sys.modules), time.process_time()
import skinvert
seconds = time.process_time() - start
print(json.dumps([seconds, sorted({name.partition(".")[0] for name in set(sys.modules) - before})]))
"""


def test_the_citation_names_this_version():
    lines = (ROOT / "CITATION.cff").read_text(encoding="utf-8").splitlines()
    assert f"version: {skinvert.__version__}" in lines
    assert "license: BSD-3-Clause" in lines


def test_the_package_is_typed():
    assert (Path(skinvert.__file__).parent / "py.typed").is_file()


def test_an_import_brings_nothing_heavy():
    _, brought = imported({})
    assert HEAVY & set(brought) == set()


@pytest.mark.benchmark
def test_an_import_takes_less_than_half_a_second(tmp_path):
    # Compiled beforehand, as an installer leaves it.
    compiled = {"PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": ""}
    imported(compiled)
    assert min(imported(compiled)[0] for _ in range(3)) < 0.5


def imported(settings):
    """Return the seconds that an import takes beyond torch and scikit-learn, and the packages that it brings."""
    environment = os.environ | settings
    command = [sys.executable, "-c", PROGRAM]
    shown = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return json.loads(shown.stdout)
