"""The page on several processes is a script that torchrun runs."""

import subprocess
import sys

import pytest
from rank_calls import PAGE, script_of
from ranks import values


def test_the_page_runs(two):
    assert "HessianInverter" in script_of(PAGE.read_text(encoding="utf-8"))
    values(two["the_page"])


@pytest.mark.slow
def test_torchrun_runs_the_page(tmp_path):
    script = tmp_path / "distributed.py"
    script.write_text(script_of(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
