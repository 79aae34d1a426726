"""The policies' part of a step: their views, their queries and their decisions.

Whatever goes wrong in one request's part ends that request and no other.

Legend: `M` masked positions that may be written now, `W` written positions of the block.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import numpy as np

from boe_vllm.decoding.batch import StepBatch
from boe_vllm.decoding.canvas import Canvas
from boe_vllm.decoding.frontier import along, narrowed
from boe_vllm.models.rows import SequenceRows
from boe_vllm.policies.base import Commit, Revision, View, committable, finishing
from boe_vllm.sampling.log_probs import LogProbabilities, TokenLikelihood
from boe_vllm.sampling.statistics import RowStatistics, on_grid
from boe_vllm.steering.step import DenoisingPass, Query, QueryResult, solve_together

logger = logging.getLogger(__name__)


class Errors(dict[int, str]):
    """Why some of a step's requests cannot go on, by their place in the batch."""

    def blame(self, place: int, canvas: Canvas, error: Exception) -> None:
        """The request's policy is at fault, or the model with what the policy asked for."""
        if not isinstance(error, ValueError):  # whose texts are made for users
            logger.exception("policy %s failed", canvas.policy.name)
        self.setdefault(place, f"policy {canvas.policy.name!r} failed: {error}")


def views_of(batch: StepBatch, statistics: RowStatistics, errors: Errors) -> dict[int, View]:
    """The view of every request whose logits are finite; the others get an error."""
    views = {}
    for n, canvas in enumerate(batch.canvases):
        rows, own = batch.rows_of(n, statistics)
        if not own.finite[rows].all():
            errors[n] = (
                f"the model's logits are not finite in denoising step "
                f"{canvas.account.denoising_steps}; check the checkpoint and the dtype"
            )
            continue
        views[n] = view_of(canvas, batch.sequences[n], rows, own)
    return views


def view_of(canvas: Canvas, wanted: SequenceRows, rows: slice, statistics: RowStatistics) -> View:
    """What a policy sees of one canvas.

    Args:
        canvas: before the step.
        wanted: its rows of the step.
        rows: of the statistics that are this request's: those of the masked positions, then, if
            the policy needs a revision, those of the written ones that it covers.
        statistics: of the step's forward, or carried over.
    """
    blocks, revision = canvas.blocks, None
    positions = wanted.logit_positions
    if canvas.policy.needs().revision:
        revised = wanted.extra_positions[wanted.extra_positions < blocks.end]
        again = slice(rows.start + len(positions), rows.start + len(positions) + len(revised))
        revision = Revision(
            positions=revised,
            proposal=statistics.proposal[again],
            confidence=statistics.confidence[again],
            entropy=statistics.entropy[again],
        )
    rows = slice(rows.start, rows.start + len(positions))
    proposal, confidence = statistics.proposal[rows], statistics.confidence[rows]
    view = View(
        positions=positions,
        proposal=proposal,
        confidence=committable(proposal, confidence, canvas.late_tokens),
        margin=statistics.margin[rows],
        entropy=statistics.entropy[rows],
        quota=blocks.quota(canvas.masked),
        masked_at_start=canvas.masked_at_start,
        masked_now=int(canvas.masked.sum()),
        step=canvas.account.denoising_steps,
        block_step=blocks.step,
        block_steps=blocks.steps,
        block_start=blocks.canvas_start,
        vocab_size=canvas.vocab_size,
        seed=canvas.params.seed,
        temperature=canvas.params.temperature,
        written=blocks.written(canvas.masked),
        revision=revision,
        late_tokens=canvas.late_tokens,
        memory=canvas.memory,
    )
    return view if canvas.frontier is None else narrowed(view, canvas)


def decide(
    batch: StepBatch, current: DenoisingPass, views: Mapping[int, View], errors: Errors
) -> dict[int, Commit]:
    """Run the policies' steps side by side; their queries are answered round by round."""
    canvases = batch.canvases
    commits, asking = _begin(canvases, views, errors)
    replies: dict[int, Any] = dict.fromkeys(asking)
    while replies:
        queries: dict[int, Query[Any]] = {}
        for n, reply in replies.items():
            try:
                queries[n] = asking[n].send(reply)
            except StopIteration as stop:
                commits[n] = stop.value
            except Exception as error:
                errors.blame(n, canvases[n], error)
        replies = {}
        with current.timed("queries"):
            results = _answers(canvases, current, queries, errors)
        for n, result in results.items():
            canvases[n].account.charge(result)
            value = result.value
            if isinstance(value, np.ndarray):
                if np.isnan(value).any():
                    errors[n] = (
                        f"steering found numbers that are not finite in denoising step "
                        f"{canvases[n].account.denoising_steps}; check the checkpoint and the dtype"
                    )
                    continue
                value = on_grid(value, current.log_probs.score_grid)
            replies[n] = value
    return _along(canvases, commits, views, errors)


def _along(
    canvases: Sequence[Canvas],
    commits: Mapping[int, Commit],
    views: Mapping[int, View],
    errors: Errors,
) -> dict[int, Commit]:
    """The decisions, where only the frontier may be written what of them is; see there."""
    found: dict[int, Commit] = {}
    for n, commit in commits.items():
        if canvases[n].frontier is None:
            found[n] = commit
            continue
        try:
            found[n] = along(commit, views[n], canvases[n])
        except Exception as error:
            errors.blame(n, canvases[n], error)
    return found


def _begin(
    canvases: Sequence[Canvas], views: Mapping[int, View], errors: Errors
) -> tuple[dict[int, Commit], dict[int, Generator[Query[Any], Any, Commit]]]:
    """What is decided without a query, and the steps of the policies that ask."""
    commits: dict[int, Commit] = {}
    asking: dict[int, Generator[Query[Any], Any, Commit]] = {}
    for n, view in views.items():
        if canvases[n].blocks.overdue:  # the policy has had its steps: the rest is the engine's
            commits[n] = finishing(Commit(chosen=np.empty(0, np.int64)), view)
            continue
        try:
            step = canvases[n].policy.step(view)
        except Exception as error:
            errors.blame(n, canvases[n], error)
            continue
        if isinstance(step, Commit):
            commits[n] = step
        else:
            asking[n] = step
    return commits, asking


def _answers(
    canvases: Sequence[Canvas],
    current: DenoisingPass,
    queries: Mapping[int, Query[Any]],
    errors: Errors,
) -> dict[int, QueryResult[Any]]:
    """All queries in shared passes; if one breaks them, each on its own, so that it is found."""
    try:
        return solve_together(current, queries)
    except Exception:
        logger.exception("queries of %d requests failed together", len(queries))
    results: dict[int, QueryResult[Any]] = {}
    for n, query in queries.items():
        try:
            results |= solve_together(current, {n: query})
        except Exception as error:
            errors.blame(n, canvases[n], error)
    return results


def unproposed(
    batch: StepBatch,
    commits: Mapping[int, Commit],
    views: Mapping[int, View],
    log_probs: LogProbabilities,
) -> dict[int, dict[int, TokenLikelihood]]:
    """Likelihoods of written tokens that are not their rows' proposals, for requests that ask.

    One read for all of them. By request, then by index into its view's positions.
    """
    found: dict[int, dict[int, TokenLikelihood]] = {n: {} for n in commits}
    members: list[tuple[int, int]] = []
    rows, tokens = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for n, commit in commits.items():
        canvas, proposal = batch.canvases[n], views[n].proposal
        asked = canvas.params.logprobs and canvas.carried is None
        if not asked or not isinstance(commit, Commit) or commit.tokens is None:
            continue
        written = np.full(len(proposal), -1)
        try:
            written[commit.chosen] = commit.tokens
        except (IndexError, TypeError, ValueError):
            continue  # the policy's mistake, which its commit will meet
        index = np.flatnonzero(
            (written != proposal) & (0 <= written) & (written < canvas.vocab_size)
        )
        members += [(n, i) for i in index.tolist()]
        rows.append(batch.layout.logit_starts[n] + index)
        tokens.append(written[index])
    if members:
        likelihoods = log_probs.likelihoods(np.concatenate(rows), np.concatenate(tokens))
        for (n, i), likelihood in zip(members, likelihoods, strict=True):
            found[n][i] = likelihood
    return found
