"""Newcomers' jobs: each is a script with at most ten lines of skinvert, and holds its answer against something else."""

import ast
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
SCRIPTS = sorted(FOLDER.glob("*_*.py"))
SLOW = {"large_network"}
PART = re.compile(r"^# begin skinvert\n(.*?)^# end skinvert\n", re.MULTILINE | re.DOTALL)
NAMES = [path.stem for path in SCRIPTS if not path.stem.startswith("test_")]


def test_there_are_seven():
    assert len(NAMES) == 7
    assert set(NAMES) >= SLOW


@pytest.mark.parametrize("name", NAMES)
def test_ten_lines_of_skinvert(name):
    source = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    (part,) = PART.findall(source)
    imports = [node for node in ast.parse(source).body if "skinvert" in (getattr(node, "module", None) or "")]
    assert imports
    lines = sum(node.end_lineno - node.lineno + 1 for node in imports) + sum(map(bool, part.split("\n")))
    assert lines <= 10
    # What it gave is compared elsewhere, but nothing is imported or called there.
    assert source.count("import skinvert") == 0
    called = {alias.asname or alias.name for node in imports for alias in node.names}
    elsewhere = ast.walk(ast.parse(PART.sub("", source)))
    assert called.isdisjoint(node.id for node in elsewhere if isinstance(node, ast.Name))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SLOW])
def test_journey(name):
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", sorted(SLOW))
def test_long_journey(name):
    # In a process of its own, whose peak of memory is its own.
    command = [sys.executable, "-W", "error", str(FOLDER / f"{name}.py")]
    run = subprocess.run(command, env=os.environ, capture_output=True, encoding="utf-8", timeout=1200)
    assert run.returncode == 0, run.stderr
    print(run.stdout)
