"""One fitted inverter in two threads, in forked and spawned processes, in joblib's: the numbers that it has alone."""

import multiprocessing
import threading

import numpy as np
import pytest
import sklearn
import torch
from facts import EVERY, SEMIDEFINITE, TIGHT
from joblib import Parallel, delayed
from sklearn.base import clone
from torch import nn

from skinvert import HessianInverter

SHOTS, WORKERS = 2, 2


def problem():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return net, (torch.randn(24, 4, dtype=torch.float64), torch.randint(3, (24,)))


def fitted(name, batch_size=4):
    net, data = problem()
    settings = {"curvature": SEMIDEFINITE[name], "loss": "cross_entropy", "batch_size": batch_size}
    return HessianInverter(clone(TIGHT[name]), 3.0, **settings).fit(net, data)


def sides(count):
    """Return right-hand sides (2, p), others for each."""
    return [np.random.default_rng(seed).standard_normal((2, 51)) for seed in range(count)]


def answers(inverter, b):
    """Return all that is asked of an inverter, as arrays."""
    return [inverter.transform(b), *inverter.path(b, [3.0]), inverter.inverse_transform(b)]


def check_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)


def in_threads(inverter, Bs):
    """Return the answers of threads that begin together, one for each of the right-hand sides."""
    barrier, found, memory = threading.Barrier(len(Bs)), [None] * len(Bs), sklearn.get_config()["working_memory"]

    def work(place):
        barrier.wait()
        try:
            # scikit-learn's configuration is a thread's own.
            with sklearn.config_context(working_memory=memory):
                found[place] = answers(inverter, Bs[place])
        except BaseException as error:
            found[place] = error

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(Bs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one in found:
        if isinstance(one, BaseException):
            raise one
    return found


@pytest.mark.parametrize("name", EVERY)
def test_two_threads(name):
    Bs = sides(WORKERS)
    alone = [answers(fitted(name), b) for b in Bs]
    for _ in range(SHOTS):
        # Fitted anew: the threads meet in what an inverter makes at its first solve, and keeps.
        check_same(in_threads(fitted(name), Bs), alone)


@pytest.mark.parametrize("name", ["cg", "direct"])
def test_two_threads_over_data_that_are_read_anew(name):
    Bs = sides(WORKERS)
    with sklearn.config_context(working_memory=0.0005):
        alone = [answers(fitted(name), b) for b in Bs]
        for _ in range(SHOTS):
            check_same(in_threads(fitted(name), Bs), alone)


def in_child(context, work, *arguments):
    """Return what ``work`` returns in a process of its own."""
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_sent, args=(sender, work, arguments))
    process.start()
    sender.close()
    found = receiver.recv()
    process.join()
    assert process.exitcode == 0
    return found


def _sent(sender, work, arguments):
    torch.set_num_threads(1)
    sender.send(work(*arguments))


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


FORK = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")


@FORK
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", EVERY)
def test_a_forked_process(name):
    inverter, b = fitted(name), sides(1)[0]
    # With what the parent has made by then: graphs, and a second solve of it at the same time.
    expected = answers(inverter, b)
    check_same([in_child(multiprocessing.get_context("fork"), answers, inverter, b)], [expected])
    check_same([answers(inverter, b)], [expected])


@pytest.mark.usefixtures("one_thread")
def test_a_spawned_process():
    inverters, b = [fitted(name) for name in EVERY], sides(1)[0]
    expected = [answers(inverter, b) for inverter in inverters]
    check_same(in_child(multiprocessing.get_context("spawn"), _all, inverters, b), expected)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_processes_of_joblib():
    inverters, Bs = [fitted(name) for name in EVERY], sides(WORKERS)
    with Parallel(n_jobs=WORKERS, backend="loky") as parallel:
        for b in Bs:
            expected = [answers(inverter, b) for inverter in inverters]
            check_same(parallel(delayed(answers)(inverter, b) for inverter in inverters), expected)


def _all(inverters, b):
    return [answers(inverter, b) for inverter in inverters]


@FORK
@pytest.mark.usefixtures("one_thread")
def test_fits_in_forked_processes_of_a_process_with_threads():
    # A fit in a child of a process that has solved in threads.
    inverter, Bs = fitted("cg"), sides(WORKERS)
    in_threads(inverter, Bs)
    found = in_child(multiprocessing.get_context("fork"), _fitted_and_solved, Bs[0])
    check_same([found], [_fitted_and_solved(Bs[0])])


def _fitted_and_solved(b):
    return answers(fitted("ekfac"), b)
