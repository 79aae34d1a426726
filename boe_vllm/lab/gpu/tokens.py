"""The bundled checkpoint decodes the same tokens on the device as on the CPU, alone and in a batch.

Its weights are float32: rounding decides nothing, unless a step's two best choices are equal to
within it.
"""

from __future__ import annotations

import time

import torch

import boe_vllm
from boe_vllm.lab.bench.counted import fill, loop_over, step_all
from boe_vllm.lab.bench.scenarios import DECODES, SAMPLED
from boe_vllm.lab.gpu.report import Report
from boe_vllm.models.build import load_model
from boe_vllm.models.decoder import Decoder

SUMS = ((12, 34), (7, 8), (99, 1), (250, 250))
CANVAS, SMALL_CANVAS = 32, 12


def check_tokens(report: Report, device: torch.device, *, small: bool) -> None:
    """Every scenario of `DECODES`, on four additions."""
    path = boe_vllm.tiny_model_path()
    there = load_model(path, device=device)
    here = there if device.type == "cpu" else load_model(path)
    # One token is one byte.
    prompts = [list(f"{a}+{b}=".encode()) for a, b in SUMS[: 2 if small else 4]]
    canvas = SMALL_CANVAS if small else CANVAS
    for name in DECODES:
        if not report.time_left("tokens", scenario=name):
            return
        with report.guard("tokens", scenario=name):
            found, steps, seconds = decode(there, name, prompts, canvas)
            wanted = found if here is there else decode(here, name, prompts, canvas)[0]
            alone, _, _ = decode(there, name, prompts[:1], canvas)
            pairs = [p for a, b in zip(wanted, found, strict=True) for p in zip(a, b, strict=True)]
            differing = sum(a != b for a, b in pairs)
            same_alone = alone[0] == found[0]
            report.line(
                "tokens",
                ok=not differing and same_alone,
                scenario=name,
                differing=differing,
                of=sum(map(len, wanted)),
                alone_equals_batch=same_alone,
                steps=steps,
                ms_step=seconds / steps * 1e3,
            )


@torch.inference_mode()
def decode(
    model: Decoder, scenario: str, prompts: list[list[int]], canvas: int
) -> tuple[list[list[int]], int, float]:
    """Tokens of every request, steps, and seconds.

    Raises:
        RuntimeError: when a request cannot go on.
    """
    loop = loop_over(model, cache_rows=4096)
    fields = {"block_length": canvas // 2, **DECODES[scenario]}
    fill(loop, fields, prompts, canvas=canvas, temperature=SAMPLED.get(scenario, 0.0))
    steps, start = 0, time.perf_counter()
    while not all(canvas.done for canvas in loop.canvases.values()):
        step_all(loop)
        steps += 1
    tokens = [canvas.tokens.tolist() for canvas in loop.canvases.values()]
    return tokens, steps, time.perf_counter() - start
