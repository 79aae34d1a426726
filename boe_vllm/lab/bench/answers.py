"""The predicted time of an answer on a GPU, from what a finished cell has counted.

A cell has an answer's steps, forwards, backwards and rows, as means. What its passes are follows
from these and from the cell of one token a step of the same task, which says how many rows a
sequence has (rows over forwards) and how many of them are masked at first (steps):

    own pass      one in each step, over all rows of the sequence
    further pass  one for each forward beyond the steps, or for each backward, over an equal part
                  of the rows that are left

The time of each is that of `costs.predict`, launches and copies included; it is the sum of a
step's rounds, times the steps, over the requests that share them.

With `commit` "drafts" it is the other way round:

    wide pass     one in each step, over the rows of all its states
    further pass  one over all rows of the sequence for each forward beyond the steps, where no
                  state's prediction was carried; one for each backward, over half of the masks

Requests that share a step share its passes. If a request has `m` further passes in a step on
average, of which it makes `floor(m)` in every step and one more in some, and the requests do so
independently, then `n` of them make `floor(m) + 1 - (1 - m + floor(m))^n`. A batch is taken to be
full always: whoever is finished makes room for the next.

Left out: what a policy computes beside passes (attention that it reads, distributions that it
compares), and that a look-ahead of other policies runs many states in one pass, which a cell counts
one by one. The vocabulary's products are taken over half of the masked rows at the start, the mean
of a canvas that is written evenly, and over all rows where the policy wants predictions of what is
written.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from boe_vllm.lab.bench import costs
from boe_vllm.lab.bench.ceilings import Ceilings
from boe_vllm.lab.bench.costs import Network
from boe_vllm.lab.bench.launches import CODE
from boe_vllm.lab.bench.passes import Pass
from boe_vllm.lab.eval.cell_file import FinishedCell
from boe_vllm.lab.eval.variants import parse
from boe_vllm.policies import load_policy
from boe_vllm.policies.base import Needs, Policy
from boe_vllm.request.config import parse_sampler_config

SEQUENTIAL = "confidence"
"""Whose cell at one token a step says how long a task's sequences are."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Canvas:
    """A task's sequences; means per item."""

    rows: float
    """Of prompt and canvas."""
    masks: float
    """At the start."""


def canvases(cells: Iterable[FinishedCell]) -> dict[str, Canvas]:
    """Of every task that has a cell of one token a step."""
    return {
        cell.task: Canvas(rows=cell.rows / cell.forwards, masks=cell.steps)
        for cell in cells
        if cell.contestant == SEQUENTIAL and cell.tokens_per_step == 1
    }


def policy_of(contestant: str) -> Policy[Any] | None:
    """The policy of that name with its settings; None for one that is not known."""
    try:
        config = parse_sampler_config(parse(contestant).fields)
    except ValueError:
        return None
    return load_policy(config.policy)(config.settings)


def milliseconds(
    cell: FinishedCell, canvas: Canvas, requests: int, network: Network, ceilings: Ceilings
) -> float | None:
    """Predicted time of an answer, that of all steps of a batch over its requests.

    Args:
        cell: decoded with whole canvases and without a cache.
        canvas: of its task.
        requests: that share every step.
        network: sizes.
        ceilings: of the card.

    Returns:
        Milliseconds; None for a policy that is not known here.
    """
    policy = policy_of(cell.contestant)
    if policy is None or cell.steps == 0:
        return None
    drafts = getattr(policy.config, "commit", None) == "drafts"
    rounds = (_drafting if drafts else _stepping)(cell, canvas, requests, policy.needs())
    seconds = sum(
        many * costs.predict([passes], network, ceilings, CODE).seconds for many, passes in rounds
    )
    return 1e3 * seconds * cell.steps / requests


Rounds = list[tuple[float, list[Pass]]]
"""How many of each there are in a step of the batch, and the passes in one."""


def _stepping(cell: FinishedCell, canvas: Canvas, requests: int, needs: Needs) -> Rounds:
    """A pass of its own in each step, and what comes on top."""
    own = min(canvas.rows, cell.rows / cell.steps)
    keys = requests * canvas.rows
    read = canvas.rows if needs.past else canvas.masks / 2
    first = [
        _pass("forward" if needs.rows == "none" else "saving", requests * own, keys, canvas.rows),
        _pass("logits", requests * read),
    ]
    rounds: Rounds = [(1.0, first)]
    forwards, backwards = max(0.0, cell.forwards - cell.steps), cell.backwards
    if forwards + backwards > 0:
        left = (cell.rows - own * cell.steps) / (forwards + backwards)
        for kind, passes in (("partial", forwards), ("backward", backwards)):
            many = shared(passes / cell.steps, requests)
            if many == 0:
                continue
            rows = requests * left * passes / cell.steps / many
            further = [_pass(kind, rows, keys, canvas.rows)]
            if kind == "partial":
                further.append(_pass("logits", rows))
            else:
                further += [_pass("soft writes", rows), _pass("gradient", requests * read)]
            rounds.append((many, further))
    return rounds


def _drafting(cell: FinishedCell, canvas: Canvas, requests: int, needs: Needs) -> Rounds:
    """A wide pass in each step, and what no state of one had."""
    alone = max(0.0, cell.forwards - cell.steps)
    backward_rows = canvas.masks / 2
    wide = (cell.rows - alone * canvas.rows - cell.backwards * backward_rows) / cell.steps
    rounds: Rounds = [
        (
            1.0,
            [
                _pass("forward", requests * wide, requests * wide, canvas.rows),
                _pass("logits", requests * wide / canvas.rows * canvas.masks / 2),
            ],
        )
    ]
    for kind, passes, rows in (
        ("forward" if needs.rows == "none" else "saving", alone, canvas.rows),
        ("backward", cell.backwards, backward_rows),
    ):
        many = shared(passes / cell.steps, requests)
        if many > 0:
            share = requests * passes / cell.steps / many
            further = [_pass(kind, share * rows, requests * canvas.rows, canvas.rows)]
            further.append(_pass("logits", share * canvas.masks / 2))
            if kind == "backward":
                further.append(_pass("gradient", share * canvas.masks / 2))
            rounds.append((many, further))
    return rounds


def shared(passes: float, requests: int) -> float:
    """Further passes of a step that so many requests share, each with so many on average."""
    whole = math.floor(passes)
    return whole + 1 - (1 - (passes - whole)) ** requests


def _pass(kind: str, rows: float, keys: float = 0, each: float = 0) -> Pass:
    """At least one row; `each` keys meet every row."""
    many = max(1, round(rows))
    return Pass(kind=kind, rows=many, keys=round(keys), pairs=round(many * each))  # type: ignore[arg-type]
