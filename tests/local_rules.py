"""The local policies' rules once more: per-position Python, slow and obvious, from policies.md.

Each rule takes a `Masks` (what is known of the masked positions of a block) and returns the indices
that are written. Nothing of `boe_vllm.policies` is used.
"""

from __future__ import annotations

import dataclasses
import math


@dataclasses.dataclass
class Masks:
    """One step of one block; lists are indexed by masked position, ascending."""

    positions: list[int]
    tokens: list[int]
    confidence: list[float]
    margin: list[float]
    entropy: list[float]
    late: list[bool]
    """Proposals that may not be written before the others."""
    quota: int
    uniforms: list[float]
    block_start: int = 0
    kl: list[list[float]] = dataclasses.field(default_factory=list)
    """Each position's last KLs, oldest first."""
    block_step: int = 0
    grid_step: int = 0
    block_steps: int = 1


def best(scores, count, late=None):
    """Indices of the `count` best; of equal ones the lower index; late ones after the rest."""

    def key(i):
        return (1, 0, i) if late and late[i] else (0, -scores[i], i)

    return sorted(range(len(scores)), key=key)[:count]


def gumbel(scores, alg_temp, uniforms):
    return [s / alg_temp - math.log(-math.log(u)) for s, u in zip(scores, uniforms, strict=True)]


def certainty(masks, name, alg_temp=0.0):
    scores = {
        "confidence": masks.confidence,
        "margin": masks.margin,
        "entropy": [-h for h in masks.entropy],
    }[name]
    if alg_temp > 0:
        scores = gumbel(scores, alg_temp, masks.uniforms)
    return best(scores, masks.quota, masks.late)


def random(masks):
    return best(masks.uniforms, masks.quota, masks.late)


def confident_random(masks, rho=0.5):
    count = max(masks.quota, math.ceil(rho * len(masks.positions)))
    candidates = set(best(masks.confidence, count, masks.late))
    order = best(masks.uniforms, len(masks.positions), masks.late)
    return [i for i in order if i in candidates][: masks.quota]


def origin(masks, eps=1e-3):
    """Returns the indices and the grid step that reveals them."""
    steps = masks.block_steps
    times = [1.0 + (eps - 1.0) * i / steps for i in range(steps + 1)]
    for step in range(masks.grid_step, steps):
        revealed = []
        for i, u in enumerate(masks.uniforms):
            waits = masks.late[i] and not all(masks.late)
            if step == steps - 1 or (
                not waits and u < 1.0 - times[step + 1] / times[masks.grid_step]
            ):
                revealed.append(i)
        if revealed:
            return revealed, step
    raise AssertionError("the last step reveals the rest")


def ancestral(masks, eps=1e-5):
    """MDLM's loop (`diffusion.py`, `_sample`): its grid step by step, then its noise removal."""
    steps = masks.block_steps
    dt = (1 - eps) / steps
    for step in range(masks.grid_step, steps):
        s = (1 - step * dt) - dt
        begin = 1 - masks.grid_step * dt
        waits = [late and not all(masks.late) for late in masks.late]
        revealed = [
            i for i, u in enumerate(masks.uniforms) if not waits[i] and u < (begin - s) / begin
        ]
        if revealed:
            return revealed, step
    return list(range(len(masks.uniforms))), steps


def eb(masks, gamma=0.1, proxy="entropy"):
    error = {
        "entropy": masks.entropy,
        "confidence": [-p for p in masks.confidence],
        "margin": [-m for m in masks.margin],
    }[proxy]
    order = best([-e for e in error], len(error), masks.late)
    count = 0
    for k in range(1, len(order) + 1):
        chosen = [masks.entropy[i] for i in order[:k]]
        total = 0.0
        for h in chosen:
            total += h
        if total - max(chosen) <= gamma:
            count = k
    most = max(1, len(order) - sum(masks.late))
    return order[: min(max(1, count), most)]


def pc(masks, counts, total, lambd=0.25, alpha=10.0):
    scores = []
    for i, position in enumerate(masks.positions):
        f = counts.get(masks.tokens[i], 1) / total
        calibrated = min(-masks.confidence[i] * math.log(f + 1e-9), alpha)
        place = max(position - masks.block_start, 0)
        scores.append(-lambd * place + (math.log(calibrated) if calibrated > 0 else -math.inf))
    return best(scores, masks.quota, masks.late)


def threshold(masks, threshold=0.9):
    sure = [i for i, p in enumerate(masks.confidence) if p >= threshold and not masks.late[i]]
    return sorted(set(sure) | set(best(masks.confidence, 1, masks.late)))


def factor(masks, factor=1.0):
    values = sorted(
        (-math.inf if late else p for p, late in zip(masks.confidence, masks.late, strict=True)),
        reverse=True,
    )
    n = 1
    while n < len(values) and values[n] >= 1 - factor / (n + 1 + 1):
        n += 1
    return best(masks.confidence, n, masks.late)


def klass(masks, confidence_threshold=0.9, kl_threshold=0.01, history=2):
    ready = []
    for i, p in enumerate(masks.confidence):
        stable = len(masks.kl[i]) >= history and all(
            kl < kl_threshold for kl in masks.kl[i][-history:]
        )
        if stable and masks.block_step >= history - 1 and p > confidence_threshold:
            if not masks.late[i]:
                ready.append(i)
    return ready or best(masks.confidence, masks.quota, masks.late)


def linear_quota(masks, steps, step):
    return masks // steps + (1 if step < masks % steps else 0)


def cosine_total(masks, steps, step):
    """Written after `step` (from 1) of `steps`, in exact thirds and halves where they occur."""
    return math.ceil(round(masks * (1 - math.cos(math.pi * step / (2 * steps))), 9))
