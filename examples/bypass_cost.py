"""Processor time of a step of `boe` over one of `confidence`, on whole decodes, by kind of step.

    python examples/bypass_cost.py --requests 1 --repeats 6
    python examples/bypass_cost.py --widen 8 --task addition --repeats 3

The bundled model solves puzzles behind solved ones: 256 positions, blocks of 32, one token a step.
The policies step in turn, each decode is repeated, and of every step the shortest time counts. A
step that is sure runs no backward (`bypass`); "all steps" is the mean cost, "without" that of the
steps in which `boe` ran none, over the same steps of `confidence`.

The bundled network is so small that a step is mostly launches and Python. `--widen K` gives it K
times the width, the heads and the inner width of its MLPs, all of the new weights zero: it predicts
the same, but for rounding, at the arithmetic of a network so wide. How many tokens then are those
of the network as it is, and what share of the steps ran a backward there, is printed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import boe_vllm
from boe_vllm.denoiser import Denoiser
from boe_vllm.lab.tasks import TASKS
from boe_vllm.models.build import empty_model, load_tokenizer, read_config, read_tensors
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
        self.tokens: list[list[int]] = [[] for _ in prompts]

    def step(self) -> bool:
        """One step; whether another one follows."""
        canvases = list(self.loop.canvases.values())
        before = sum(canvas.account.backwards for canvas in canvases)
        start = time.process_time()
        results = self.loop.step(list(self.loop.canvases))
        self.seconds.append(time.process_time() - start)
        self.backward.append(sum(c.account.backwards for c in canvases) > before)
        for name, result in results.items():
            self.tokens[int(name)] += result.tokens
            if result.done:
                self.loop.remove(name)
        return bool(self.loop.canvases)


def denoiser_of(widen: int) -> Denoiser:
    """The bundled model, so many times as wide."""
    folder = boe_vllm.tiny_model_path()
    config = read_config(folder)
    for name in ("d_model", "n_heads", "n_kv_heads", "mlp_hidden_size"):
        setattr(config, name, widen * getattr(config, name))
    config.rms_norm_eps /= widen  # the mean square is that much smaller
    model = empty_model(config, dtype=torch.float32)
    rows = config.shape().embedding_rows
    model.load_weights((name, padded(x, widen, rows)) for name, x in read_tensors(folder))
    return Denoiser(model, load_tokenizer(folder, config))


def padded(tensor: torch.Tensor, widen: int, vocabulary: int) -> torch.Tensor:
    """A weight with zeros to its right and below, where it is no row per token; a norm's undoes
    that the root of a mean square over zeros as well is smaller."""
    if tensor.ndim == 1:
        return F.pad(tensor, (0, (widen - 1) * len(tensor))) / widen**0.5
    rows, columns = tensor.shape
    below = 0 if rows == vocabulary else (widen - 1) * rows
    return F.pad(tensor, (0, (widen - 1) * columns, 0, below))


def prompts_of(denoiser: Denoiser, task: str, requests: int) -> list[list[int]]:
    """As many solved puzzles as leave room for an answer, and one to solve."""
    most = LENGTH - TASKS[task].gen_length
    items = iter(TASKS[task].items(LENGTH // 8 * requests, seed=5))
    prompts, item = [], next(items)
    for _ in range(requests):
        solved = ""
        while True:
            tokens = denoiser.encode(solved + item.prompt)
            solved, item = solved + item.prompt + item.answer, next(items)
            if len(denoiser.encode(solved + item.prompt)) > most:
                break
        prompts.append(tokens)
    return prompts


def decodes_of(denoiser: Denoiser, prompts: list[list[int]]) -> dict[str, Decode]:
    """Decodes under every policy, which stepped in turn."""
    decodes = {name: Decode(denoiser, prompts, fields) for name, fields in CASES.items()}
    running = list(decodes.values())
    while running:
        running = [decode for decode in running if decode.step()]
    return decodes


def agreements(decodes: dict[str, Decode], prompts: list[list[int]]) -> Iterator[str]:
    """What of each decode the bundled network, as it is, does alike."""
    for name, plain in decodes_of(denoiser_of(1), prompts).items():
        own = decodes[name]
        same = np.array(own.tokens) == np.array(plain.tokens)
        share = f"{np.mean(plain.backward):.2f} of {len(plain.backward)} steps with a backward"
        yield f"{name}: {same.sum()} of {same.size} tokens as without --widen; there {share}"


def main() -> None:
    """Decode, and print one line for each policy."""
    parser = argparse.ArgumentParser(description="The cost of boe on whole decodes.")
    parser.add_argument("--task", choices=TASKS, default="sudoku6")
    parser.add_argument("--widen", type=int, default=1)
    parser.add_argument("--requests", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=6)
    args = parser.parse_args()
    torch.set_num_threads(1)
    denoiser = denoiser_of(args.widen)
    prompts = prompts_of(denoiser, args.task, args.requests)
    times: dict[str, list[list[float]]] = {name: [] for name in CASES}
    for _ in range(args.repeats):
        decodes = decodes_of(denoiser, prompts)
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
    if args.widen > 1:
        print(*agreements(decodes, prompts), sep="\n")


if __name__ == "__main__":
    main()
