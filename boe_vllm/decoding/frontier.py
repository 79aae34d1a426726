"""A request whose canvas is written from left to right only, since its grammar asks for it.

Its policy decides as ever, on a view in which only the frontier may be written: the proposals from
the first mask on that the grammar takes one after the other. A position of it can only be written
with those before it, so that it is as sure as the least sure of them. How many are written is the
policy's: the longest beginning of the frontier that it has chosen, or as many as it has chosen, at
most those that are due.

Legend: `M` masked positions that may be written now.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from boe_vllm.base.arrays import FloatArray, IntArray
from boe_vllm.policies.base import Commit, View, finishing
from boe_vllm.sampling.frontier import FrontierGrammar

if TYPE_CHECKING:
    from boe_vllm.decoding.canvas import Canvas


def narrowed(view: View, canvas: Canvas) -> View:
    """The view in which only the frontier may be written."""
    frontier = _taken_in(canvas)
    first = _first(view, canvas)
    run = _run(view, frontier, first)
    until = first + max(1, run)  # where the proposal does not stand, something else will

    def least(values: FloatArray) -> FloatArray:
        found = np.full(len(values), -np.inf)
        found[:first] = values[:first]  # masks in the prompt, which no grammar is about
        found[first:until] = np.minimum.accumulate(values[first:until])
        return found

    return dataclasses.replace(
        view,
        confidence=least(view.confidence),
        margin=least(view.margin),
        entropy=np.where(np.arange(len(view.entropy)) < until, -least(-view.entropy), view.entropy),
        quota=min(view.quota, until),
    )


def along(commit: Commit, view: View, canvas: Canvas) -> Commit:
    """What is written of a policy's decision.

    At least one position is written, unless the policy wants to write none: where its token does
    not stand, one that does.
    """
    if commit.idle:
        return commit
    if canvas.blocks.last_step:
        commit = finishing(commit, view)
    tokens = view.proposal[commit.chosen] if commit.tokens is None else commit.tokens
    wanted = dict(zip(commit.chosen.tolist(), tokens.tolist(), strict=True))
    first = _first(view, canvas)
    written = {n: token for n, token in wanted.items() if n < first}
    due = min(len(wanted) - len(written), view.quota)
    frontier = _taken_in(canvas)
    for n in range(first, len(view.positions) if due else first):
        if n not in wanted and n - first >= due:
            break
        token = wanted.get(n, int(view.proposal[n]))
        if not frontier.take(token):
            if n > first:
                break
            token = frontier.sure
        written[n] = token
    return dataclasses.replace(
        commit,
        chosen=np.array(list(written), np.int64),
        tokens=np.array(list(written.values()), np.int64),
        carry=None,
    )


def remasked_with(positions: IntArray, canvas: Canvas) -> IntArray:
    """Positions to be masked again, and all of the block behind them, which stands on them."""
    written = canvas.blocks.written(canvas.masked)
    first = positions[positions >= canvas.prompt_len].min(initial=len(canvas.tokens))
    return np.union1d(positions, written[written >= first])


def _taken_in(canvas: Canvas) -> FrontierGrammar:
    """The grammar, told what stands on the canvas."""
    assert canvas.constraints is not None and canvas.constraints.frontier is not None
    canvas.constraints.take_in(canvas.tokens, canvas.masked)
    return canvas.constraints.frontier


def _first(view: View, canvas: Canvas) -> int:
    """The index of the first masked position of the canvas: before it are masks of the prompt."""
    return int((view.positions < canvas.prompt_len).sum())


def _run(view: View, frontier: FrontierGrammar, first: int) -> int:
    """How many proposals from the first mask of the canvas on stand, one after the other."""
    for n in range(first, len(view.positions)):
        if not frontier.take(int(view.proposal[n])):
            return n - first
    return len(view.positions) - first
