"""What one thread, or one GPU, reaches: the rate of a GEMM and the memory's bandwidth; and the seconds of a call."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def gemm_rate(dtype: torch.dtype, device: torch.device, side: int = 1024) -> float:
    """Return the operations a second of a product of two square matrices."""
    A = torch.randn(side, side, dtype=dtype, device=device)
    C = torch.empty_like(A)
    return 2 * side**3 / least_seconds(lambda: torch.mm(A, A, out=C), device)


def bandwidth(device: torch.device, megabytes: int = 256) -> float:
    """Return the bytes a second of a copy that no cache holds, those read and those written."""
    source = torch.ones(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / least_seconds(lambda: target.copy_(source), device)


def least_seconds(call: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """Return the least seconds of a call, after one that is not counted: of the CPU, or by the clock on a GPU."""
    call()
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    seconds = []
    for _ in range(repeats):
        settle(device)
        start = clock()
        call()
        settle(device)
        seconds.append(clock() - start)
    return min(seconds)


def settle(device: torch.device) -> None:
    """Wait for what a GPU still does."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
