"""Processor time of a step of `boe` over one of `confidence`, on whole decodes, by kind of step.

    python examples/bypass_cost.py --requests 1 --repeats 6
    python examples/bypass_cost.py --widen 8 --solved 0 --requests 3 --repeats 3

The bundled model decodes a puzzle behind solved ones: 256 positions, blocks of 32, one token a
step. That is beyond the lengths it was trained on: it is unsure in many more steps than in the
decodes that it can do (`--solved 0`: a puzzle alone, in one block). The policies step in turn,
each decode is repeated, and of every step the shortest time counts. A step that is sure runs no
backward (`bypass`); "all steps" is the mean cost, "without" that of the steps in which `boe` ran
none, over the same steps of `confidence`. A step of several requests counts as "with" where at
least one of them ran a backward.

The bundled network is so small that a step is mostly launches and Python. `--widen K` gives it K
times the width, the heads and the inner width of its MLPs, all of the new weights zero: it predicts
the same, but for rounding, at the arithmetic of a network so wide. How many tokens then are those
of the network as it is, and what share of the steps ran a backward there, is printed.
"""

from __future__ import annotations

import argparse
import dataclasses
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


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What is decoded."""

    prompts: list[list[int]]
    canvas: int
    """Length, in tokens."""
    block: int


class Decode:
    """All requests under one policy, step by step."""

    def __init__(self, denoiser: Denoiser, asked: Asked, fields: dict[str, Any]):
        self.loop = denoiser.open_loop(0)
        settings = {"block_length": asked.block, "tokens_per_step": 1, **fields}
        for number, prompt in enumerate(asked.prompts):
            sampling = SamplingFields(max_tokens=asked.canvas, temperature=0.0, seed=number)
            self.loop.add(str(number), prompt, denoiser.resolve(prompt, sampling, settings))
        self.seconds: list[float] = []
        self.backward: list[bool] = []
        self.tokens: list[list[int]] = [[] for _ in asked.prompts]

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

    def kinds(self) -> str:
        """How many steps ran a backward."""
        return f"{np.mean(self.backward):.2f} of {len(self.backward)} steps with a backward"


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


def asked_of(denoiser: Denoiser, task: str, solved: int, requests: int) -> Asked:
    """For each request some solved puzzles and one to solve; one without any is a block."""
    count, own = solved + 1, TASKS[task].gen_length
    items = TASKS[task].items(count * requests, seed=5)
    texts = []
    for start in range(0, len(items), count):
        *before, last = items[start : start + count]
        texts.append("".join(item.prompt + item.answer for item in before) + last.prompt)
    prompts = [denoiser.encode(text) for text in texts]
    if not solved:
        return Asked(prompts=prompts, canvas=own, block=own)
    return Asked(prompts=prompts, canvas=LENGTH - max(map(len, prompts)), block=32)


def decodes_of(denoiser: Denoiser, asked: Asked) -> dict[str, Decode]:
    """Decodes under every policy, which stepped in turn."""
    decodes = {name: Decode(denoiser, asked, fields) for name, fields in CASES.items()}
    running = list(decodes.values())
    while running:
        running = [decode for decode in running if decode.step()]
    return decodes


def costs(decodes: dict[str, Decode], times: dict[str, list[list[float]]]) -> Iterator[str]:
    """One line for each policy, from the times of every repeat."""
    plain = np.min(times["confidence"], 0)
    for name, decode in decodes.items():
        own, steers = np.min(times[name], 0), np.array(decode.backward)
        parts = {"all steps": steers | True, "with": steers, "without": ~steers}
        ratios = {
            part: f"{own[steps].sum() / plain[steps].sum():.3f}"
            for part, steps in parts.items()
            if steps.any()
        }
        text = ", ".join(f"{part} {ratio}" for part, ratio in ratios.items())
        yield f"{name}: {decode.kinds()}; over confidence: {text}"


def agreements(decodes: dict[str, Decode], bundled: dict[str, Decode]) -> Iterator[str]:
    """What of each decode the bundled network, as it is, does alike."""
    for name, plain in bundled.items():
        same = np.array(decodes[name].tokens) == np.array(plain.tokens)
        yield f"{name}: {same.sum()} of {same.size} tokens as without --widen; {plain.kinds()}"


def main() -> None:
    """Decode, and print one line for each policy."""
    parser = argparse.ArgumentParser(description="The cost of boe on whole decodes.")
    parser.add_argument("--task", choices=TASKS, default="sudoku6")
    parser.add_argument("--solved", type=int, default=2, help="puzzles before the asked one")
    parser.add_argument("--widen", type=int, default=1, help="times the width, in zeros")
    parser.add_argument("--requests", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=6)
    args = parser.parse_args()
    torch.set_num_threads(1)
    denoiser = denoiser_of(args.widen)
    asked = asked_of(denoiser, args.task, args.solved, args.requests)
    times: dict[str, list[list[float]]] = {name: [] for name in CASES}
    for _ in range(args.repeats):
        decodes = decodes_of(denoiser, asked)
        for name, decode in decodes.items():
            times[name].append(decode.seconds)
    milliseconds = 1000 * np.min(times["confidence"], 0).mean()
    print(f"confidence: {milliseconds:.1f} ms a step")
    print(*costs(decodes, times), sep="\n")
    if args.widen > 1:
        print(*agreements(decodes, decodes_of(denoiser_of(1), asked)), sep="\n")


if __name__ == "__main__":
    main()
