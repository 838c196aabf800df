"""Random models × losses × data × methods: never silently wrong. `make fuzz` runs many more."""

from collections import Counter

import pytest
from fuzz import pool
from fuzz.cases import cases, choice
from fuzz.variants import VARIANTS
from hypothesis import HealthCheck, Phase, given, settings

# Of the ways beside the plain one, how many a case is run in.
WAYS = 3
SERVED = ("solved", "warned", "not converged")


@pytest.fixture(autouse=True)
def _no_process_left():
    yield
    pool.close()


def ways_of(case):
    names = [*VARIANTS][1:]
    first, step = choice(case, "ways", len(names)), len(names) // WAYS
    return ["plain", *(names[(first + step * i) % len(names)] for i in range(WAYS))]


def test_no_case_is_silently_wrong_in_any_variant():
    outcomes = {name: Counter() for name in VARIANTS}

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
        for name in ways_of(case):
            outcomes[name][VARIANTS[name](case, shared).partition(":")[0]] += 1

    hold()
    served = {name: sum(found[kind] for kind in SERVED) for name, found in outcomes.items()}
    refused = sum(found["refused"] for found in outcomes.values())
    # Most of what is drawn is served, and some of it in each way.
    assert all(served.values()) and sum(served.values()) > refused, outcomes
