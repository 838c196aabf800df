"""What is shipped: versions that agree, types, and an import that brings nothing heavy of its own."""

import json
import subprocess
import sys
from pathlib import Path

import skinvert

ROOT = Path(__file__).parents[1]
# What torch and scikit-learn bring by themselves, and what an import of skinvert must not add to.
HEAVY = {"dask", "IPython", "matplotlib", "narwhals", "pandas", "polars", "safetensors", "skops", "skorch", "sympy"}
PROGRAM = """
import json, sys, time
import numpy, scipy.linalg, scipy.sparse.linalg, scipy.stats, sklearn.base, sklearn.model_selection, torch
before, start = set(sys.modules), time.perf_counter()
import skinvert
seconds = time.perf_counter() - start
print(json.dumps([seconds, sorted({name.partition(".")[0] for name in set(sys.modules) - before})]))
"""


def test_the_citation_names_this_version():
    lines = (ROOT / "CITATION.cff").read_text(encoding="utf-8").splitlines()
    assert f"version: {skinvert.__version__}" in lines
    assert "license: BSD-3-Clause" in lines


def test_the_package_is_typed():
    assert (Path(skinvert.__file__).parent / "py.typed").is_file()


def test_an_import_brings_nothing_heavy():
    shown = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True)
    _, brought = json.loads(shown.stdout)
    assert HEAVY & set(brought) == set()
