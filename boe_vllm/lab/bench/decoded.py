"""States from real decodes: unseen puzzles, written by confidence one token a step, and stopped.

They are put into a loop as requests that begin in the middle: `pass_over` is the loop's own forward
over them, `one_step` a whole step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from boe_vllm.base.arrays import IntArray
from boe_vllm.decoding.loop import DenoisingLoop
from boe_vllm.lab.bench.states import clear, open_request
from boe_vllm.lab.tasks import GeneratedTask
from boe_vllm.request.config import SamplerConfig, parse_sampler_config
from boe_vllm.sampling.statistics import RowStatistics
from boe_vllm.steering.step import DenoisingPass

PHASES = {"early": 5 / 6, "middle": 1 / 2, "late": 2 / 9}
"""Share of the canvas that is still masked."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DecodedState:
    """A sequence in the middle of its decode."""

    task: str
    item: int
    """Number of the item it comes from; states of an item depend on each other."""
    phase: str
    tokens: IntArray
    """[L] token ids of prompt and canvas."""
    masked: IntArray
    """[M] masked positions, ascending."""
    canvas: int
    """Length of the canvas."""


def decoded_states(
    loop: DenoisingLoop,
    tokenizer: Tokenizer,
    tasks: Sequence[GeneratedTask],
    *,
    items: int,
    seed: int,
    together: int = 64,
) -> list[DecodedState]:
    """All phases of `items` test items of every task, items side by side `together` at a time."""
    return [
        state
        for task in tasks
        for first in range(0, items, together)
        for state in _decode(
            loop, tokenizer, task, range(first, min(first + together, items)), seed
        )
    ]


def _decode(
    loop: DenoisingLoop, tokenizer: Tokenizer, task: GeneratedTask, numbers: range, seed: int
) -> list[DecodedState]:
    length = task.gen_length
    config = parse_sampler_config({"policy": "confidence", "block_length": length})
    items = task.items(numbers.stop, seed=seed, split="test")
    clear(loop)
    for n in numbers:
        prompt = tokenizer.encode(items[n].prompt, add_special_tokens=False).ids
        open_request(loop, n, prompt, config, canvas=length)
    stops = {round(share * length): phase for phase, share in PHASES.items()}
    states = []
    for left in range(length, min(stops) - 1, -1):
        if left in stops:
            for n in numbers:
                canvas = loop.canvases[str(n)]
                states.append(
                    DecodedState(
                        task=task.name,
                        item=n,
                        phase=stops[left],
                        tokens=canvas.tokens.copy(),
                        masked=np.flatnonzero(canvas.masked),
                        canvas=length,
                    )
                )
        loop.step(list(loop.canvases))
    return states


def pass_over(
    loop: DenoisingLoop, states: Sequence[DecodedState]
) -> tuple[DenoisingPass, list[RowStatistics]]:
    """The forward over the states with all that queries may need, and its statistics per state."""
    _open(loop, states, {"policy": "boe", "preset": "kv"})  # which keeps the masked rows
    _, current, statistics = loop.predict(list(loop.canvases.values()))
    parts = [
        statistics.part(slice(start, start + len(state.masked)))
        for start, state in zip(current.layout.logit_starts, states, strict=True)
    ]
    return current, parts


def one_step(
    loop: DenoisingLoop, states: Sequence[DecodedState], fields: Mapping[str, Any]
) -> Callable[[], Any]:
    """Put the states into the loop, in place of whatever was there, and return the step."""
    _open(loop, states, fields)
    return lambda: loop.step(list(loop.canvases))


def _open(loop: DenoisingLoop, states: Sequence[DecodedState], fields: Mapping[str, Any]) -> None:
    """The loop with requests that begin in these states and no others."""
    clear(loop)
    for n, state in enumerate(states):
        start = len(state.tokens) - state.canvas
        template = _template(state.tokens[start:], loop.special.mask)
        config = parse_sampler_config(
            {"block_length": state.canvas, "canvas_template": template, **fields},
            base=SamplerConfig(),
        )
        open_request(loop, n, state.tokens[:start].tolist(), config, canvas=state.canvas)


def _template(canvas: IntArray, mask: int) -> list[int | list[int]]:
    """A canvas as a request would give it: runs of tokens, and numbers of masks."""
    pieces: list[int | list[int]] = []
    ends = np.flatnonzero(np.diff(canvas == mask)) + 1
    for run in np.split(canvas, ends):
        pieces.append(len(run) if run[0] == mask else run.tolist())
    return pieces
