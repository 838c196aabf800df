"""The cost model of docs/scaling.md: its operations are those that torch counts, whatever the machine's load."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = str(Path(__file__).parents[1] / "docs" / "benchmarks")
sys.path.insert(0, BENCHMARKS)
try:
    import cost_model
    import on_paper
    import on_paper_check
finally:
    sys.path.remove(BENCHMARKS)


@pytest.mark.parametrize("case", on_paper_check.CASES, ids=lambda case: case.name)
def test_operations_are_those_that_are_counted(case):
    for found in on_paper_check.counts(case):
        assert 0.87 <= found.ratio <= 1.15, found


@pytest.mark.parametrize("name, n", [("kfac, ggn", 64), ("direct, ggn", 100)])
def test_factorisations_are_counted_where_rows_are_few(name, n):
    (case,) = (case for case in on_paper_check.CASES if case.name == name)
    fit, _ = on_paper_check.counts(case, n)
    assert fit.ratio == pytest.approx(1.0, abs=0.1)


def test_products_are_counted_where_graphs_are_not_kept():
    for curvature in ("ggn", "hessian"):
        for k in (1, 16):
            assert on_paper_check.streamed_product(curvature, k).ratio == pytest.approx(1.0, abs=0.15)


def test_a_product_in_place_is_counted():
    # Torch's own counter leaves it out, and a third of a product with it.
    torch = on_paper_check.torch
    total = torch.zeros(4, 3)
    assert on_paper_check.counted(lambda: total.addmm_(torch.ones(4, 5), torch.ones(5, 3))) == 2 * 4 * 5 * 3


def test_the_page_has_the_tables_of_the_model():
    page = (Path(__file__).parents[1] / "docs" / "scaling.md").read_text()
    for line in on_paper.short():
        assert line in page


def test_what_is_reduced_is_what_the_rows_are_summed_into():
    net = cost_model.MLP((3, 4, 2))
    # p = 26 numbers of 4 bytes a row; factors 4² + 4² + 2² + 5².
    assert cost_model.product(net, 100, 5).reduced == 4 * 5 * 26
    assert cost_model.kfac_fit(net, 100).reduced == 4 * (26 + 61)
    assert cost_model.direct_fit(net, 100).reduced - 4 * 26 == 4 * 26 * 26 + 2 * 4 * 26
