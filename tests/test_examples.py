"""The examples run as scripts, and show what they claim."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_mislabelled_digits_are_found(tmp_path):
    # Chance is 5 % and 10 %.
    text = printed("mislabelled_digits", tmp_path)
    figures = figures_of(text)
    assert [name for name, _, _ in figures] == ["loss", "self-influence"] * 2
    for _, precision, found in figures:
        assert precision > 60
        assert found > 85
    repaired = dict(re.findall(r"read without ten rows, (by .*?) *: (\d+) of \d+$", text, re.MULTILINE))
    assert int(repaired["by what harms each"]) > max(int(repaired["by loss"]), int(repaired["by self-influence"]))
    assert str(tmp_path / "output" / "mislabelled_digits.png") in text


def test_pipelines_agree(tmp_path):
    found = dict(re.findall(r"^(\w+) .*: ([+-]\d\.\d+)$", printed("pipelines", tmp_path), re.MULTILINE))
    assert float(found["projected"]) > 0.8
    assert float(found["TRAK"]) > 0.2


@pytest.mark.slow
def test_dask_writes_what_memory_holds(tmp_path):
    text = printed("dask_zarr", tmp_path)
    assert "898 × 899 scores in 9 blocks on disk" in text
    assert float(re.search(r"as in memory to (\S+)", text)[1]) < 1e-10


def printed(name, folder):
    """Return what an example prints; it writes its picture."""
    script = shutil.copy(EXAMPLES / f"plot_{name}.py", folder)
    # -W error: an example runs without a warning. Agg: it needs no display.
    environment = {**os.environ, "MPLBACKEND": "Agg", "PYTHONIOENCODING": "utf-8"}
    run = subprocess.run(
        [sys.executable, "-W", "error", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    assert (folder / "output" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return run.stdout


def figures_of(text):
    found = re.findall(
        r"^ +(\S+) +precision at 5 %: +(\S+)%  flips found in the top 10 %: +(\S+)%$", text, re.MULTILINE
    )
    return [(name, float(precision), float(share)) for name, precision, share in found]
