"""Passes of real decodes: the loop steps a small network at the lengths that are asked about.

Which passes a step makes, and over how many rows, follows from the policy and the lengths, and not
from the network's width, so that a small network stands for a large one. What depends on how sure
the predictions are depends on the weights as well: random ones are never sure, which makes the most
rounds; the bundled checkpoint on its own puzzles is as sure as a trained network is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import boe_vllm
from boe_vllm.decoding.loop import DenoisingLoop
from boe_vllm.lab.bench.passes import Recorder, Step
from boe_vllm.lab.bench.scenarios import Fields
from boe_vllm.lab.bench.states import open_request
from boe_vllm.lab.tasks import get_task
from boe_vllm.models.build import load_model, random_model
from boe_vllm.models.decoder import Decoder
from boe_vllm.models.llada import LLaDAConfig
from boe_vllm.models.special import SpecialTokens
from boe_vllm.request.config import parse_sampler_config

PUZZLES = ("sudoku6", "sudoku6-few", "addition")
FEWEST = 8
"""Puzzles of each kind."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Of every request, in tokens."""

    prompt: int
    canvas: int
    block: int
    tokens_per_step: int

    @property
    def steps(self) -> int:
        """Denoising steps of a block."""
        return -(-self.block // self.tokens_per_step)


def loop_over(model: Decoder, *, cache_rows: int = 0, **options: Any) -> DenoisingLoop:
    """A loop without requests, where the model lives; `options` are the loop's own."""
    config = model.config
    return DenoisingLoop(
        model,
        special=SpecialTokens(mask=config.mask_token_id, eos=config.eos_token_id or 0),
        device=model.ln_f.device,
        cache_rows=cache_rows,
        **options,
    )


def random_prompts(vocabulary: int, requests: int, length: int) -> list[list[int]]:
    """Token ids below the last three, which random models keep for EOS and the mask."""
    return [
        np.random.default_rng(n).integers(0, vocabulary - 3, length).tolist()
        for n in range(requests)
    ]


def fill(
    loop: DenoisingLoop,
    fields: Fields,
    prompts: Sequence[list[int]],
    *,
    canvas: int,
    temperature: float = 0.0,
) -> None:
    """Open a request for each prompt."""
    config = parse_sampler_config(fields)
    for number, prompt in enumerate(prompts):
        open_request(loop, number, prompt, config, canvas=canvas, temperature=temperature)


def step_all(loop: DenoisingLoop) -> None:
    """One step of all requests that are not finished.

    Raises:
        RuntimeError: when one of them cannot go on.
    """
    results = loop.step([name for name, canvas in loop.canvases.items() if not canvas.done])
    for name, result in results.items():
        if result.error:
            raise RuntimeError(f"request {name}: {result.error}")


def count_random(
    fields: Fields, requests: int, lengths: Lengths, most: int | None = None
) -> list[Step]:
    """The first `most` steps under random weights; by default those of one block."""
    model = _random_network()
    room = requests * (lengths.prompt + lengths.canvas)
    loop = loop_over(model, cache_rows=room if "cache" in fields else 0)
    settings = {
        "block_length": lengths.block,
        "tokens_per_step": lengths.tokens_per_step,
        **fields,
    }
    prompts = random_prompts(model.vocab_size, requests, lengths.prompt)
    fill(loop, settings, prompts, canvas=lengths.canvas)
    return _record(loop, most or lengths.steps)


def puzzles(requests: int) -> int:
    """How many answers `count_puzzles` decodes: whole batches, at least `FEWEST` of each kind."""
    return len(PUZZLES) * requests * -(-FEWEST // requests)


def count_puzzles(fields: Fields, requests: int, tokens_per_step: int) -> list[Step]:
    """All steps of the bundled checkpoint on `puzzles(requests)` unseen puzzles, so many at a time,
    at their own lengths.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(boe_vllm.tiny_model_path()) / "tokenizer.json"))
    counted: list[Step] = []
    for name in PUZZLES:
        task = get_task(name)
        items = task.items(puzzles(requests) // len(PUZZLES), seed=0, split="test")
        prompts = [tokenizer.encode(item.prompt, add_special_tokens=False).ids for item in items]
        settings = {
            "block_length": task.gen_length,
            "tokens_per_step": tokens_per_step,
            **fields,
        }
        for start in range(0, len(prompts), requests):
            together = prompts[start : start + requests]
            room = sum(len(prompt) + task.gen_length for prompt in together)
            loop = loop_over(_bundled_network(), cache_rows=room if "cache" in fields else 0)
            fill(loop, settings, together, canvas=task.gen_length)
            counted += _record(loop, task.gen_length)
    return counted


@torch.inference_mode()
def _record(loop: DenoisingLoop, most: int) -> list[Step]:
    """At most so many steps, fewer if all requests are finished before."""
    with Recorder(loop).recording() as steps:
        while len(steps) < most and not all(canvas.done for canvas in loop.canvases.values()):
            step_all(loop)
    return steps


@functools.cache
def _random_network() -> Decoder:
    vocabulary = 512
    return random_model(
        LLaDAConfig(
            d_model=16,
            n_layers=1,
            n_heads=2,
            mlp_hidden_size=32,
            vocab_size=vocabulary,
            mask_token_id=vocabulary - 1,
            eos_token_id=vocabulary - 2,
            pad_token_id=vocabulary - 2,
        )
    )


@functools.cache
def _bundled_network() -> Decoder:
    return load_model(boe_vllm.tiny_model_path())
