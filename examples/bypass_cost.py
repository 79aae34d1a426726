"""Processor time of a step of `boe` over one of `confidence`, on whole decodes, by kind of step.

    python examples/bypass_cost.py --requests 1 --repeats 6

The bundled model solves Sudokus behind two solved ones: 256 positions, blocks of 32, one token a
step. The policies step in turn, each decode is repeated, and of every step the shortest time
counts. A step that is sure runs no backward (`bypass`); "all steps" is the mean cost, "without"
that of the steps in which `boe` ran none, over the same steps of `confidence`.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch

import boe_vllm
from boe_vllm.denoiser import Denoiser
from boe_vllm.lab.tasks import TASKS
from boe_vllm.request.resolve import SamplingFields

LENGTH = 256
CASES: dict[str, dict[str, Any]] = {
    "confidence": {"policy": "confidence"},
    "boe": {"policy": "boe"},
    "boe, bypass null": {"policy": "boe", "bypass": None},
}


class Decode:
    """All requests under one policy, step by step."""

    def __init__(self, denoiser: Denoiser, prompts: list[list[int]], fields: dict[str, Any]):
        self.loop = denoiser.open_loop(0)
        settings = {"block_length": 32, "tokens_per_step": 1, **fields}
        canvas = LENGTH - max(map(len, prompts))
        for number, prompt in enumerate(prompts):
            sampling = SamplingFields(max_tokens=canvas, temperature=0.0, seed=number)
            self.loop.add(str(number), prompt, denoiser.resolve(prompt, sampling, settings))
        self.seconds: list[float] = []
        self.backward: list[bool] = []

    def step(self) -> bool:
        """One step; whether another one follows."""
        canvases = list(self.loop.canvases.values())
        before = sum(canvas.account.backwards for canvas in canvases)
        start = time.process_time()
        results = self.loop.step(list(self.loop.canvases))
        self.seconds.append(time.process_time() - start)
        self.backward.append(sum(c.account.backwards for c in canvases) > before)
        for name, result in results.items():
            if result.done:
                self.loop.remove(name)
        return bool(self.loop.canvases)


def prompts_of(denoiser: Denoiser, requests: int) -> list[list[int]]:
    """Two solved puzzles, and one to solve."""
    items = TASKS["sudoku6"].items(3 * requests, seed=5)
    texts = []
    for first, second, last in zip(items[::3], items[1::3], items[2::3], strict=True):
        texts.append(first.prompt + first.answer + second.prompt + second.answer + last.prompt)
    return [denoiser.encode(text) for text in texts]


def main() -> None:
    """Decode, and print one line for each policy."""
    parser = argparse.ArgumentParser(description="The cost of boe on whole decodes.")
    parser.add_argument("--requests", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=6)
    args = parser.parse_args()
    torch.set_num_threads(1)
    denoiser = Denoiser.from_pretrained(boe_vllm.tiny_model_path())
    prompts = prompts_of(denoiser, args.requests)
    times: dict[str, list[list[float]]] = {name: [] for name in CASES}
    for _ in range(args.repeats):
        decodes = {name: Decode(denoiser, prompts, fields) for name, fields in CASES.items()}
        running = list(decodes.values())
        while running:
            running = [decode for decode in running if decode.step()]
        for name, decode in decodes.items():
            times[name].append(decode.seconds)
    plain = np.min(times["confidence"], 0)
    for name, decode in decodes.items():
        own, steers = np.min(times[name], 0), np.array(decode.backward)
        parts = {"all steps": steers | True, "with": steers, "without": ~steers}
        ratios = {k: own[part].sum() / plain[part].sum() for k, part in parts.items() if part.any()}
        text = ", ".join(f"{k} {ratio:.2f}" for k, ratio in ratios.items())
        kinds = f"{steers.mean():.2f} of {len(own)} steps with a backward"
        print(f"{name}: {kinds}; over confidence: {text}")


if __name__ == "__main__":
    main()
