"""Run many cases, each in every variant, and list every failure, each kind once.

``PYTHONPATH=.:tests python -m fuzz.sweep 500 0`` runs 500 cases of seed 0 in all variants, ``... 500 0 thread`` in one.
"""

import sys
import traceback
import warnings
from collections import Counter

from fuzz import scores
from fuzz.cases import VARIANTS, cases, variants_of
from fuzz.runner import Changed, Raw, Silent, run
from hypothesis import HealthCheck, Phase, given, seed, settings


class Tally:
    """What became of the cases of one variant, and every kind of failure with its cases."""

    def __init__(self):
        self.outcomes, self.refusals, self.failures = Counter(), Counter(), {}

    def add(self, case, shared, run=run):
        outcome = self._outcome(case, shared, run)
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
        print(f"{name}: {sum(self.outcomes.values())} cases, {dict(self.outcomes)}")
        for text, number in self.refusals.most_common(10):
            print("   refused", number, text)
        for key, found in self.failures.items():
            print(f"--- {len(found)} × {key}\n      {found[0][0]}\n      {found[0][1]!r}")


def main(count, start, names):
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
        for name, variant in variants_of(case).items():
            if name in tallies:
                tallies[name].add(variant, shared)
        if "scores" in tallies:
            tallies["scores"].add(case, shared, scores.run)

    one()
    for name, tally in tallies.items():
        tally.report(name)
    return sum(len(tally.failures) for tally in tallies.values())


if __name__ == "__main__":
    sys.exit(bool(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] or [*VARIANTS, "scores"])))
