"""The policies' part of a step: their views, their queries and their decisions.

Whatever goes wrong in one request's part ends that request and no other.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from boe_vllm.decoding.canvas import Canvas
from boe_vllm.decoding.views import view_of
from boe_vllm.policies.base import Commit, View, finishing
from boe_vllm.sampling.statistics import RowStatistics
from boe_vllm.steering.step import DenoisingPass, Query, QueryResult, solve_together

logger = logging.getLogger(__name__)


class Errors(dict[int, str]):
    """Why some of a step's requests cannot go on, by their place in the batch."""

    def blame(self, place: int, canvas: Canvas, error: Exception) -> None:
        """The request's policy is at fault, or the model with what the policy asked for."""
        if not isinstance(error, ValueError):  # whose texts are made for users
            logger.exception("policy %s failed", canvas.policy.name)
        self.setdefault(place, f"policy {canvas.policy.name!r} failed: {error}")


def reading(
    canvas: Canvas, current: DenoisingPass, sequence: int, statistics: RowStatistics
) -> tuple[slice, RowStatistics]:
    """Which rows of which statistics are a request's: of the step's own, or those carried over."""
    if canvas.carried is not None:
        return slice(0, len(canvas.carried.proposal)), canvas.carried
    start = current.layout.logit_starts[sequence]
    return slice(start, start + current.layout.logit_lens[sequence]), statistics


def views_of(
    canvases: Sequence[Canvas], current: DenoisingPass, statistics: RowStatistics, errors: Errors
) -> dict[int, View]:
    """The view of every request whose logits are finite; the others get an error."""
    views = {}
    for n, canvas in enumerate(canvases):
        rows, own = reading(canvas, current, n, statistics)
        if not own.finite[rows].all():
            errors[n] = (
                f"the model's logits are not finite in denoising step "
                f"{canvas.account.denoising_steps}; check the checkpoint and the dtype"
            )
            continue
        views[n] = view_of(canvas, current.sequences[n].logit_positions, rows, own)
    return views


def decide(
    canvases: Sequence[Canvas], current: DenoisingPass, views: Mapping[int, View], errors: Errors
) -> dict[int, Commit]:
    """Run the policies' steps side by side; their queries are answered round by round."""
    commits: dict[int, Commit] = {}
    steps: dict[int, Any] = {}
    for n, view in views.items():
        if canvases[n].overdue:  # the policy has had its steps: what is left is the engine's
            commits[n] = finishing(Commit(chosen=np.empty(0, np.int64)), view)
            continue
        try:
            step = canvases[n].policy.step(view)
            if isinstance(step, Commit):
                commits[n] = step
            else:
                steps[n] = step
        except Exception as error:
            errors.blame(n, canvases[n], error)
    replies: dict[int, Any] = dict.fromkeys(steps)
    while replies:
        queries = {}
        for n, reply in replies.items():
            try:
                queries[n] = steps[n].send(reply)
            except StopIteration as stop:
                commits[n] = stop.value
            except Exception as error:
                errors.blame(n, canvases[n], error)
        replies = {}
        with current.clock.part("queries"):
            answers = _answers(canvases, current, queries, errors)
        for n, given in answers.items():
            account = canvases[n].account
            account.forwards += given.forwards
            account.backwards += given.backwards
            account.rows_forward += given.rows_forward
            account.rows_backward += given.rows_backward
            if isinstance(given.value, np.ndarray) and np.isnan(given.value).any():
                errors[n] = (
                    f"steering found numbers that are not finite in denoising step "
                    f"{canvases[n].account.denoising_steps}; check the checkpoint and the dtype"
                )
                continue
            replies[n] = given.value
    return commits


def _answers(
    canvases: Sequence[Canvas], current: DenoisingPass, queries: Mapping[int, Query], errors: Errors
) -> dict[int, QueryResult]:
    """All queries in shared passes; if one breaks them, each on its own, so that it is found."""
    try:
        return solve_together(current, queries)
    except Exception:
        logger.exception("queries of %d requests failed together", len(queries))
    answers: dict[int, QueryResult] = {}
    for n, query in queries.items():
        try:
            answers |= solve_together(current, {n: query})
        except Exception as error:
            errors.blame(n, canvases[n], error)
    return answers
