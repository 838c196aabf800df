"""SIGKILL at any moment: the next run goes on, and has to the last bit what a run without interruptions has."""

import json
import os
import subprocess
import sys

import pytest

FOUR = ["ekfac", "arnoldi", "nystroem", "influence"]
SCORES = ["scores", "newton"]


def outcomes(folder, *arguments):
    """Return what is told of jobs that were killed until they finished."""
    command = [sys.executable, "-m", "faults.killed", str(folder), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(told, finishes, kills):
    assert told["correct"] == told["finishes"] >= finishes, told
    assert told["kills"] >= kills, told
    # Nothing that a killed write left outlives the next one.
    assert told["left"] == 0, told


@pytest.mark.slow
def test_jobs_go_on_after_a_kill(tmp_path):
    found = outcomes(tmp_path, 40, 1, 1, 0, *FOUR)
    assert [told["job"] for told in found] == FOUR
    for told in found:
        check(told, 1, 0)
    assert sum(told["kills"] for told in found) >= 2, found


@pytest.mark.parametrize("job", ["scores", pytest.param("newton", marks=pytest.mark.slow)])
def test_scores_go_on_after_a_kill(job, tmp_path):
    (told,) = outcomes(tmp_path, 40, 1, 3, 0, job)
    check(told, 1, 1)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("job", [*FOUR, "kfac", *SCORES])
def test_twenty_kills_and_twenty_finishes(job, tmp_path):
    (told,) = outcomes(tmp_path, 800, 20, 3, 1, job)
    print(told)
    check(told, 20, 20)
    # Not by chance: the last run of many had less to do than a whole one.
    assert told["resumed"] >= 2, told
