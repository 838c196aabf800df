"""What several processes fit is on every rank what one process of all the data fits: every method, and each form."""

import pytest
from ranks import check_fits
from shared_fits import SAMPLED, SAMPLED_SETTINGS, UNWEIGHTED, cases, model_cases, of_one

CASES = cases()
MODEL_CASES = model_cases()


def expected_of_samples(name):
    return of_one(UNWEIGHTED, SAMPLED_SETTINGS.get(name, {"method": "direct"}))


pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@pytest.mark.parametrize("name", CASES)
def test_two_ranks(two, name):
    check_fits(two[name], 2, of_one(*CASES[name][1:]))


@pytest.mark.parametrize("name", SAMPLED)
def test_a_distributed_sampler_gives_each_row_once(two, name):
    check_fits(two[name], 2, expected_of_samples(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CASES, *MODEL_CASES])
def test_three_ranks(three, name):
    check_fits(three[name], 3, of_one(*{**CASES, **MODEL_CASES}[name][1:]))


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLED)
def test_a_distributed_sampler_of_three(three, name):
    check_fits(three[name], 3, expected_of_samples(name))
