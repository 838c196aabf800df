"""The examples run as scripts, and show what they claim."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from skinvert import InversionMethod

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.slow
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


@pytest.mark.slow
def test_pipelines_agree(tmp_path):
    found = dict(re.findall(r"^(\w+) .*: ([+-]\d\.\d+)$", printed("pipelines", tmp_path), re.MULTILINE))
    assert float(found["projected"]) > 0.8
    assert float(found["TRAK"]) > 0.2


@pytest.mark.slow
def test_dask_writes_what_memory_holds(tmp_path):
    text = printed("dask_zarr", tmp_path)
    assert "898 × 899 scores in 9 blocks on disk" in text
    assert float(re.search(r"as in memory to (\S+)", text)[1]) < 1e-10


@pytest.mark.slow
def test_every_method_is_shown(tmp_path):
    text = printed("methods_error_against_time", tmp_path)
    lines = [line.split(maxsplit=1) for line in text.splitlines()]
    errors = {name: [float(error) for error in re.findall(r"s: (\S+)", points)] for name, points in lines}
    assert set(errors) == {str(each.value) for each in InversionMethod}
    assert max(errors["direct"] + errors["auto"]) < 1e-12
    # More iterations, a larger rank, a smaller tolerance: a smaller error, the more the better.
    growing = {name: found for name, found in errors.items() if len(found) > 1}
    assert set(growing) == {"cg", "minres", "arnoldi", "nystroem", "lissa"}
    assert all((np.diff(found) < 0).all() for found in growing.values())
    assert max(errors["cg"][-1], errors["minres"][-1]) < 1e-7


@pytest.mark.slow
def test_numbers_of_the_whole_test_set_are_mended(tmp_path):
    blocks = printed("metrics", tmp_path).strip().split("\n\n")
    assert len(blocks) == 3
    for block, sign in zip(blocks, (1, 1, -1), strict=True):
        start, *found = [float(number) for number in re.findall(r"(-?\d+\.\d{3})(?:;|$)", block, re.MULTILINE)]
        trained, by_sum, by_newton, at_random = found
        # Scores find what chance does not, and Newton's step foretells it better than the sum, or as well.
        assert sign * (trained - start) > 5 * abs(at_random - start)
        assert abs(by_newton - trained) < max(abs(by_sum - trained), 0.02)


@pytest.mark.slow
def test_sentences_that_help_are_found(tmp_path):
    text = printed("transformer", tmp_path)
    lines = re.findall(r"^without the (.*?) +(\d.*)$", text, re.MULTILINE)
    losses = {name: [float(loss) for loss in found.split()] for name, found in lines}
    helpful, harmful, chance = (np.array(losses[name]) for name in ("most helpful", "most harmful", "at random"))
    assert helpful[0] == harmful[0] == chance[0]
    assert (helpful[1:] > 2 * chance[1:]).all()
    assert (harmful[1:] < 0.8 * chance[1:]).all()


@pytest.mark.slow
def test_the_ladder_descends(tmp_path):
    text = printed("hessian_ladder", tmp_path)
    found = re.findall(r"^(.*?)  +LDS (\S+), less Hessian's (\S+), r = (\S+)$", text, re.MULTILINE)
    assert [name for name, *_ in found] == ["Hessian", "GGN", "GGN, blocks", "EKFAC", "KFAC"]
    scores = np.array([float(score) for _, score, _, _ in found])
    assert scores.min() > 0.4
    # The last two are alike.
    assert (np.diff(scores[:4]) < 0).all()
    assert abs(scores[4] - scores[3]) < 0.02


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
