"""The recipes of CONTRIBUTING are followed to the letter, each in a copy of the package, and the kit is run on each."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A heading, then what to write where: blocks that open with the file's name in a comment, and end with the kit.
BLOCK = re.compile(r"^```python\n# (\S+\.py)(?: \((added)\))?\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def recipes():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    parts = re.split(r"^## How to add ", text, flags=re.MULTILINE)[1:]
    return {part.splitlines()[0].split()[-1]: BLOCK.findall(part) for part in parts}


def test_there_are_four_recipes():
    assert list(recipes()) == ["method", "curvature", "loss", "model"]


@pytest.mark.parametrize(
    "name", ["method", "curvature", *(pytest.param(name, marks=pytest.mark.slow) for name in ("loss", "model"))]
)
def test_a_recipe_passes_the_kit(name, tmp_path):
    shutil.copytree(ROOT / "skinvert", tmp_path / "skinvert", ignore=shutil.ignore_patterns("__pycache__"))
    *files, (check, _, code) = recipes()[name]
    assert check == "check.py"
    new = [path for path, added, _ in files if not added]
    assert len(new) == 1, "one file is written"
    for path, added, text in files:
        place = tmp_path / path
        assert place.exists() == bool(added)
        place.write_text((place.read_text() + "\n" + text) if added else text)
    (tmp_path / check).write_text(code)
    done = subprocess.run(
        [sys.executable, "-W", "error", check],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("passed")
