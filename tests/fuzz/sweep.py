"""Run many cases, each in every variant or a share of them, and list every failure, each kind once.

``PYTHONPATH=.:tests python -m fuzz.sweep 500 0`` runs 500 cases of seed 0 in all variants, ``... 500 0 thread`` in one.
"""

import sys
import time
import traceback
import warnings
from collections import Counter

from fuzz import pool
from fuzz.cases import cases
from fuzz.runner import Changed, Raw, Silent
from fuzz.variants import VARIANTS, is_run
from hypothesis import HealthCheck, Phase, given, seed, settings


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

    def report(self, name):
        print(f"{name}: {sum(self.outcomes.values())} cases, {self.seconds:.0f} s, {dict(self.outcomes)}")
        for text, number in self.refusals.most_common(10):
            print("   refused", number, text)
        for key, found in self.failures.items():
            print(f"--- {len(found)} × {key}\n      {found[0][0]}\n      {found[0][1]!r}")


def main(count, start, names):
    """Run so many cases from a seed in each of the ways of these names; return how many kinds of failures there are."""
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

    one()
    pool.close()
    for name, tally in tallies.items():
        tally.report(name)
    return sum(len(tally.failures) for tally in tallies.values())


if __name__ == "__main__":
    sys.exit(bool(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] or [*VARIANTS])))
