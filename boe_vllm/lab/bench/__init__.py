"""Benchmarks: what a denoising step costs, what steering adds, and what an engine delivers.

`python -m boe_vllm.lab.bench BENCHMARK` or `boe-vllm bench BENCHMARK`:

    throughput   tokens per second of the engine against LLaDA's public loop
    steering     time of a steering step over a plain one
    attention    active-query attention against dense attention, forward and backward
    scaling      step time against requests, length and active rows
    memory       peak memory of the same steps
    overhead     the engine's share of a step beside the network
    fidelity     gain scores and couplings against their oracles
    predict      what a step of each policy would take on a GPU, from counted passes

`common` holds what they share (options, timing), `machine` what was measured on, `flops` what was
computed, `checkpoint` the weights. `baseline` and `dense` are what people run today, written
independently of the rest of the package.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run one benchmark; the last line that it prints is one JSON object."""
    from boe_vllm.lab.bench.__main__ import main as run

    return run(argv)
