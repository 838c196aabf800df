"""Random models × losses × data × methods: never silently wrong. `make fuzz` runs many more."""

from collections import Counter

import pytest
from fuzz.cases import VARIANTS, cases
from fuzz.runner import run
from hypothesis import HealthCheck, Phase, given, settings


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_case_is_silently_wrong(variant):
    outcomes = Counter()

    @settings(
        max_examples=50,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(cases(**VARIANTS[variant]))
    def hold(case):
        outcomes[run(case).partition(":")[0]] += 1

    hold()
    # Most of what is drawn is served.
    assert outcomes["solved"] + outcomes["warned"] + outcomes["not converged"] > outcomes["refused"], outcomes
