"""Processes with GPUs: gloo, which takes tensors from the CPU, and nccl, which takes none from there."""

from functools import partial

import pytest
import torch
from rank_calls import CASE, B, by_hand, inverter, on_gpu
from ranks import check, outcomes, values

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("method", ["direct", "cg", "ekfac"])
def test_gloo_with_models_on_one_gpu(method, tmp_path):
    found = outcomes(2, {method: partial(on_gpu, method=method)}, tmp_path)
    alone = inverter(method, curvature="ggn", process_group=None).fit(CASE.module, CASE.data)
    check(found[method], alone.transform(B))


def test_nccl(tmp_path):
    # A GPU is of one rank alone.
    size = min(2, torch.cuda.device_count())
    found = outcomes(size, {"by_hand": partial(by_hand, device="cuda")}, tmp_path, backend="nccl")["by_hand"]
    assert [outcome.error for outcome in found] == [""] * size, found
    (sums, _, rows, none, told, least), *_ = values(found) if size == 2 else [found[0].value]
    assert sums == [[1.0 + size * (size - 1) / 2 + size - 1] * 2] * 3 and none == []
    assert len(rows) == size * (size + 1) // 2 and len(told) == size and least == 5
