"""Denoising steps at LLaDA-8B's widths with random bfloat16 weights, beside what is predicted.

Figures are means over the steps of a block. The first block, in which kernels are chosen and memory
is taken, is watched for the host's waiting; the second is timed; the third is profiled, which slows
it down, so that only what the device does is taken from there.
"""

from __future__ import annotations

import dataclasses
import time
import warnings
from typing import Any

import torch

from boe_vllm.decoding.loop import DenoisingLoop
from boe_vllm.lab.bench import costs
from boe_vllm.lab.bench.ceilings import Ceilings
from boe_vllm.lab.bench.counted import Lengths, fill, loop_over, random_prompts, step_all
from boe_vllm.lab.bench.launches import CODE, CURRENT
from boe_vllm.lab.bench.passes import Recorder, layer_passes, layer_rows
from boe_vllm.lab.bench.scenarios import STEPS
from boe_vllm.lab.gpu.report import Report
from boe_vllm.models.build import random_model
from boe_vllm.models.llada import LLaDAConfig

BUDGET_BYTES = 2**31
"""Of a tile of rows times vocabulary, as on a server with CUDA."""
POLICIES = ("confidence", "joint", "boe", "boe paper")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """What is run: a network, and requests of some lengths."""

    config: LLaDAConfig
    requests: tuple[int, ...]
    lengths: Lengths


def sizes(small: bool) -> Sizes:
    """LLaDA-8B's, or something that a CPU does in a second."""
    vocabulary = 512 if small else 126464
    config = LLaDAConfig(
        d_model=64 if small else 4096,
        n_layers=2 if small else 32,
        n_heads=4 if small else 32,
        mlp_hidden_size=128 if small else 12288,
        vocab_size=vocabulary,
        mask_token_id=vocabulary - 1,
        eos_token_id=vocabulary - 2,
        pad_token_id=vocabulary - 2,
    )
    lengths = Lengths(prompt=224, canvas=128, block=32, tokens_per_step=4)
    if small:
        lengths = Lengths(prompt=20, canvas=36, block=12, tokens_per_step=3)
    return Sizes(config=config, requests=(2,) if small else (1, 8, 25), lengths=lengths)


def check_steps(report: Report, device: torch.device, ceilings: Ceilings, *, small: bool) -> None:
    """One line per policy and number of requests."""
    wanted = sizes(small)
    model = random_model(wanted.config, device=device, dtype=torch.bfloat16)
    network = costs.Network.of(wanted.config)
    for requests in wanted.requests:
        for policy in POLICIES:
            subject = dict(scenario=policy, requests=requests, **dataclasses.asdict(wanted.lengths))
            if not report.time_left("steps", **subject):
                return
            with report.guard("steps", **subject), torch.inference_mode():
                loop = loop_over(model, budget_bytes=BUDGET_BYTES)
                _open(loop, policy, requests, wanted.lengths)
                found = measure(loop, wanted.lengths.steps, network, ceilings)
                report.line("steps", **subject, **found)


def measure(
    loop: DenoisingLoop, many: int, network: costs.Network, ceilings: Ceilings
) -> dict[str, Any]:
    """Time, kernels, waiting, memory, and the prediction for the same steps.

    Args:
        loop: with requests of at least three blocks.
        many: steps of a block.
        network: the model's sizes.
        ceilings: of this machine.
    """
    device = loop.device
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    waits = waiting(loop, many)
    recorder = Recorder(loop)
    with recorder.recording() as steps:
        _wait(device)
        start = time.perf_counter()
        for _ in range(many):
            step_all(loop)
        _wait(device)
        wall = (time.perf_counter() - start) / many
    predicted = costs.mean([costs.predict(step, network, ceilings, CODE) for step in steps])
    launches = [costs.round_launches(p, network, CODE) for step in steps for p in step if p]
    found: dict[str, Any] = {
        "code": CURRENT,
        "first_step": many,
        "steps": many,
        "passes": sum(map(layer_passes, steps)) / many,
        "rows": sum(map(layer_rows, steps)) / many,
        "ms_step": wall * 1e3,
        "predicted_ms": predicted.seconds * 1e3,
        "predicted_busy_ms": predicted.busy * 1e3,
        "predicted_kernels": sum(launches) / many,
        "binds": predicted.binds,
    }
    if cuda:
        found |= {"syncs": waits, **profiled(loop, many, wall)}
        found["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return found


def waiting(loop: DenoisingLoop, many: int) -> float:
    """Times that a step makes the host wait for the device, mean of so many steps."""
    if loop.device.type != "cuda":
        for _ in range(many):
            step_all(loop)
        return 0.0
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(many):
                step_all(loop)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in seen) / many


def profiled(loop: DenoisingLoop, many: int, wall: float) -> dict[str, Any]:
    """Kernels and copies of a step, time in them, and the host's time without its waiting.

    Args:
        loop: to be stepped.
        many: steps that are taken.
        wall: seconds of a step that is not profiled.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(many):
            step_all(loop)
        _wait(loop.device)
    events = list(profiler.events() or [])
    kernels = [e for e in events if e.device_type.name == "CUDA"]
    busy = sum(e.device_time for e in kernels) / 1e6 / many
    waited = sum(e.cpu_time for e in events if e.name.endswith("Synchronize")) / 1e6 / many
    return {
        "kernels": len(kernels) / many,
        "busy_ms": busy * 1e3,
        "busy_share": busy / wall,
        "host_ms": (wall - waited) * 1e3,
    }


def _open(loop: DenoisingLoop, policy: str, requests: int, lengths: Lengths) -> None:
    fields = {
        "block_length": lengths.block,
        "tokens_per_step": lengths.tokens_per_step,
        **STEPS[policy],
    }
    prompts = random_prompts(loop.model.vocab_size, requests, lengths.prompt)
    fill(loop, fields, prompts, canvas=lengths.canvas)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
