"""Look-ahead: full forwards over hypothetical next states, of all requests of a batch together.

A state is the current sequence with some masks written, by tokens or by soft embeddings. States of
all requests are packed one after the other, as many per pass as the row budget allows, and each
costs its request one forward and its rows. A state is computed as the request's next step would
compute it (with the same cache and, if it is to be carried, the same random numbers), so that the
state which is chosen needs no other forward.

Legend: `R` logit rows of a state, `C` positions with soft writes, `D` width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from boe_vllm.base.arrays import IntArray
from boe_vllm.models.cache import CachedRows
from boe_vllm.models.rows import RowLayout, SequenceRows, pack
from boe_vllm.sampling import randomness
from boe_vllm.sampling.statistics import RowWrites, read_statistics
from boe_vllm.steering.guidance import guided, with_unconditional
from boe_vllm.steering.queries import Lookahead, Prospect
from boe_vllm.steering.step import DenoisingPass, QueryResult
from boe_vllm.steering.surrogate import soft_writes

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _State:
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


def lookahead(
    current: DenoisingPass, queries: Sequence[tuple[int, Lookahead]]
) -> list[QueryResult]:
    """One `Prospect` per state of each query; `queries` are pairs of a sequence and its query."""
    states = [
        state for n, (s, query) in enumerate(queries) for state in _states(current, n, s, query)
    ]
    soft = [
        _SoftWrites(current, s, query) if query.tokens is None else None for s, query in queries
    ]
    prospects: list[list[Prospect]] = [[] for _ in queries]
    rows = [0 for _ in queries]
    for batch in _batches(current, states):
        for state, prospect in zip(batch, _predict(current, batch, soft), strict=True):
            prospects[state.query].append(prospect)
            rows[state.query] += current.passes(state.sequence) * state.rows.live_rows
    return [
        QueryResult(value=found, forwards=current.passes(s) * len(found), rows_forward=count)
        for (s, _), found, count in zip(queries, prospects, rows, strict=True)
    ]


class _SoftWrites:
    """The soft embeddings of every position that some state of an query writes."""

    def __init__(self, current: DenoisingPass, sequence: int, query: Lookahead) -> None:
        self.index = np.unique(np.concatenate(query.writes))
        rows = current.logit_rows(sequence, self.index)
        self.embeddings_CD = soft_writes(
            current.log_probs, rows, np.full(len(rows), float(query.sharpen))
        )

    def of(self, index: IntArray) -> Tensor:
        """[len(index), D] those of some positions."""
        places = torch.from_numpy(np.searchsorted(self.index, index))
        return self.embeddings_CD[places.to(self.embeddings_CD.device)]


def _states(current: DenoisingPass, n: int, sequence: int, query: Lookahead) -> Iterator[_State]:
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
            elsewhere = np.intersect1d(elsewhere, live)
        yield _State(
            query=n,
            sequence=sequence,
            rows=SequenceRows(
                tokens=tokens,
                logit_positions=now.logit_positions[still],
                extra_positions=elsewhere,
                live_positions=live,
                frozen_rows=frozen,
            ),
            index=still,
            written=written if query.tokens is None else written[:0],
            carry=query.carry,
        )


def _batches(current: DenoisingPass, states: Sequence[_State]) -> Iterator[list[_State]]:
    """The states in their order, in passes of at most `row_budget` rows, at least one in each."""
    batch: list[_State] = []
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


def _predict(
    current: DenoisingPass, states: Sequence[_State], soft: Sequence[_SoftWrites | None]
) -> Iterator[Prospect]:
    model = current.model
    steps = [current.next_steps[state.sequence] for state in states]
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
        reads = [None if step.cache is None or step.cache.refresh else step.cache for step in steps]
        context = CachedRows(current.pool, layout, reads + [None] * len(unconditional))
    hidden, _ = model.run(x, layout, context)
    hidden = guided(hidden, layout, unconditional, guides)
    counts = layout.logit_lens[: len(states)]
    table = current.log_probs.table
    rules = [
        table.numbers(
            step.constraints.at(
                s.rows.tokens,
                s.rows.tokens == current.log_probs.mask_token_id,
                s.rows.wanted_positions,
            ),
            len(s.rows.wanted_positions),
        )
        for step, s in zip(steps, states, strict=True)
    ]
    log_probs = current.log_probs.of(hidden, np.concatenate(rules))
    statistics = read_statistics(
        log_probs,
        RowWrites(
            temperature=np.repeat(
                [
                    step.temperature if state.carry else 0.0
                    for step, state in zip(steps, states, strict=True)
                ],
                counts,
            ),
            uniform=np.concatenate(
                [
                    randomness.uniforms(
                        step.seed,
                        step=step.step,
                        positions=s.rows.wanted_positions,
                        stream=randomness.WRITE,
                    )
                    for step, s in zip(steps, states, strict=True)
                ]
            ),
            top_logprobs=max(
                step.top_logprobs if state.carry else 0
                for step, state in zip(steps, states, strict=True)
            ),
        ),
    )
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


def _write_softly(
    current: DenoisingPass,
    x_TD: Tensor,
    layout: RowLayout,
    states: Sequence[_State],
    soft: Sequence[_SoftWrites | None],
) -> Tensor:
    """The rows' embeddings with the soft writes in their places, [T, D]."""
    rows, embeddings = [], []
    for n, state in enumerate(states):
        writes = soft[state.query]
        if writes is None:
            continue
        order = layout.row_positions[n]
        place = np.empty(len(state.rows.tokens), np.int64)
        place[order] = layout.live_starts[n] + np.arange(len(order))
        positions = current.sequences[state.sequence].logit_positions[state.written]
        rows.append(place[positions])
        embeddings.append(writes.of(state.written))
    if not rows:
        return x_TD
    x = x_TD.clone()
    x[torch.from_numpy(np.concatenate(rows)).to(x.device)] = torch.cat(embeddings).to(x.dtype)
    return x
