"""States from real decodes: unseen puzzles, written by confidence one token a step, and stopped.

`pass_over` is the step's own forward over such states, as the loop makes it; `one_step` puts them
into a loop, as requests that begin in the middle.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from boe_vllm.arrays import IntArray
from boe_vllm.config import SamplerConfig, parse_sampler_config, plan_canvas
from boe_vllm.engine.canvas import RequestParams
from boe_vllm.engine.loop import DenoisingLoop
from boe_vllm.prediction import LogProbabilities, RowStatistics, RowWrites, read_statistics
from boe_vllm.rows import SequenceRows, pack
from boe_vllm.steering.step import DenoisingPass, NextStep
from boe_vllm.tasks import GeneratedTask

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
    prompts = {n: tokenizer.encode(items[n].prompt, add_special_tokens=False).ids for n in numbers}
    _open(loop, {n: (prompt, config, length) for n, prompt in prompts.items()})
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
    """The forward over the states with all that asks may need, and its statistics per state."""
    sequences = tuple(
        SequenceRows(tokens=state.tokens, logit_positions=state.masked, keep="masked")
        for state in states
    )
    layout = pack(sequences, loop.device)
    hidden, tape = loop.model.run(loop.model.embed(layout.tokens), layout)
    none = np.zeros(len(hidden), np.int64)
    log_probs = LogProbabilities(
        loop.model,
        hidden,
        mask_token_id=loop.mask_token_id,
        eos_token_id=loop.eos_token_id,
        forbidden=none,
        budget_bytes=loop.budget_bytes,
    )
    writes = RowWrites(temperature=np.zeros(len(hidden)), uniform=np.full(len(hidden), 0.5))
    statistics = read_statistics(log_probs, writes, keep=True)
    current = DenoisingPass(
        model=loop.model,
        sequences=sequences,
        layout=layout,
        log_probs=log_probs,
        tape=tape,
        next_steps=tuple(
            NextStep(temperature=0.0, uniforms=lambda positions: np.full(len(positions), 0.5))
            for _ in states
        ),
        row_budget=loop.row_budget,
    )
    starts = layout.logit_starts
    parts = [
        statistics.part(slice(start, start + len(state.masked)))
        for start, state in zip(starts, states, strict=True)
    ]
    return current, parts


def one_step(
    loop: DenoisingLoop, states: Sequence[DecodedState], fields: Mapping[str, Any]
) -> Callable[[], Any]:
    """Put the states into the loop, in place of whatever was there, and return the step."""
    requests = {}
    for n, state in enumerate(states):
        start = len(state.tokens) - state.canvas
        template = _template(state.tokens[start:], loop.mask_token_id)
        config = parse_sampler_config(
            {"block_length": state.canvas, "canvas_template": template, **fields},
            base=SamplerConfig(),
        )
        requests[n] = (state.tokens[:start].tolist(), config, state.canvas)
    _open(loop, requests)
    return lambda: loop.step(list(loop.canvases))


def _open(
    loop: DenoisingLoop, requests: Mapping[int, tuple[list[int], SamplerConfig, int]]
) -> None:
    """The loop with these requests (prompt, settings, canvas) and no others."""
    for request_id in list(loop.canvases):
        loop.remove(request_id)
    longest = loop.model.config.max_sequence_length
    for n, (prompt, config, canvas) in requests.items():
        plan = plan_canvas(config, prompt_len=len(prompt), max_tokens=canvas, max_model_len=longest)
        params = RequestParams(config=config, plan=plan, temperature=0.0, seed=n)
        loop.add(str(n), prompt, params)


def _template(canvas: IntArray, mask: int) -> list[int | list[int]]:
    """A canvas as a request would give it: runs of tokens, and numbers of masks."""
    pieces: list[int | list[int]] = []
    ends = np.flatnonzero(np.diff(canvas == mask)) + 1
    for run in np.split(canvas, ends):
        pieces.append(len(run) if run[0] == mask else run.tolist())
    return pieces
