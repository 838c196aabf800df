"""Run many cases and list every failure, each kind once: ``PYTHONPATH=.:tests python -m fuzz.sweep 500 0 plain``."""

import sys
import traceback
import warnings
from collections import Counter

from fuzz.cases import VARIANTS, cases
from fuzz.runner import Changed, Raw, Silent, run
from hypothesis import HealthCheck, Phase, given, seed, settings


def main(count, start, variant):
    outcomes, failures = Counter(), {}

    @seed(start)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(cases(**VARIANTS[variant]))
    def one(case):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                outcome = run(case)
        except (Silent, Raw, Changed) as error:
            kind = type(error).__name__
            key = (
                f"{kind} {str(error).splitlines()[0][:100]}"
                if kind == "Raw"
                else f"{kind} {case.method} {case.curvature} {case.layers} {case.loss}"
            )
            failures.setdefault(key, []).append((str(error).splitlines()[0][:300], case))
            outcome = kind
        except Exception as error:
            outcome = f"harness: {type(error).__name__}"
            failures.setdefault(f"{outcome} {traceback.format_exc().splitlines()[-3:]}", []).append(
                (str(error)[:200], case)
            )
        outcomes[outcome.partition(": ")[0] if outcome.startswith("refused") else outcome] += 1
        if outcome.startswith("refused"):
            refusals[outcome[9:90]] += 1

    refusals = Counter()
    one()
    print(sum(outcomes.values()), dict(outcomes))
    for text, number in refusals.most_common(25):
        print("   refused", number, text)
    for key, found in failures.items():
        print(f"--- {len(found)} × {key}\n      {found[0][0]}\n      {found[0][1]!r}")

    return len(failures)


if __name__ == "__main__":
    count, start = int(sys.argv[1]), int(sys.argv[2])
    failed = 0
    for name in sys.argv[3:] or VARIANTS:
        print(f"{name}: {count} cases, seed {start}")
        failed += main(count, start, name)
    sys.exit(bool(failed))
