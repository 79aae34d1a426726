"""Peak memory of a denoising step, with and without steering.

Every kind of step runs in a process of its own that loads the weights and takes the step once, with
the whole block masked: the state that steers most. On a CPU the figures are resident memory: of the
process, which includes Python, torch and vLLM; of weights and step without those; and of the step
alone. On CUDA they are allocated memory, and only the last two exist.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from boe_vllm.lab.bench import checkpoint, common
from boe_vllm.lab.bench.baseline import PlainLLaDA
from boe_vllm.lab.bench.dense import dense_boe_step
from boe_vllm.lab.bench.machine import Environment, print_facts
from boe_vllm.lab.bench.states import (
    DENSE,
    VARIANTS,
    draw_state,
    one_step,
    open_loop,
    variant_fields,
)

PLAIN = "confidence"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    known = [*VARIANTS, DENSE]
    parser.set_defaults(repeats=1, requests=8)
    parser.add_argument("--lengths", type=common.integers, help="default: 256,1024")
    parser.add_argument("--variants", type=common.names(known), default=known)
    parser.add_argument("--rho", type=float, default=0.25, help="share of candidates")
    parser.add_argument("--measure", choices=known, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> None:
    """Measure each step in a process of its own; print the table and the JSON line."""
    block = args.block_length or 32
    lengths = common.step_lengths(args, [256, 1024], block)
    if args.measure is not None:
        print(json.dumps(_measure(args, args.measure, lengths[0], block)))
        return
    environment = Environment(args.device, args.dtype, args.clock)
    details: list[dict[str, Any]] = []
    keys: dict[str, float] = {}
    for length in lengths:
        peaks = {}
        for name in dict.fromkeys([PLAIN, *args.variants]):
            common.progress(f"{length} positions: {name}")
            runs = [_in_own_process(args, name, length, block) for _ in range(args.repeats)]
            peaks[name] = {key: common.median([r[key] for r in runs]) for key in runs[0]}
        rows = [_row(name, length, peak, peaks[PLAIN]) for name, peak in peaks.items()]
        details += rows
        if length == 1024 and block == 32 and "mask" in peaks:
            mask = next(row for row in rows if row["step"] == "mask")
            keys |= {
                "memory.steering_over_plain_1024": mask["process ratio"],
                "memory.steering_over_plain_1024_weights_and_step": mask["ratio"],
                "memory.steering_over_plain_1024_step_alone": mask["step ratio"],
            }
    common.print_table(
        f"Peak memory of a step of {args.requests} requests, {block} masked rows each; MB", details
    )
    facts = environment.facts()
    print_facts(facts)
    print(
        "process: resident memory at its peak, with interpreter and libraries; weights: what "
        "loading them added; step: what the step added to that at its peak.\n"
        "process ratio, ratio, step ratio: to the confidence step, of the process, of weights and "
        "step, of the step alone. A steering step keeps the keys and values of all rows in all "
        "layers, and of active rows everything that the backward needs."
    )
    common.print_result("memory", keys, details=details, environment=facts, args=args)


def _row(name: str, length: int, peak: dict[str, float], plain: dict[str, float]) -> dict[str, Any]:
    def own(figures: dict[str, float]) -> float:
        return figures["weights"] + figures["step"]

    return {
        "step": name,
        "length": length,
        "process": peak["process"] / 2**20,
        "weights": peak["weights"] / 2**20,
        "step MB": peak["step"] / 2**20,
        "process ratio": peak["process"] / plain["process"],
        "ratio": own(peak) / own(plain),
        "step ratio": peak["step"] / plain["step"],
    }


def _in_own_process(
    args: argparse.Namespace, name: str, length: int, block: int
) -> dict[str, float]:
    """Run this benchmark's own command for one step."""
    command = [sys.executable, "-m", "boe_vllm.lab.bench", "memory", "--measure", name]
    command += ["--lengths", str(length), "--block-length", str(block)]
    for option in ("device", "dtype", "threads", "requests", "seed", "rho"):
        command += [f"--{option}", str(getattr(args, option))]
    for option in ("model", "d_model", "layers", "heads", "mlp", "vocab"):
        if getattr(args, option) is not None:
            command += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _measure(args: argparse.Namespace, name: str, length: int, block: int) -> dict[str, float]:
    """Bytes of this process: its peak, what the weights take and what the step adds."""
    device = torch.device(args.device)
    config = checkpoint.read_config(args)
    state = draw_state(
        config, requests=args.requests, length=length, block=block, masked=block, seed=args.seed
    )
    before = _memory(device)
    tensors = checkpoint.read_tensors(args, config)
    if name == DENSE:
        network = PlainLLaDA(config, tensors, dtype=common.DTYPES[args.dtype], device=device)
        tokens, masked = (torch.from_numpy(x).to(device) for x in (state.tokens, state.masked))

        def step() -> Any:
            return dense_boe_step(network, tokens, masked, rho=args.rho)
    else:
        loop = open_loop(args, checkpoint.load_model(args, config, tensors))
        del tensors
        step = one_step(loop, state, variant_fields(name, args.rho))
    loaded = _memory(device)
    _forget_peak(device)
    step()
    peak = _peak(device)
    return {"process": peak, "weights": loaded - before, "step": peak - loaded}


def _memory(device: torch.device) -> float:
    """Bytes in use now, after giving back what is free."""
    gc.collect()
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        pass  # another C library: the figures include what it holds back
    return _status("VmRSS")


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path(f"/proc/{os.getpid()}/clear_refs").write_text("5")


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM")


def _status(name: str) -> float:
    """A figure of /proc/self/status, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return float(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status: expected a line {name}, got none; run this on Linux")
