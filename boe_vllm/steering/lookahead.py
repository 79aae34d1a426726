"""Look-ahead: full forwards over hypothetical next states, of all requests of a batch together.

A state is the current sequence with some masks written, by tokens or by soft embeddings. States of
all requests are packed one after the other, as many per pass as the row budget allows, and each
costs its request one forward and its rows. A state is computed as the request's next step would
compute it: with the same cache, with the constraints of the state's own tokens and, if it is to be
carried, with the same random numbers, so that the state which is chosen needs no other forward.

Legend: `m` the block's masked positions that a state leaves, `n` other observed positions.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch

from boe_vllm.base.arrays import FloatArray, IntArray
from boe_vllm.base.transfer import to_device
from boe_vllm.models.cache import CachedRows
from boe_vllm.models.rows import RowLayout, SequenceRows, pack, readable
from boe_vllm.sampling import randomness
from boe_vllm.sampling.log_probs import LogProbabilities
from boe_vllm.sampling.statistics import RowStatistics, RowWrites, read_statistics
from boe_vllm.steering.guidance import guided, with_unconditional
from boe_vllm.steering.hypothetical import soft_writes
from boe_vllm.steering.step import DenoisingPass, Query, QueryResult

Tensor = torch.Tensor
Observed = Literal["block", "masked", "all"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Prospect:
    """What the denoiser predicts in one hypothetical state; entropies in nats."""

    index: IntArray
    """[m] indices into `View.positions` of the block's positions that are still masked."""
    proposal: IntArray
    """[m] what the next step would propose there; the argmax unless the prediction is carried."""
    confidence: FloatArray
    """[m] untempered probability of the proposal."""
    margin: FloatArray
    """[m] largest less second largest probability."""
    entropy: FloatArray
    """[m] entropies."""
    elsewhere: FloatArray
    """[n] entropies of the other positions that were observed."""
    carry: RowStatistics | None
    """The prediction, for `Commit.carry`."""

    def entropies(self) -> FloatArray:
        """[m + n] entropies of all observed positions.

        Raises:
            ValueError: when the model's logits are not finite.
        """
        both = np.concatenate([self.entropy, self.elsewhere])
        if not np.isfinite(both).all():
            raise ValueError(
                "the model's logits are not finite in a look-ahead state; check the checkpoint and "
                "the dtype"
            )
        return both

    def mean_entropy(self) -> float:
        """Mean of `entropies`; 0 where nothing is left to observe."""
        both = self.entropies()
        return float(both.mean()) if len(both) else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Lookahead(Query[list[Prospect]]):
    """What the denoiser predicts in hypothetical states: a `Prospect` for each.

    A state is the current one with some masked positions written. Each costs one forward (but see
    `wide`).
    """

    writes: tuple[IntArray, ...]
    """Per state, indices into `View.positions` that are written."""
    tokens: tuple[IntArray, ...] | None
    """Per state, what is written there; None writes soft embeddings (eq. 10)."""
    observe: Observed = "block"
    """Predictions that are wanted: of the block's remaining masks, of the whole sequence's, or of
    every position. With a cache, only positions that are computed are seen."""
    sharpen: float = 1.0
    """Temperature of soft writes, 1 for none."""
    carry: bool = False
    """Whether the next step may go on with a state's prediction."""
    wide: bool = False
    """Whether states that share a pass count as one forward, of all their rows."""

    @classmethod
    def solve(
        cls, current: DenoisingPass, queries: Sequence[tuple[int, Lookahead]]
    ) -> list[QueryResult[list[Prospect]]]:
        """Pack the states of all queries."""
        states = [
            state
            for n, (s, query) in enumerate(queries)
            for state in states_of(current, n, s, query)
        ]
        soft = SoftWrites(current, queries)
        prospects: list[list[Prospect]] = [[] for _ in queries]
        rows, forwards = np.zeros((2, len(queries)), int).tolist()
        for batch in state_batches(current, states):
            for state, prospect in zip(batch, _predict(current, batch, soft), strict=True):
                prospects[state.query].append(prospect)
                rows[state.query] += current.passes(state.sequence) * state.rows.live_rows
            for n, many in Counter(state.query for state in batch).items():
                forwards[n] += current.passes(queries[n][0]) * (1 if queries[n][1].wide else many)
        costs = zip(prospects, forwards, rows, strict=True)
        return [QueryResult(value=p, forwards=f, rows_forward=r) for p, f, r in costs]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """One hypothetical state, ready to be packed."""

    query: int
    """Which query it belongs to."""
    sequence: int
    """Which sequence of the pass it departs from."""
    rows: SequenceRows
    index: IntArray
    """Indices into the sequence's masked positions that are still masked."""
    written: IntArray
    """Indices that are written softly; none if tokens are written."""
    carry: bool


class SoftWrites:
    """The soft embeddings of every position that some state writes softly."""

    def __init__(self, current: DenoisingPass, queries: Sequence[tuple[int, Lookahead]]) -> None:
        self._index: dict[int, IntArray] = {}
        self._starts: dict[int, int] = {}
        rows: list[IntArray] = []
        sharpen: list[FloatArray] = []
        for n, (s, query) in enumerate(queries):
            if query.tokens is None:
                self._index[n] = np.unique(np.concatenate(query.writes))
                self._starts[n] = sum(len(own) for own in rows)
                rows.append(current.logit_rows(s, self._index[n]))
                sharpen.append(np.full(len(rows[-1]), float(query.sharpen)))
        self.embeddings_CD: Tensor | None = None
        if rows:
            self.embeddings_CD = soft_writes(
                current.log_probs, np.concatenate(rows), np.concatenate(sharpen)
            )

    def places(self, query: int, index: IntArray) -> IntArray:
        """[len(index)] rows of `embeddings_CD` of some positions of a query's sequence."""
        return self._starts[query] + np.searchsorted(self._index[query], index)


def states_of(current: DenoisingPass, n: int, sequence: int, query: Lookahead) -> Iterator[State]:
    now, cache = current.sequences[sequence], current.next_steps[sequence].cache
    live = cache.live_positions if cache is not None else None
    frozen = 0 if cache is None or cache.refresh else len(cache.slots)
    everyone = np.arange(len(now.logit_positions))
    for k, written in enumerate(query.writes):
        tokens = now.tokens.copy()
        if query.tokens is not None:
            tokens[now.logit_positions[written]] = query.tokens[k]
        still = np.setdiff1d(everyone, written)
        elsewhere = np.empty(0, np.int64)
        if query.observe == "masked":
            masks = np.flatnonzero(now.tokens == current.log_probs.mask_token_id)
            elsewhere = np.setdiff1d(masks, now.logit_positions)
        elif query.observe == "all":
            elsewhere = np.setdiff1d(np.arange(len(tokens)), now.logit_positions[still])
        if live is not None:
            elsewhere = readable(elsewhere, live, now.shift)
        yield State(
            query=n,
            sequence=sequence,
            rows=SequenceRows(
                tokens=tokens,
                logit_positions=now.logit_positions[still],
                extra_positions=elsewhere,
                live_positions=live,
                frozen_rows=frozen,
                shift=now.shift,
            ),
            index=still,
            written=written if query.tokens is None else written[:0],
            carry=query.carry,
        )


def state_batches(current: DenoisingPass, states: Sequence[State]) -> Iterator[list[State]]:
    """The states in their order, in passes of at most `row_budget` rows, at least one in each."""
    batch: list[State] = []
    rows = 0
    for state in states:
        own = current.passes(state.sequence) * state.rows.live_rows
        if batch and rows + own > current.row_budget:
            yield batch
            batch, rows = [], 0
        batch.append(state)
        rows += own
    if batch:
        yield batch


def state_log_probs(
    current: DenoisingPass, states: Sequence[State], soft: SoftWrites
) -> tuple[LogProbabilities, RowLayout]:
    """One pass over some states: the predictions at their wanted positions, and the layout."""
    model = current.model
    guides = [current.guide(state.sequence) for state in states]
    packed, unconditional = with_unconditional(
        [state.rows for state in states], guides, current.log_probs.mask_token_id
    )
    layout = pack(packed, current.device)
    everyone = [*states, *(states[n] for n in unconditional)]
    x = _write_softly(current, model.embed(layout.tokens), layout, everyone, soft)
    context = None
    if any(layout.frozen_lens):
        assert current.pool is not None
        plans = [current.next_steps[state.sequence].cache for state in everyone]
        # A state reads what is stored and never stores: it may not be the one that is chosen.
        context = CachedRows(
            current.pool, layout, [None if plan and plan.refresh else plan for plan in plans]
        )
    hidden, _ = model.run(x, layout, context)
    hidden = guided(hidden, layout, unconditional, guides)
    held = [(s.sequence, s.rows.tokens, s.rows.wanted_positions) for s in states]
    numbers = np.concatenate([current.constraint_numbers(*state) for state in held])
    return current.log_probs.of(hidden, numbers), layout


def _predict(current: DenoisingPass, states: list[State], soft: SoftWrites) -> Iterator[Prospect]:
    """What is seen in some states."""
    log_probs, layout = state_log_probs(current, states, soft)
    counts = layout.logit_lens[: len(states)]
    statistics = read_statistics(log_probs, _writes(current, states, counts))
    for n, state in enumerate(states):
        start = layout.logit_starts[n]
        block = statistics.part(slice(start, start + len(state.index)))
        others = statistics.part(slice(start + len(state.index), start + counts[n]))
        yield Prospect(
            index=state.index,
            proposal=block.proposal,
            confidence=block.confidence,
            margin=block.margin,
            entropy=np.where(block.finite, block.entropy, np.nan),
            elsewhere=np.where(others.finite, others.entropy, np.nan),
            carry=block if state.carry else None,
        )


def _writes(current: DenoisingPass, states: Sequence[State], counts: Sequence[int]) -> RowWrites:
    """How the states' tokens are proposed: as the next step would, where it may go on with them."""
    steps = [current.next_steps[state.sequence] for state in states]
    pairs = list(zip(steps, states, strict=True))
    uniforms = [
        randomness.uniforms(
            step.seed, step=step.step, positions=s.rows.wanted_positions, stream=randomness.WRITE
        )
        for step, s in pairs
    ]
    return RowWrites(
        temperature=np.repeat([step.temperature * s.carry for step, s in pairs], counts),
        uniform=np.concatenate(uniforms),
        top_logprobs=max(step.top_logprobs * s.carry for step, s in pairs),
    )


def _write_softly(
    current: DenoisingPass,
    x_TD: Tensor,
    layout: RowLayout,
    states: Sequence[State],
    soft: SoftWrites,
) -> Tensor:
    """[T, D] the rows' embeddings with the soft writes in their places."""
    rows, places = [], []
    for n, state in enumerate(states):
        if not len(state.written):
            continue
        order = layout.row_positions[n]
        place = np.empty(len(state.rows.tokens), np.int64)
        place[order] = layout.live_starts[n] + np.arange(len(order))
        positions = current.sequences[state.sequence].logit_positions[state.written]
        rows.append(place[positions])
        places.append(soft.places(state.query, state.written))
    if not rows:
        return x_TD
    assert soft.embeddings_CD is not None
    written, read = to_device([np.concatenate(rows), np.concatenate(places)], x_TD.device)
    x = x_TD.clone()
    x[written] = soft.embeddings_CD[read].to(x.dtype)
    return x
