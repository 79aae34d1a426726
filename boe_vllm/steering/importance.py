"""Token Importance Scores (eq. 14) of all steering requests of a batch, in shared passes.

For all surrogates but "inject" one backward through the saved rows of the step's own pass serves
every request; for "inject" a second forward over the relaxed states precedes it. Sequences do not
see each other, so each request's gradient is its own although all objectives are summed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch

from boe_vllm.base.arrays import FloatArray, IntArray
from boe_vllm.models.functional import accurate
from boe_vllm.models.rows import SequenceRows, pack
from boe_vllm.models.saved import SavedPass
from boe_vllm.sampling.distributions import entropy_gradient
from boe_vllm.steering.guidance import (
    PairMember,
    Place,
    guided,
    members_of,
    places_of,
    summed,
    with_unconditional,
)
from boe_vllm.steering.hypothetical import FrozenRows, reveal, soft_writes
from boe_vllm.steering.response import Responses, Watched
from boe_vllm.steering.step import DenoisingPass, Query, QueryResult

Tensor = torch.Tensor
Surrogate = Literal["mask", "inject", "kv", "response", "rectified"]
Context = Literal["frozen", "exact"]

REVEALING = ("kv", "response", "rectified")
"""Surrogates that need the candidates' revealed keys and values."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TokenImportance(Query[FloatArray]):
    """Token Importance Scores of candidates: float64 [C], nats, larger for what explains more."""

    candidates: IntArray
    """[C] indices into `View.positions`."""
    objective: IntArray
    """[O] indices into `View.positions` whose entropies are summed."""
    active: IntArray | None
    """Indices into `View.positions` whose attention passes a gradient (eq. 30); None: every row."""
    surrogate: Surrogate
    """Where the entropy is linearised: at the masks ("mask"), at the soft writes of all candidates
    ("inject"), or as `response` says."""
    context: Context = "frozen"
    """For "inject": rows outside the masked ones frozen, or computed again."""
    sharpen: float = 1.0
    """Temperature of the soft write, 1 for none."""

    @classmethod
    def solve(
        cls, current: DenoisingPass, queries: Sequence[tuple[int, TokenImportance]]
    ) -> list[QueryResult[FloatArray]]:
        """All queries that can share a backward do."""
        kinds: dict[str, list[int]] = {}
        for n, (_, query) in enumerate(queries):
            kind: str = query.context if query.surrogate == "inject" else "single"
            kinds.setdefault(kind, []).append(n)
        results: dict[int, QueryResult[FloatArray]] = {}
        for kind, members in kinds.items():
            solved = _single_pass if kind == "single" else _injected
            own = [queries[n] for n in members]
            results.update(zip(members, solved(current, own), strict=True))
        return [results[n] for n in range(len(queries))]


Member = PairMember[TokenImportance]


def _single_pass(
    current: DenoisingPass, queries: Sequence[tuple[int, TokenImportance]]
) -> list[QueryResult[FloatArray]]:
    """All surrogates but "inject": one backward on what the step's own pass saved."""
    assert current.saved is not None
    members = members_of(current, queries)
    soft = _soft_writes(current, members)
    rows = _packed(current.saved_rows, members, _candidates).to(current.device)
    revealing = [n for n, member in enumerate(members) if member.query.surrogate in REVEALING]
    lens = [len(member.query.candidates) for member in members]
    spans = _spans(lens, revealing).to(current.device)
    observe = _responses(current, [members[n] for n in revealing], soft[spans])
    dx = _backward(current, current.saved, members, observe)
    change = accurate(soft) - accurate(_mask_embedding(current, soft.dtype))
    scores = -(accurate(dx[rows]) * change).sum(-1)
    if observe is not None:
        scores[spans] = observe.drops_C.to(scores)
    values = summed(scores, members, [len(query.candidates) for _, query in queries])
    return [
        QueryResult(
            value=value,
            forwards=len(own) * (query.surrogate in REVEALING),
            backwards=len(own),
            rows_forward=len(own) * len(query.candidates) * (query.surrogate in REVEALING),
            rows_backward=sum(current.layout.saved_lens[place] for place in own),
        )
        for (_, query), own, value in zip(
            queries, places_of(members, len(queries)), values, strict=True
        )
    ]


def _injected(
    first: DenoisingPass, queries: Sequence[tuple[int, TokenImportance]]
) -> list[QueryResult[FloatArray]]:
    """ "inject": a second forward with all candidates' soft writes, then its backward."""
    members = members_of(first, queries)
    soft = _soft_writes(first, members)
    second = _second_pass(first, queries, members, soft)
    assert second.saved is not None
    layout = second.layout
    again = members_of(second, [(n, query) for n, (_, query) in enumerate(queries)])
    dx = _backward(second, second.saved, again)
    rows = _packed(second.saved_rows, again, _candidates).to(first.device)
    change = accurate(soft) - accurate(_mask_embedding(first, soft.dtype))
    scores = -(accurate(dx[rows]) * change).sum(-1)
    values = summed(scores, again, [len(query.candidates) for _, query in queries])
    return [
        QueryResult(
            value=value,
            forwards=len(own),
            backwards=len(own),
            rows_forward=sum(layout.live_lens[place] for place in own),
            rows_backward=sum(layout.saved_lens[place] for place in own),
        )
        for own, value in zip(places_of(again, len(queries)), values, strict=True)
    ]


def _second_pass(
    first: DenoisingPass,
    queries: Sequence[tuple[int, TokenImportance]],
    members: Sequence[Member],
    soft_CD: Tensor,
) -> DenoisingPass:
    """The forward over the relaxed states, one sequence for each query."""
    model, mask = first.model, first.log_probs.mask_token_id
    guides = [first.guide(s) for s, _ in queries]
    sequences = [_relaxed_rows(first, s, query) for s, query in queries]
    packed, unconditional = with_unconditional(sequences, guides, mask)
    layout = pack(packed, first.device)
    context = None
    if any(layout.frozen_lens):
        assert first.saved is not None
        context = FrozenRows(first.saved, layout, [member.place for member in members])
    x = model.embed(layout.tokens).clone()
    rows = [
        start + member.query.candidates
        for start, member in zip(layout.live_starts, members, strict=True)
    ]
    x[torch.from_numpy(np.concatenate(rows)).to(first.device)] = soft_CD
    hidden, saved = model.run(x, layout, context)
    numbers = [
        first.log_probs.constraint_R[first.logit_rows(s, np.arange(len(rows.logit_positions)))]
        for (s, _), rows in zip(queries, sequences, strict=True)
    ]
    return DenoisingPass(
        model=model,
        sequences=tuple(sequences),
        layout=layout,
        log_probs=first.log_probs.of(
            guided(hidden, layout, unconditional, guides), np.concatenate(numbers)
        ),
        saved=saved,
        guides=tuple(guides),
        unconditional=unconditional,
        clock=first.clock,
    )


def _relaxed_rows(first: DenoisingPass, s: int, query: TokenImportance) -> SequenceRows:
    """The rows of one sequence in the second pass."""
    rows = first.sequences[s]
    live, outside = rows.live_positions, rows.frozen_rows
    if query.context == "frozen":
        live = rows.logit_positions
        outside = first.layout.attention.kv_seqlens[first.place(s)] - len(live)
    return SequenceRows(
        tokens=rows.tokens,
        logit_positions=rows.logit_positions,
        keep="all" if query.active is None else "masked",
        live_positions=live,
        frozen_rows=outside,
    )


def _soft_writes(current: DenoisingPass, members: Sequence[Member]) -> Tensor:
    """[C, D] soft writes, packed member by member; a copy's are those of its sequence."""
    own = [member for member in members if member.own]
    rows = np.concatenate([current.logit_rows(m.source, m.query.candidates) for m in own])
    sharpen = np.concatenate([np.full(len(m.query.candidates), m.query.sharpen) for m in own])
    soft = soft_writes(current.log_probs, rows, sharpen)
    lens = [len(member.query.candidates) for member in own]
    again = _spans(lens, [member.number for member in members[len(own) :]])
    return torch.cat([soft, soft[again.to(soft.device)]]) if len(again) else soft


def _responses(
    current: DenoisingPass, members: Sequence[Member], soft_CD: Tensor
) -> Responses | None:
    """What watches the backward for those that need the candidates' keys and values revealed."""
    if not members:
        return None
    candidates = [member.query.candidates for member in members]
    changes = reveal(soft_CD, current, [member.place for member in members], candidates)
    watched = [
        Watched(place=m.place, candidates=m.query.candidates, rule=m.query.surrogate)
        for m in members
    ]
    return Responses(current, watched, changes)


def _backward(
    current: DenoisingPass,
    saved: SavedPass,
    members: Sequence[Member],
    observe: Responses | None = None,
) -> Tensor:
    """[A, D] gradient of the summed entropies at the saved rows' embeddings."""
    with current.clock.part("backward"):
        return current.model.backward(
            _objective_gradient(current, members),
            saved,
            _active_rows(current, members),
            observe=observe,
        )


def _objective_gradient(current: DenoisingPass, members: Sequence[Member]) -> Tensor:
    """[A, D] gradient of the summed entropies at the saved rows' final hidden states."""
    log_probs = current.log_probs
    rows = np.concatenate([current.logit_rows(m.source, m.query.objective) for m in members])
    weights = np.concatenate([np.full(len(m.query.objective), m.weight) for m in members])
    saved = _packed(current.saved_rows, members, _objective).to(current.device)
    dhidden = torch.zeros(
        (sum(current.layout.saved_lens), log_probs.hidden_RD.shape[1]),
        dtype=log_probs.hidden_RD.dtype,
        device=current.device,
    )
    for places, logp in log_probs.rows(rows):
        gradient = entropy_gradient(logp, log_probs.memory.gradient)
        if (weights[places] != 1).any():
            gradient *= torch.from_numpy(weights[places]).to(gradient)[:, None]
        dhidden[saved[places]] = current.model.logits_backward(gradient).to(dhidden)
    return dhidden


def _active_rows(current: DenoisingPass, members: Sequence[Member]) -> Tensor:
    """[A, 1, 1] 1 where the attention output passes a gradient (eq. 30), else 0."""
    active = np.zeros(sum(current.layout.saved_lens))
    for member in members:
        start = current.layout.saved_starts[member.place]
        if member.query.active is None:
            active[start : start + current.layout.saved_lens[member.place]] = 1
        else:
            active[start + member.query.active] = 1
    dtype = current.log_probs.hidden_RD.dtype
    return torch.from_numpy(active).to(current.device, dtype)[:, None, None]


def _mask_embedding(current: DenoisingPass, dtype: torch.dtype) -> Tensor:
    token = torch.tensor([current.log_probs.mask_token_id], device=current.device)
    return current.model.embed(token).to(dtype)


def _candidates(query: TokenImportance) -> IntArray:
    return query.candidates


def _objective(query: TokenImportance) -> IntArray:
    return query.objective


def _packed(
    rows_of: Callable[[Place, IntArray], IntArray],
    members: Sequence[Member],
    index_of: Callable[[TokenImportance], IntArray],
) -> Tensor:
    """Packed rows of what every member's query names."""
    pieces = [rows_of(member.place, index_of(member.query)) for member in members]
    return torch.from_numpy(np.concatenate(pieces))


def _spans(lens: Sequence[int], chosen: Sequence[int]) -> Tensor:
    """Packed places of the values of some members, given the number of each member's values."""
    starts = np.cumsum([0, *lens])
    pieces = [np.arange(starts[n], starts[n + 1]) for n in chosen]
    return torch.from_numpy(np.concatenate(pieces) if pieces else np.empty(0, np.int64))
