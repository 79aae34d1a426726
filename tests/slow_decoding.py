"""A whole request decoded slowly and obviously: one dense forward after another, one position at a
time, by policies.md. What the engine must commit at temperature 0, step by step."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import local_rules
import torch
from oracle import Dense
from safetensors.torch import load_file

import boe_vllm
from boe_vllm.models.llada import LLaDAConfig
from boe_vllm.sampling import randomness

TINY = Path(boe_vllm.__file__).parent / "assets" / "tiny-llada"


def bundled() -> tuple[LLaDAConfig, dict[str, torch.Tensor]]:
    """The bundled model in float64."""
    config = LLaDAConfig(**json.loads((TINY / "config.json").read_text()))
    return config, {k: v.double() for k, v in load_file(TINY / "model.safetensors").items()}


@dataclasses.dataclass
class Decoded:
    tokens: list[int]
    step_of: list[int]
    """For each position of the canvas, the step that wrote it."""
    steps: int
    changes: list[dict[int, float]]
    """Per step, the KL of each masked position of the block from the step before."""


def decode(
    dense: Dense,
    prompt: list[int],
    rule: Callable,
    *,
    gen_length: int,
    block_length: int,
    tokens_per_step: int = 1,
    schedule: str = "linear",
    cfg_scale: float = 0.0,
    seed: int = 0,
    late_tokens: tuple[int, ...] = (),
    history: int = 2,
) -> Decoded:
    """Decode at temperature 0; `rule` is one of `local_rules`."""
    mask = dense.config.mask_token_id
    x = list(prompt) + [mask] * gen_length
    given = [token != mask for token in x]
    before = None
    kls = [[0.0] * history for _ in x]  # as KLASS begins
    written_at = [-1] * len(x)
    total = 0
    changes = []
    for begin in range(len(prompt), len(x), block_length):
        start = 0 if begin == len(prompt) else begin
        end = min(begin + block_length, len(x))
        count = sum(x[i] == mask for i in range(start, end))
        steps = math.ceil(count / tokens_per_step)
        step = grid_step = 0
        while any(x[i] == mask for i in range(start, end)):
            logits = dense.logits(dense.embed(torch.tensor(x)))
            if cfg_scale > 0:
                empty = torch.tensor([mask if g else t for t, g in zip(x, given, strict=True)])
                without = dense.logits(dense.embed(empty))
                logits = without + (cfg_scale + 1) * (logits - without)
            logits[:, mask] = -1e30
            p = logits.softmax(-1)
            for i in range(len(x)):
                then = torch.zeros_like(p[i]) if before is None else before[i]
                change = (p[i] * ((p[i] + 1e-12).log() - (then + 1e-12).log())).sum()
                kls[i] = [*kls[i][1:], float(change)]
            before = p
            masked = [i for i in range(start, end) if x[i] == mask]
            changes.append({i: kls[i][-1] for i in masked})
            if schedule == "linear":
                quota = max(1, local_rules.linear_quota(count, steps, step))
            else:
                done = count - len(masked)
                quota = max(1, local_rules.cosine_total(count, steps, min(step + 1, steps)) - done)
            tokens = [int(p[i].argmax()) for i in masked]
            largest = [sorted(p[i].tolist(), reverse=True)[:2] for i in masked]
            numbers = randomness.uniforms(
                seed, step=total, positions=torch.tensor(masked).numpy(), stream=randomness.CHOOSE
            )
            chosen = rule(
                local_rules.Masks(
                    positions=masked,
                    tokens=tokens,
                    confidence=[best for best, _ in largest],
                    margin=[best - second for best, second in largest],
                    entropy=[-sum(q * math.log(q) for q in p[i].tolist() if q > 0) for i in masked],
                    late=[token in late_tokens for token in tokens],
                    quota=min(quota, len(masked)),
                    uniforms=numbers.tolist(),
                    block_start=begin,
                    kl=[kls[i] for i in masked],
                    block_step=step,
                    grid_step=grid_step,
                    block_steps=steps,
                )
            )
            if isinstance(chosen, tuple):  # origin says which grid step as well
                chosen, grid_step = chosen[0], chosen[1] + 1
            for i in chosen:
                x[masked[i]] = tokens[i]
                written_at[masked[i]] = total
            step += 1
            total += 1
    return Decoded(x[len(prompt) :], written_at[len(prompt) :], total, changes)
