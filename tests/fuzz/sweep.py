"""Run many cases, each in every variant or a share of them, and list every failure, each kind once.

``PYTHONPATH=.:tests python -m fuzz.sweep 500 0`` runs 500 cases of seed 0 in all variants, ``... 500 0 thread`` in one.
Each 80 cases have a seed of their own, from the given one on, and run in one of ``--jobs`` processes.
"""

import argparse
import multiprocessing
import sys
import time
import traceback
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed

from fuzz import pool
from fuzz.cases import cases
from fuzz.runner import Changed, Raw, Silent
from fuzz.variants import VARIANTS, is_run
from hypothesis import HealthCheck, Phase, given, seed, settings

# Cases of one seed.
SHARD = 80


class Tally:
    """What became of the cases of one variant, and every kind of failure with its cases."""

    def __init__(self):
        self.outcomes, self.refusals, self.failures = Counter(), Counter(), {}
        self.seconds = 0.0

    def add(self, case, shared, run):
        start = time.process_time()
        outcome = self._outcome(case, shared, run)
        self.seconds += time.process_time() - start
        refused = outcome.startswith("refused")
        self.outcomes["refused" if refused else outcome] += 1
        if refused:
            self.refusals[outcome[9:90]] += 1

    def _outcome(self, case, shared, run):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return run(case, shared)
        except (Silent, Raw, Changed) as error:
            kind, first = type(error).__name__, str(error).splitlines()[0]
            subject = first[:100] if kind == "Raw" else f"{case.method} {case.curvature} {case.layers} {case.loss}"
            self._fail(f"{kind} {subject}", first[:300], case)
            return kind
        except Exception as error:
            kind = f"harness: {type(error).__name__}"
            self._fail(f"{kind} {traceback.format_exc().splitlines()[-3:]}", str(error)[:200], case)
            return kind

    def _fail(self, key, text, case):
        self.failures.setdefault(key, []).append((text, case))

    def merge(self, other):
        self.outcomes += other.outcomes
        self.refusals += other.refusals
        self.seconds += other.seconds
        for key, found in other.failures.items():
            self.failures.setdefault(key, []).extend(found)

    def report(self, name):
        print(f"{name}: {sum(self.outcomes.values())} cases, {self.seconds:.0f} s, {dict(self.outcomes)}")
        for text, number in self.refusals.most_common(10):
            print("   refused", number, text)
        for key, found in self.failures.items():
            print(f"--- {len(found)} × {key}\n      {found[0][0]}\n      {found[0][1]!r}")


def shard(count, start, names):
    """Run so many cases of one seed in each of the ways of these names; return what became of them."""
    tallies = {name: Tally() for name in names}

    @seed(start)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(cases())
    def one(case):
        shared = {}
        for name, tally in tallies.items():
            if is_run(name, case):
                tally.add(case, shared, VARIANTS[name])

    try:
        one()
    finally:
        pool.close()
    return tallies


def main(count, start, names, jobs):
    """Run so many cases from a seed on; return how many kinds of failures there are."""
    tallies, began = {name: Tally() for name in names}, time.monotonic()
    sizes = [min(SHARD, count - done) for done in range(0, count, SHARD)]
    # A process for each shard: what one leaves behind is not the next one's.
    settings = {"mp_context": multiprocessing.get_context("spawn"), "max_tasks_per_child": 1}
    with ProcessPoolExecutor(jobs, **settings) as processes:
        futures = {processes.submit(shard, size, start + i, names): start + i for i, size in enumerate(sizes)}
        for future in as_completed(futures):
            for name, tally in future.result().items():
                if tally.failures:
                    tally.report(f"seed {futures[future]}, {name}")
                tallies[name].merge(tally)
            runs = sum(sum(tally.outcomes.values()) for tally in tallies.values())
            print(f"{runs:,} runs, {time.monotonic() - began:,.0f} s", file=sys.stderr, flush=True)
    for name, tally in tallies.items():
        tally.report(name)
    total = sum((tally.outcomes for tally in tallies.values()), Counter())
    print(f"all: {sum(total.values()):,} runs, {dict(total)}")
    return sum(len(tally.failures) for tally in tallies.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", type=int)
    parser.add_argument("seed", type=int)
    parser.add_argument("names", nargs="*", metavar="way", help=f"of {', '.join(VARIANTS)}; all")
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    sys.exit(bool(main(args.cases, args.seed, args.names or [*VARIANTS], args.jobs)))
