"""Whether two decoders that should agree do, and whether a difference is a tie that rounding broke.

Baseline and engine sum in different orders, so two confidences or two logits that are equal up to
rounding may come out in either order, after which the canvases go their own ways. Such a difference
is accepted if float64 says that it was a tie; any other is an error.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from boe_vllm.lab.bench.baseline import GRID, PlainLLaDA

CLOSE = 1e-4
"""Probabilities that differ by less, relative to the larger, are a tie in float32."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Commits:
    """How one canvas was written."""

    tokens: np.ndarray
    """[G] the tokens."""
    step_of: np.ndarray
    """[G] the step in which each was committed."""


def from_trace(trace: dict[str, Any]) -> Commits:
    """The commits that a request's report tells of."""
    order = np.argsort(trace["position"])
    return Commits(tokens=np.array(trace["token"])[order], step_of=np.array(trace["step"])[order])


def is_tie(
    exact: PlainLLaDA, prompt: list[int], ours: Commits, theirs: Commits, block_length: int
) -> bool:
    """Whether the first difference of two decodings of a prompt is a tie.

    Args:
        exact: the network in float64.
        prompt: token ids.
        ours, theirs: the two decodings.
        block_length: tokens of a block.
    """
    step = _first_difference(ours, theirs)
    mine, other = ours.step_of == step, theirs.step_of == step
    blocks = np.arange(len(ours.tokens)) // block_length
    if mine.sum() != other.sum() or len(np.unique(blocks[mine | other])) != 1:
        return False  # not even the same schedule
    canvas = np.where(ours.step_of < step, ours.tokens, exact.config.mask_token_id)
    state = torch.from_numpy(np.concatenate([prompt, canvas]))[None].to(exact.device)
    with torch.no_grad():
        logits = exact(state)[0, len(prompt) :]
    logits[:, exact.config.mask_token_id] = -torch.inf
    probabilities = logits.softmax(-1).cpu().numpy()
    for position in np.flatnonzero(mine & other & (ours.tokens != theirs.tokens)):
        p = probabilities[position, [ours.tokens[position], theirs.tokens[position]]]
        if abs(p[0] - p[1]) > CLOSE * p.max():
            return False
    best = probabilities.max(-1)
    # What one side took and the other left: confidences may differ by a rounding to the grid.
    left, right = np.sort(best[mine & ~other]), np.sort(best[other & ~mine])
    return bool((np.abs(left - right) <= 2 * GRID).all())


def _first_difference(ours: Commits, theirs: Commits) -> int:
    """The first step in which the two commit other positions or other tokens."""
    differ = (ours.step_of != theirs.step_of) | (ours.tokens != theirs.tokens)
    if not differ.any():
        raise ValueError("commits: expected two decodings that differ, got equal ones")
    return int(np.minimum(ours.step_of, theirs.step_of)[differ].min())
