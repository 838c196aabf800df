"""The groups of processes, each started once for all the tests that ask what they did."""

import pytest
import rank_calls
import rank_faults
import shared_fits
from ranks import once, outcomes


def of_two(folder):
    calls = {**shared_fits.table(shared_fits.cases()), **shared_fits.SAMPLED, **rank_calls.CALLS, **rank_faults.CALLS}
    return outcomes(2, calls, folder, {"the_page": rank_calls.the_page})


def of_three(folder):
    cases = {**shared_fits.cases(), **shared_fits.model_cases()}
    return outcomes(3, {**shared_fits.table(cases), **shared_fits.SAMPLED}, folder)


@pytest.fixture(scope="session")
def two(tmp_path_factory, request):
    """What each call came to on two ranks."""
    return once(_shared_folder(tmp_path_factory, request), "two", of_two)


@pytest.fixture(scope="session")
def three(tmp_path_factory, request):
    """What each fit came to on three ranks."""
    return once(_shared_folder(tmp_path_factory, request), "three", of_three)


def _shared_folder(factory, request):
    folder = factory.getbasetemp()
    # That of all workers, where there are several.
    return folder.parent if hasattr(request.config, "workerinput") else folder
