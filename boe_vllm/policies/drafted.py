"""Sets whose size a bound decides, with the next steps' sets drafted and looked at in one pass.

What the bound allows of the step's prediction is written. What it allows of the rest is the draft
of the next step, what it allows of the rest of that the draft of the step after it, and so on. One
pass computes the state after the first set and after each draft, all rows of each. Each draft is
held against the prediction of the state before it, and the first that does not hold ends them: what
was drafted until then is written, and the last state's prediction serves the next step. So a step
of this kind costs one wide pass and stands for as many steps as drafts hold.

With no slack a draft holds if it is what the bound would write there, position by position, and the
tokens are those of the bound without drafts, as FreeDave has it (arXiv 2510.00294). Above
temperature 0 that takes draws that can be compared: a position's token is drawn by one random
number in all states (`Needs.same_draws`). With some slack a draft holds if the bound allows it
there and the least sure of it is so much less sure, at most, than what the bound would write.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from typing import Any

import numpy as np

from boe_vllm.base.arrays import FloatArray, IntArray
from boe_vllm.policies.base import Commit, View
from boe_vllm.policies.bounded import Bound, bounded_set
from boe_vllm.steering.lookahead import Lookahead, Prospect
from boe_vllm.steering.step import Query


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Drafting:
    """How far ahead is drafted, and when a draft holds."""

    drafts: int
    """Most of them in a step."""
    slack: float | None
    """Entropy by which a draft's least sure position may exceed that of the set that the bound
    would write, nats; None where it has to be that set."""


def drafted_commit(
    view: View, first: IntArray, scores: FloatArray, bound: Bound, drafting: Drafting
) -> Generator[Query[Any], Any, tuple[Commit, Prospect | None]]:
    """The first set with the drafts that hold, and the state that they lead to if it was computed.

    Args:
        view: of the request.
        first: [b] indices that are written in any case.
        scores: [M] to be reported.
        bound: what is written from one prediction.
        drafting: see there.
    """
    chunks = drafts_of(view, first, bound, drafting.drafts)
    sets = [np.sort(np.concatenate([first, *chunks[:n]])) for n in range(len(chunks) + 1)]
    if len(first) == len(view.positions):
        return Commit(chosen=first, scores=scores), None
    states: list[Prospect] = yield Lookahead(
        writes=tuple(sets),
        tokens=tuple(view.proposal[own] for own in sets),
        carry=True,
        wide=True,
    )
    held = 0
    while held < len(chunks) and holds(
        view, chunks[held], states[held], bound, slack=drafting.slack
    ):
        held += 1
    reached = states[held]
    carry = reached.carry if len(reached.index) else None
    return Commit(chosen=sets[held], scores=scores, carry=carry), reached


def drafts_of(view: View, first: IntArray, bound: Bound, count: int) -> list[IntArray]:
    """What the bound allows after the first set, again and again, if nothing is predicted anew.

    What may only be committed last is in no draft.
    """
    left = np.setdiff1d(np.flatnonzero(np.isfinite(view.confidence)), first)
    chunks: list[IntArray] = []
    while len(left) and len(chunks) < count:
        chunks.append(left[bounded_set(view.entropy[left], view.confidence[left], bound)])
        left = np.setdiff1d(left, chunks[-1])
    return chunks


def holds(
    view: View, chunk: IntArray, state: Prospect, bound: Bound, *, slack: float | None
) -> bool:
    """Whether a state's own prediction writes a draft too."""
    confidence = view.committable(state.proposal, state.confidence)
    own = bounded_set(state.entropy, confidence, bound)
    place = np.searchsorted(state.index, chunk)
    if not np.array_equal(state.proposal[place], view.proposal[chunk]):
        return False
    if slack is None:
        return bool(np.array_equal(np.sort(place), np.sort(own)))
    if not np.isfinite(confidence[place]).all():
        return False
    entropy, likely = state.entropy[place], confidence[place]
    if len(bounded_set(entropy, likely, bound)) < len(place):
        return False
    return bool(entropy.max() <= state.entropy[own].max() + slack)


def drafted_rows(length: int, drafts: int) -> int:
    """Most rows that the states of one step compute.

    Args:
        length: rows of the whole request.
        drafts: of the settings.
    """
    return (drafts + 1) * length
