"""The examples run as scripts, and show what they claim."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_mislabelled_digits_are_found(tmp_path):
    script = shutil.copy(EXAMPLES / "plot_mislabelled_digits.py", tmp_path)
    # -W error: the demo runs without a warning. Agg: it needs no display.
    environment = {**os.environ, "MPLBACKEND": "Agg", "PYTHONIOENCODING": "utf-8"}
    run = subprocess.run(
        [sys.executable, "-W", "error", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=240,
    )
    assert run.returncode == 0, run.stderr

    # Chance is 5 % and 10 %.
    figures = figures_of(run.stdout)
    assert [name for name, _, _ in figures] == ["loss", "self-influence"] * 2
    for _, precision, found in figures:
        assert precision > 60
        assert found > 85

    picture = tmp_path / "output" / "mislabelled_digits.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def figures_of(text):
    found = re.findall(
        r"^ +(\S+) +precision at 5 %: +(\S+)%  flips found in the top 10 %: +(\S+)%$", text, re.MULTILINE
    )
    return [(name, float(precision), float(share)) for name, precision, share in found]
