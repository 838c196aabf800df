"""What an inverter that several processes fitted answers beside solutions, and the models and data that it takes."""

import numpy as np
import pytest
import torch
from oracles import oracle_matrix
from problems import problem
from rank_calls import (
    ANSWERS,
    CASE,
    Abstract,
    B,
    abstract,
    answers,
    differentiated,
    empty_forms,
    of_one,
    one_token_each,
    own_loss,
    part_in_ddp,
    plain_rows,
    posterior,
    scikit,
    weightless,
    wide_trace,
)
from ranks import check, check_fits, compare, values
from shared_fits import SHIFT, N, known, short_sampler

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@pytest.mark.parametrize(("method", "curvature"), ANSWERS)
def test_all_that_is_asked(two, method, curvature):
    found = two[f"answers-{method}-{curvature}"]
    check(found, answers(of_one(method, curvature=curvature)))
    expected = oracle_matrix(CASE, curvature)
    for received in values(found):
        assert np.linalg.norm(received["matrix"].numpy() - expected) <= 1e-10 * np.linalg.norm(expected)


@pytest.mark.parametrize("curvature", ["ggn", "sampled_fisher"])
def test_the_posterior(two, curvature):
    check(two[f"posterior-{curvature}"], posterior(of_one("direct", curvature=curvature)))


def test_bounds_of_a_float32_fit_are_of_all_rows(two):
    H = oracle_matrix(problem("mlp", "cross_entropy", n=N), "ggn")
    expected = np.einsum("kp,kp->k", B, np.linalg.solve(H + SHIFT * np.eye(len(H)), B.T).T)
    for received, bounds in values(two["in_float32"]):
        assert (bounds <= 1e-3 * expected).all()
        # The data, rounded to float32, are not quite those of the oracle.
        assert (abs(received - expected) <= bounds + 1e-6 * expected).all()


def test_a_solution_is_differentiated_on_all_ranks(two):
    check(two["differentiated"], differentiated(0, 1))


def test_one_rank_may_say_what_it_does(two):
    check(two["talkative"], of_one("auto", hessian_perturbation="1 rel", curvature="ggn").transform(B))


def test_what_ranks_say_to_each_other(two):
    sums = [[[3.0, 3.0]] * 3, [1, 3]]
    rows = [[[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]], []]
    assert values(two["by_hand"]) == [[*sums, *rows, [{"rank": 0}, {"rank": 1}], 5]] * 2


def test_a_rank_without_rows_adds_none(two):
    n, p = len(CASE.X), CASE.p
    check(two["counted_rows"], ((n, p), (n, p), (n, p), n, n))


def test_what_is_sent(two):
    p, k, status = CASE.p, len(B), 3 * 8
    for sent in values(two["traffic"]):
        assert sent["product"] == [status, 8 * k * p] and sent["solve"] == []
        # An MLP of 4, 5 and 3 units, biases among them.
        sides = [8 * 5 * 5, 8 * 5 * 5, 8 * 3 * 3, 8 * 6 * 6]
        assert 8 * p * p in sent["direct"] and 8 * p in sent["diagonal"]
        assert [size for size in sent["kfac"] if size in {*sides}][-4:] == sides
        # Beside these, what tells how the fit goes on, and the gradient.
        assert max(size for size in sent["kfac"] if size not in sides) <= 8 * p
        assert max(sent["direct"]) == 8 * p * p


def test_auto_chooses_what_every_rank_has_room_for(two):
    assert values(two["unequal_memory"]) == ["CG()", "CG()"]


def test_a_loss_that_is_found_in_the_data(two):
    check_fits(two["own_loss"], 2, own_loss(0, 1))


def test_a_relative_perturbation_is_of_the_same_random_rows(two):
    expected = wide_trace(0, 1)
    assert values(two["wide_trace"]) == pytest.approx([expected, expected], rel=1e-9)


@pytest.mark.parametrize("kind", ["ragged", "empty"])
def test_models_of_scikit_learn(two, kind):
    check(two[f"scikit-{kind}"], scikit(0, 1, kind))


@pytest.mark.filterwarnings("ignore:X has feature names")
def test_a_rank_without_rows_has_them_in_any_form(two):
    check(two["empty_forms"], empty_forms(0, 1))


@pytest.mark.parametrize("name", ["direct-empty", "lissa-ragged"])
def test_plain_rows(two, name):
    method, kind = name.split("-")
    check(two[f"rows-{name}"], plain_rows(0, 1, method, kind))


@pytest.mark.parametrize("kind", ["ragged", "empty"])
def test_a_model_of_abstract_members_alone(two, kind):
    assert Abstract().num_params == CASE.p
    check_fits(two[f"abstract-{kind}"], 2, abstract(0, 1))


def test_a_factor_that_is_a_diagonal_on_one_rank(two):
    check(two["one_token_each"], one_token_each(0, 1))


@pytest.mark.parametrize("method", ["direct", "cg", "ekfac"])
def test_little_memory(two, method):
    check_fits(two[f"little_memory-{method}"], 2, known(of_one(method), B))


@pytest.mark.parametrize("ignored", [True, False])
def test_a_rank_whose_rows_weigh_nothing_adds_none(two, ignored):
    check_fits(two[f"weightless-{ignored}"], 2, weightless(0, 1, ignored))


def test_a_sampler_of_the_first_rows_deals_these_out_alone(two):
    check_fits(two["short_sampler"], 2, short_sampler(0, 1))


@pytest.mark.parametrize("method", ["cg", "direct", "ekfac"])
def test_autocast(two, method):
    # Of other batches bfloat16 rounds otherwise; what is solved is the exact system.
    expected = of_one(method, curvature="ggn").transform(B)
    for received in values(two[f"in_autocast-{method}"]):
        assert np.linalg.norm(received - expected) <= (0.05 if method == "ekfac" else 1e-3) * np.linalg.norm(expected)


def test_a_model_of_distributed_data_parallel_has_its_own_names(two):
    one = of_one("ekfac", curvature="ggn")
    check(two["in_ddp"], (one.transform(B), one.parameter_names_))


def test_a_part_of_a_model_in_distributed_data_parallel_waits_for_nobody(two):
    expected, n = part_in_ddp(0, 1)
    (x, alone), (same, _) = values(two["part_in_ddp"])
    compare([x, same, alone], [expected, expected, n])


def test_pickles_and_copies(two):
    check(two["pickled"], [*[of_one("direct").transform(B)] * 2, *[of_one("cg").transform(B)] * 2])


def test_a_group_as_it_is(two):
    expected = of_one("direct").transform(B)
    check(two["subgroup"], (expected, expected, "<ProcessGroup, left out of the file>"))


def test_a_factorisation_solves_alone_and_for_rows_of_its_own(two):
    first, second = values(two["one_alone"])
    assert len(first) == 2 and second == []
    one = of_one("direct")
    compare(first[0], [one.transform(B), one.inverse_transform(B)])
    for rank, received in enumerate(values(two["own_rows"])):
        compare(received, of_one("direct").transform(B + rank))


def test_all_the_data_on_each_rank_is_warned_of(two):
    for outcome in two["all_the_data"]:
        assert outcome.value == 2 * len(CASE.X)
        assert any("all the data" in text and "DistributedSampler" in text for text in outcome.warned)


def test_without_a_group_nothing_is_shared(two):
    # What one process computes here is no part of any group.
    assert not torch.distributed.is_initialized() and of_one().hessian_perturbation_ == SHIFT
    assert two["after_the_faults"]
