"""What a machine can do, each measured alone: the ceilings that a cost model takes for granted."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch

from boe_vllm.lab.bench.machine import machine_name, matmul_peak


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Ceilings:
    """Rates of one device and of the host that drives it."""

    name: str
    copy: float
    """Bytes a second of a large copy, what is read and what is written together."""
    flops: float
    """Operations a second of a large square product in bfloat16."""
    launch: float
    """Seconds of host time of one kernel launch: an addition of eight numbers, from Python."""
    blocking_copy: float
    """Seconds of host time of one small copy from memory that is not pinned, on an idle device."""


H100 = Ceilings(name="NVIDIA H100", copy=3.0e12, flops=798e12, launch=7.6e-6, blocking_copy=38.3e-6)
"""Launches and blocking copies are the H200 machine's."""
H200 = Ceilings(name="NVIDIA H200", copy=4.3e12, flops=788e12, launch=7.6e-6, blocking_copy=38.3e-6)
CARDS = {"h100": H100, "h200": H200}
"""By the names that a command line takes."""


def measured_ceilings(device: torch.device, *, small: bool = False) -> Ceilings:
    """The ceilings of this machine, in about a second.

    Args:
        device: CUDA, or a CPU for trials of this function.
        small: for a CPU: kilobytes for the copy, and no large product.
    """
    count = 2**20 if small else 2**29
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target, few = torch.empty_like(source), torch.zeros(8, device=device)
    ids = torch.zeros(64, dtype=torch.int64)
    flops = 1e12 if small else matmul_peak(device, torch.bfloat16, "wall")
    return Ceilings(
        name=machine_name(device),
        copy=2 * count / _seconds(lambda: target.copy_(source), device, 20),
        flops=flops,
        launch=_seconds(lambda: few.add_(1), device, 2000),
        blocking_copy=_seconds(lambda: ids.to(device, copy=True), device, 200),
    )


def _seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Mean time of one call among many."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(3):
        work()
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    wait()
    return (time.perf_counter() - start) / repeats
