"""Jobs that are killed until they finish: ``python -m faults.killed FOLDER ROWS FINISHES KILLS SEED JOB...``.

They are killed at random moments, and each run is a fork of one prepared process. What the last run of a job has must
be, to the last bit, what a run without interruptions has. A line of JSON a job says how it went.
"""

import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import nn

from skinvert import HessianInverter, InfluenceFunction, checkpoint
from skinvert.influence.output import Destination
from skinvert.methods import EKFAC, KFAC, Arnoldi, Nystroem
from skinvert.solvers import sketch

# Often enough for jobs of a second or two.
checkpoint.EVERY, checkpoint.SHARE = 0.02, 0.5
# Steps of a few rows, so that many kills come between two of them.
sketch.AT_ONCE = 8

D, C, HIDDEN = 20, 5, 30
METHODS = {"kfac": KFAC(), "ekfac": EKFAC(), "arnoldi": Arnoldi(rank=20), "nystroem": Nystroem(rank=300)}
# Scores with a checkpoint, in float32, by several batches of training rows and several chunks of test rows.
SCORES = {"scores": {}, "newton": {"removal": "newton", "measurement": "margin"}}
JOBS = [*METHODS, "influence", *SCORES]


def problem(rows):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(D, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, C))
    return net, torch.randn(rows, D), torch.randint(C, (rows,))


def run(job, folder, rows):
    """Do a job, with its checkpoint in ``folder``; return its result."""
    net, X, y = problem(rows)
    settings = {"curvature": "ggn", "loss": "cross_entropy", "batch_size": 8}
    if job == "influence":
        inverter = HessianInverter("kfac", 1e-1, loss="cross_entropy", check_residual=False)
        influence = InfluenceFunction(inverter, memory=2**19).fit(net, (X, y))
        return np.array(influence.transform((X, y), out=folder / "scores.npy"))
    if job in SCORES:
        return scores(folder, net, X, y, SCORES[job])
    inverter = HessianInverter(METHODS[job], 1e-1, checkpoint=folder / "fit", **settings).fit(net, (X, y))
    # Nothing of the file is left once there is a result.
    assert not (folder / "fit").exists()
    b = torch.randn(3, inverter.n_features_in_, generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return inverter.transform(b).numpy()


def scores(folder, net, X, y, settings):
    """Return scores of a few test rows, which one pass over the training rows meets."""
    inverter = HessianInverter("kfac", 1e-1, loss="cross_entropy", batch_size=8)
    count = 8 if settings else 64
    test = torch.randn(count, D, generator=torch.Generator().manual_seed(1)), torch.arange(count) % C
    settings = {"batch_size": 4, "memory": 2**18, **settings}
    influence = InfluenceFunction(inverter, checkpoint=folder / "scores", **settings).fit(net, (X, y))
    found = influence.transform(test).numpy()
    assert not (folder / "scores").exists()
    return found


def counted():
    """Count the steps that a run does itself."""
    steps = [0]

    def counting(function):
        def inside(*args):
            steps[0] += 1
            return function(*args)

        return inside

    checkpoint.CheckpointFile.keep = counting(checkpoint.CheckpointFile.keep)
    Destination.write = counting(Destination.write)
    return steps


def forked(job, folder, rows):
    """Start a run in a process of its own, and return its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        steps = counted()
        result = run(job, folder, rows)
        np.save(folder / "part.npy", result)
        (folder / "steps").write_text(str(steps[0]))
        # At once: the result is there or it is not.
        os.replace(folder / "part.npy", folder / "result.npy")
        status = 0
    finally:
        os._exit(status)


def ended(child, seconds=float("inf")):
    """Return the seconds that a run took of a processor; None where it took more, and was killed."""
    while True:
        number, _, used = os.wait4(child, os.WNOHANG)
        if number:
            return used.ru_utime + used.ru_stime
        # By its own clock: others may take the processor for a while.
        if sum(psutil.Process(child).cpu_times()[:2]) >= seconds:
            os.kill(child, signal.SIGKILL)
            os.wait4(child, 0)
            return None
        time.sleep(0.001)


def killed(job, folder, rows, finishes, kills, seed):
    """Let a job finish so often, after as many kills each time or fewer; return what is to be told of it.

    A run may be faster than the one that was timed, and end before its kill: then it is done more often, up to three
    times as often, until it has been killed as many times.
    """
    rng, whole = random.Random(seed), folder / "whole"
    whole.mkdir(parents=True)
    seconds = ended(forked(job, whole, rows))
    expected, steps = np.load(whole / "result.npy"), int((whole / "steps").read_text())
    counts = dict.fromkeys(("finishes", "kills", "correct", "resumed", "left"), 0)
    told = {"job": job, "seconds": round(seconds, 2), "steps": steps, **counts}
    while told["finishes"] < finishes or (told["kills"] < finishes and told["finishes"] < 3 * finishes):
        part = folder / str(told["finishes"])
        part.mkdir()
        for _ in range(rng.randint(1, kills)):
            if ended(forked(job, part, rows), rng.uniform(0, 0.9 * seconds)) is not None:
                break
            told["kills"] += 1
        else:
            ended(forked(job, part, rows))
        told["finishes"] += 1
        told["correct"] += np.array_equal(np.load(part / "result.npy"), expected)
        # The last run had less to do.
        told["resumed"] += int((part / "steps").read_text()) < steps
        told["left"] += len(list(part.glob(".skinvert-*")))
    return told


if __name__ == "__main__":
    torch.set_num_threads(1)
    root, *numbers = sys.argv[1:6]
    for name in sys.argv[6:]:
        print(json.dumps(killed(name, Path(root) / name, *map(int, numbers))), flush=True)
