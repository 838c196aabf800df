"""Random models × losses × data × methods: never silently wrong. `make fuzz` runs many more."""

from collections import Counter

from fuzz.cases import VARIANTS, cases, variants_of
from fuzz.runner import run
from fuzz.scores import run as run_scores
from hypothesis import HealthCheck, Phase, given, settings


def test_no_case_is_silently_wrong_in_any_variant():
    outcomes = {name: Counter() for name in [*VARIANTS, "scores"]}

    @settings(
        max_examples=50,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(cases())
    def hold(case):
        shared = {}
        for name, variant in variants_of(case).items():
            outcomes[name][run(variant, shared).partition(":")[0]] += 1
        outcomes["scores"][run_scores(case, shared).partition(":")[0]] += 1

    hold()
    for found in outcomes.values():
        # Most of what is drawn is served.
        assert found["solved"] + found["warned"] + found["not converged"] > found["refused"], outcomes
