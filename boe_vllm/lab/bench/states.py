"""Single denoising steps at a chosen state: so many requests, so long, so many masked positions.

A state is given to the loop as a prompt with masks in it, which are written like any others: a
sequence of `L` positions of which the last `block` are the current block and `masked` of them,
drawn at random, are still masked. One token is committed per step.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from boe_vllm.base.arrays import IntArray
from boe_vllm.decoding.loop import DenoisingLoop, StepResult
from boe_vllm.lab.bench.flops import StepRows
from boe_vllm.models.decoder import Decoder
from boe_vllm.models.llada import LLaDAConfig
from boe_vllm.models.special import SpecialTokens
from boe_vllm.request.config import SamplerConfig, parse_sampler_config
from boe_vllm.request.resolved import ResolvedRequest, plan_canvas

DENSE = "dense"
"""The naive step of `bench.dense`, beside the variants."""
RANKING: dict[str, Any] = {"policy": "boe", "preset": "kv"}
"""The paper's ranking in every step with a choice, without a floor; a surrogate goes on top."""
VARIANTS: dict[str, dict[str, Any]] = {
    "confidence": {"policy": "confidence"},
    "mask": {**RANKING, "surrogate": "mask"},
    "mask, all": {**RANKING, "surrogate": "mask", "active": "all"},
    "kv": {**RANKING, "surrogate": "kv"},
    "kv, all": {**RANKING, "surrogate": "kv", "active": "all"},
    "inject frozen": {**RANKING, "surrogate": "inject", "context": "frozen"},
    "inject exact": {**RANKING, "surrogate": "inject", "context": "exact"},
    "inject exact, all": {
        **RANKING,
        "surrogate": "inject",
        "context": "exact",
        "active": "all",
    },
}
"""What a step can be: the plain one, and each way to steer, with masked or all rows active."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """Requests of equal length in the middle of a block."""

    tokens: IntArray
    """[requests, L] token ids."""
    masked: IntArray
    """[requests, M] masked positions, ascending."""


def draw_state(
    config: LLaDAConfig, *, requests: int, length: int, block: int, masked: int, seed: int
) -> State:
    """Random tokens with `masked` of the last `block` positions masked, the last one among them."""
    rng = np.random.default_rng([seed, length, block, masked])
    words = np.setdiff1d(
        np.arange(config.vocab_size), [config.mask_token_id, config.eos_token_id or 0]
    )
    tokens = rng.choice(words, (requests, length))
    places = [rng.choice(block - 1, masked - 1, replace=False) for _ in range(requests)]
    ends = np.full((requests, 1), block - 1)
    inside = np.concatenate([np.array(places, np.int64).reshape(requests, -1), ends], 1)
    positions = length - block + np.sort(inside, 1)
    np.put_along_axis(tokens, positions, config.mask_token_id, 1)
    return State(tokens=tokens, masked=positions)


def open_loop(args: argparse.Namespace, model: Decoder) -> DenoisingLoop:
    """A loop over the model, without requests."""
    config = model.config
    return DenoisingLoop(
        model,
        special=SpecialTokens(mask=config.mask_token_id, eos=config.eos_token_id or 0),
        device=torch.device(args.device),
    )


def clear(loop: DenoisingLoop) -> None:
    """Forget all requests."""
    for request_id in list(loop.canvases):
        loop.remove(request_id)


def open_request(
    loop: DenoisingLoop,
    number: int,
    prompt: list[int],
    config: SamplerConfig,
    *,
    canvas: int,
    temperature: float = 0.0,
) -> None:
    """Put a request into the loop, with its number for name and seed.

    Args:
        loop: where to.
        number: of the request.
        prompt: token ids.
        config: its settings.
        canvas: tokens of its canvas.
        temperature: of its draws; 0 is greedy.
    """
    length = len(prompt) + canvas
    plan = plan_canvas(config, prompt_len=len(prompt), max_tokens=canvas, max_model_len=length)
    params = ResolvedRequest(config=config, plan=plan, temperature=temperature, seed=number)
    loop.add(str(number), prompt, params)


def one_step(
    loop: DenoisingLoop, state: State, fields: Mapping[str, Any]
) -> Callable[[], dict[str, StepResult]]:
    """Put the state's requests into the loop, in place of any others, and return the step."""
    clear(loop)
    config = parse_sampler_config(fields)
    for n, tokens in enumerate(state.tokens):
        open_request(loop, n, tokens[:-1].tolist(), config, canvas=1)
    return lambda: loop.step(list(loop.canvases))


def variant_fields(name: str, rho: float) -> dict[str, Any]:
    """A variant as a request would name it."""
    fields = VARIANTS[name]
    return {**fields, "rho": rho} if fields["policy"] == "boe" else dict(fields)


def candidates_of(masked: int, fields: Mapping[str, Any]) -> int:
    """|C| in a state with `masked` positions; 0 where the step does not steer: with one candidate
    for one token there is nothing to choose."""
    if fields["policy"] != "boe":
        return 0
    count = math.ceil(fields["rho"] * masked)
    return count if count > 1 else 0


def rows_of(length: int, masked: int, fields: Mapping[str, Any]) -> StepRows:
    """What one request's step computes."""
    count = candidates_of(masked, fields)
    if not count:
        return StepRows(live=length, keys=length, logits=masked)
    kept = length if fields.get("active") == "all" else masked
    second = second_logits = 0
    if fields["surrogate"] == "kv":
        second = count
    elif fields["surrogate"] == "inject":
        second = length if fields["context"] == "exact" else masked
        second_logits = masked
    return StepRows(
        live=length,
        keys=length,
        logits=masked,
        kept=kept,
        second=second,
        candidates=count,
        second_logits=second_logits,
    )
