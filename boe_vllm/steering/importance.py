"""Token Importance Scores (eq. 14) of all steering requests of a batch, in shared passes.

For all surrogates but "inject" one backward through the saved rows of the step's own pass serves
every request; for "inject" a second forward over the relaxed states precedes it. Sequences do not
see each other, so each request's gradient is its own although all objectives are summed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from boe_vllm.base.arrays import FloatArray, IntArray
from boe_vllm.base.transfer import Arrival, Transfer, to_device
from boe_vllm.models.functional import accurate
from boe_vllm.models.rows import SequenceRows, pack
from boe_vllm.models.saved import SavedPass
from boe_vllm.sampling.log_probs import entropy_gradient
from boe_vllm.steering.guidance import (
    PairMember,
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
    """Indices into `View.positions` whose rows, own and read, pass a gradient through attention
    (eq. 30); None: every row."""
    surrogate: Surrogate
    """Where the entropy is linearised: at the masks, at all soft writes, or as `response` says."""
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
    revealing = [n for n, member in enumerate(members) if member.query.surrogate in REVEALING]
    lens = [len(member.query.candidates) for member in members]
    transfer = Transfer(current.device)
    named, spans = _announce(current, members, transfer), transfer.add(_spans(lens, revealing))
    soft = _soft_writes(current, members, transfer)
    observe = None
    if revealing:
        observe = _responses(current, [members[n] for n in revealing], soft[spans.tensor])
    dx = _backward(current, current.saved, members, named, observe)
    scores = _scores(current, dx, named, soft)
    if observe is not None:
        scores[spans.tensor] = observe.drops_C.to(scores)
    values = summed(scores, members, [len(query.candidates) for _, query in queries])
    served = places_of(members, len(queries))
    return [
        QueryResult(
            value=value,
            forwards=len(own) * (query.surrogate in REVEALING),
            backwards=len(own),
            rows_forward=len(own) * len(query.candidates) * (query.surrogate in REVEALING),
            rows_backward=sum(current.layout.saved_lens[place] for place in own),
        )
        for (_, query), own, value in zip(queries, served, values, strict=True)
    ]


def _injected(
    first: DenoisingPass, queries: Sequence[tuple[int, TokenImportance]]
) -> list[QueryResult[FloatArray]]:
    """ "inject": a second forward with all candidates' soft writes, then its backward."""
    members = members_of(first, queries)
    soft = _soft_writes(first, members, Transfer(first.device))
    second = _second_pass(first, queries, members, soft)
    assert second.saved is not None
    layout = second.layout
    again = members_of(second, [(n, query) for n, (_, query) in enumerate(queries)])
    named = _announce(second, again, Transfer(first.device))
    dx = _backward(second, second.saved, again, named)
    scores = _scores(second, dx, named, soft)
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
    written = [layout.live_starts[n] + m.query.candidates for n, m in enumerate(members)]
    (index,) = to_device([np.concatenate(written)], first.device)
    x = model.embed(layout.tokens).clone()
    x[index] = soft_CD
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
        live = rows.kept_positions
        outside = first.layout.attention.kv_seqlens[first.place(s)] - len(live)
    return dataclasses.replace(
        rows,
        extra_positions=np.empty(0, np.int64),
        keep="all" if query.active is None else "masked",
        live_positions=live,
        frozen_rows=outside,
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Named:
    """Where a pass has what its members' queries name, on the way to the device."""

    candidates: Arrival
    """[C] saved rows."""
    objective: Arrival
    """[O] saved rows at which the objective is read."""
    weights: Arrival
    """[O] of the rows' logits in those that are read, in float32 or better."""
    active: Arrival | None
    """[A, 1, 1] 1 for saved rows that are active (eq. 30), else 0; None if all are."""


def _announce(current: DenoisingPass, members: Sequence[Member], transfer: Transfer) -> _Named:
    """Find the rows, and announce them to the device."""
    candidates = [current.saved_rows(m.place, m.query.candidates) for m in members]
    objective = [current.read_saved_rows(m.place, m.query.objective) for m in members]
    dtype = current.log_probs.hidden_RD.dtype
    active = _active_rows(current, members)
    return _Named(
        candidates=transfer.add(np.concatenate(candidates)),
        objective=transfer.add(np.concatenate(objective)),
        weights=transfer.add(_weights(members), torch.promote_types(dtype, torch.float32)),
        active=None if active.all() else transfer.add(active, dtype),
    )


def _weights(members: Sequence[Member]) -> FloatArray:
    return np.repeat([m.weight for m in members], [len(m.query.objective) for m in members])


def _active_rows(current: DenoisingPass, members: Sequence[Member]) -> FloatArray:
    active = np.zeros((sum(current.layout.saved_lens), 1, 1))
    for member in members:
        start, chosen = current.layout.saved_starts[member.place], member.query.active
        rows: slice | list[int] = slice(start, start + current.layout.saved_lens[member.place])
        if chosen is not None:
            rows = [*start + chosen, *current.read_saved_rows(member.place, chosen)]
        active[rows] = 1
    return active


def _soft_writes(current: DenoisingPass, members: Sequence[Member], transfer: Transfer) -> Tensor:
    """[C, D] soft writes, packed member by member; a copy's are those of its sequence."""
    own = [member for member in members if member.own]
    rows = np.concatenate([current.logit_rows(m.source, m.query.candidates) for m in own])
    lens = [len(m.query.candidates) for m in own]
    sharpen = np.repeat([m.query.sharpen for m in own], lens)
    copies = members[len(own) :]
    again = transfer.add(_spans(lens, [member.number for member in copies]))
    soft = soft_writes(current.log_probs, rows, sharpen, transfer)
    return torch.cat([soft, soft[again.tensor]]) if copies else soft


def _responses(current: DenoisingPass, members: Sequence[Member], soft_CD: Tensor) -> Responses:
    """What watches the backward for those that need the candidates' keys and values revealed."""
    places, candidates = [m.place for m in members], [m.query.candidates for m in members]
    changes = reveal(soft_CD, current, places, candidates)
    watched = [
        Watched(place=m.place, candidates=m.query.candidates, rule=m.query.surrogate)
        for m in members
    ]
    return Responses(current, watched, changes)


def _backward(
    current: DenoisingPass,
    saved: SavedPass,
    members: Sequence[Member],
    named: _Named,
    observe: Responses | None = None,
) -> Tensor:
    """[A, D] gradient of the summed entropies at the saved rows' embeddings."""
    with current.timed("backward"):
        dhidden = _objective_gradient(current, members, named)
        active = None if named.active is None else named.active.tensor
        return current.model.backward(dhidden, saved, active, observe=observe)


def _objective_gradient(current: DenoisingPass, members: Sequence[Member], named: _Named) -> Tensor:
    """[A, D] gradient of the summed entropies at the saved rows' final hidden states."""
    log_probs, weights = current.log_probs, _weights(members)
    rows = np.concatenate([current.logit_rows(m.source, m.query.objective) for m in members])
    saved = sum(current.layout.saved_lens)
    dhidden = log_probs.hidden_RD.new_zeros(saved, log_probs.hidden_RD.shape[1])
    for places, logp in log_probs.rows(rows):
        gradient = entropy_gradient(logp, log_probs.memory.gradient)
        if (weights[places] != 1).any():
            gradient *= named.weights.tensor[places, None]
        gradient = current.model.logits_backward(gradient).to(dhidden)
        dhidden[named.objective.tensor[places]] = gradient
    return dhidden


def _scores(current: DenoisingPass, dx_AD: Tensor, named: _Named, soft_CD: Tensor) -> Tensor:
    """[C] how much the entropies fall, to first order, from the mask to the soft write."""
    mask = torch.full((1,), current.log_probs.mask_token_id, device=current.device)
    change = accurate(soft_CD) - accurate(current.model.embed(mask).to(soft_CD.dtype))
    return -(accurate(dx_AD[named.candidates.tensor]) * change).sum(-1)


def _spans(lens: Sequence[int], chosen: Sequence[int]) -> IntArray:
    """Packed places of the values of some members, given the number of each member's values."""
    starts = np.cumsum([0, *lens])
    pieces = [np.arange(starts[n], starts[n + 1]) for n in chosen]
    return np.concatenate([np.empty(0, np.int64), *pieces])
