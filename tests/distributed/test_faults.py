"""What goes wrong on one rank is raised on every rank, and the group serves on."""

import pytest
import torch
import torch.distributed as dist
from rank_calls import inverter, plain_rows
from rank_faults import CALLS, FAULTS
from ranks import check

from skinvert import HessianInverter
from skinvert._distributed import Ranks

EVERYWHERE = "Raised on every rank of the process group."
# What each rank says, and with which type; one entry for all.
SAID = {
    "not_a_member": [("TypeError", "a ProcessGroup that this process is a member of"), None],
    "sampler_alone": ("ValueError", 'process_group="world"'),
    "sampler_of_another": ("ValueError", "must be that of rank 1 of 2. Got rank 0 of 2"),
    "sampler_of_more": ("ValueError", "of 2. Got rank"),
    "sampler_of_ones_own": ("ValueError", "Got Own instead"),
    "sampler_of_batches": ("ValueError", "Subset"),
    "sampler_and_weights": ("ValueError", "Subset"),
    "data_sets_that_differ": ("ValueError", "Got 23 on rank 0; 22 on rank 1"),
    "mixed_forms": ("ValueError", "Got 23 on rank 0; None on rank 1"),
    "no_rows": ("ValueError", "0 samples on every rank"),
    "no_weights": ("ValueError", "at least one weighted row"),
    "with_nan": [("ValueError", "Rank 1 failed in fit: data must be finite"), ("ValueError", "data must be finite")],
    "without_data": [("ValueError", "data must be given"), ("ValueError", "Rank 0 failed in fit")],
    "no_model": [("ValueError", "Got 'no_such_method'"), ("ValueError", "Rank 0 failed in fit")],
    "failing_data": [("RuntimeError", "Rank 1 failed in fit: KeyError: 'a file of row 3'"), ("KeyError", "row 3")],
    "failing_assembly": [("MemoryError", "no room"), ("MemoryError", "Rank 0 failed in the matrix: no room")],
    "too_little_for_lissa": [("ValueError", "working_memory"), ("ValueError", "Rank 0 failed in a minibatch")],
    "other_path": ("ValueError", "λ in path must be the same on every rank. Got [1.0] on rank 0; [2.0] on rank 1"),
    "other_shape": ("ValueError", "b in solve must be the same on every rank. Got ((2, 43)"),
    "wrong_shape": [("ValueError", "X has 42 features"), ("ValueError", "Rank 0 failed in solve: X has 42 features")],
    "other_rows_back": ("ValueError", "b in inverse_transform must be the same on every rank"),
    "wrong_shape_back": [
        ("ValueError", "X has 42 features"),
        ("ValueError", "Rank 0 failed in inverse_transform: X has 42 features"),
    ],
    "other_judgement": ("ValueError", "check_residual in fit must be the same on every rank. Got True on rank 0"),
    "destroyed_group": ("ValueError", "The process group of a fitted inverter must be one of 2"),
    "another_call": ("ValueError", "Got path on rank 0; solve on rank 1"),
    "other_parameter": ("ValueError", "parameter 2.weight in the model must be the same on every rank"),
    "other_buffer": ("ValueError", "buffer 1.running_mean in the model must be the same on every rank"),
    "other_shift": ("ValueError", "hessian_perturbation in fit must be the same on every rank. Got 1.0 on rank 0; 2.0"),
    "other_autocast": ("ValueError", "autocast in fit must be the same on every rank. Got None on rank 0; 'bfloat16'"),
    "other_method": ("ValueError", "Got Direct() on rank 0; CG() on rank 1"),
    "other_curvature": ("ValueError", "Got 'ggn' on rank 0; 'hessian' on rank 1"),
    "other_memory": ("ValueError", "working_memory in fit must be the same on every rank"),
    "other_weights": ("ValueError", "loss.weight in fit must be the same on every rank"),
    "other_setting": ("ValueError", "loss.label_smoothing in fit must be the same on every rank. Got 0.0 on rank"),
    "other_kind": ("ValueError", "loss in fit must be the same on every rank. Got 'CrossEntropyLoss' on"),
    "other_function": ("ValueError", "The loss of a row must be the same on every rank"),
    "function_in_little_memory": ("ValueError", "The loss of a row must be the same on every rank"),
    "other_activation": ("ValueError", "The outputs of a row must be the same on every rank"),
    "other_gradient": ("ValueError", "The gradient of a row must be the same on every rank"),
    "other_penalty": ("ValueError", "The penalty must be the same on every rank. Got "),
    "other_columns": (
        "ValueError",
        "column 2 of data[0] in fit must be the same on every rank. Got 'c' on rank 0",
    ),
    "other_columns_of_rows": ("ValueError", "column 2 of data in fit must be the same on every rank"),
    "columns_on_one": ("ValueError", "column 0 of data[0] in fit must be the same on every rank. Got 'a' on rank 0"),
    "other_method_of_rows": ("ValueError", "Got Direct() on rank 0; CG() on rank 1"),
    "failing_late": [("RuntimeError", "Rank 1 failed in fit: ArithmeticError: too late"), ("ArithmeticError", "late")],
    "classes_apart": ("ValueError", "a mean or a sum of per-sample losses, on every batch. Got a mean of"),
    "other_products": ("ValueError", "rows in a product with H must be the same on every rank"),
    "lazy_rows": ("ValueError", "solve together must be in memory. Got a Dask array"),
    "influence": ("ValueError", "InfluenceFunction's inverter must be one of one process"),
    "function": ("ValueError", "process_group must be None for a method that is a function"),
    "sharded_model": ("TypeError", "parameters must be whole in every process. Got 0.weight in parts"),
    "wrapped_in_shards": ("TypeError", "parameters must be whole in every process"),
    "layers_that_differ": ("ValueError", "The layers with factors must be the same on every rank. Got first on some"),
    "offloaded": ("ValueError", "offload must be None for a fit with process_group. Got the CPU's memory"),
    "other_rows-cg": ("ValueError", "b in solve must be the same on every rank"),
    "other_rows-kfac": ("ValueError", "b in solve must be the same on every rank"),
}
# Before anything was together, or after it.
ALONE = ("not_a_member", "sampler_alone", "influence", "lazy_rows", "destroyed_group")


@pytest.mark.parametrize("name", FAULTS)
def test_every_rank_raises(two, name):
    said = SAID[name] if isinstance(SAID[name], list) else [SAID[name]] * 2
    for outcome, expected in zip(two[name], said, strict=True):
        error, text = expected or ("", "")
        assert outcome.error == error and text in outcome.message, outcome
        assert error == "" or name in ALONE or EVERYWHERE in outcome.notes


def test_the_group_serves_on(two):
    check(two["after_the_faults"], plain_rows(0, 1, "cg", "ragged"))


def test_a_rank_that_does_not_come_is_not_waited_for_for_ever(two):
    first, second = two["one_does_not_come"]
    assert first.error == "RuntimeError" and "has lost the others in fit" in first.message and not second.error
    # The timeout is two seconds; the rank sleeps for five.
    assert int(first.message.split()[-2]) <= 4


def test_a_rank_that_dies_is_lost_to_the_others(two):
    (left,) = two["one_dies"]
    assert list(CALLS)[-1] == "one_dies"
    assert left.error == "RuntimeError" and "Rank 0 of 2 has lost the others in the data" in left.message


def test_a_group_after_its_end(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    ranks = Ranks(dist.group.WORLD, 0, 2, True)
    dist.destroy_process_group()
    with pytest.raises(ValueError, match=r"init_process_group\(\)` first"), ranks.together("solve"):
        pass


def test_a_group_without_torch_distributed():
    X, y = torch.zeros(4, 2), torch.zeros(4, 1)
    with pytest.raises(ValueError, match=r"init_process_group\(\)` first, in a script that torchrun starts"):
        HessianInverter(process_group="world", loss="mse").fit(torch.nn.Linear(2, 1), (X, y))
    for wrong in ("World", 3, [0, 1]):
        with pytest.raises(TypeError, match="process_group must be None, 'world', or a ProcessGroup"):
            inverter(process_group=wrong).fit(X)
