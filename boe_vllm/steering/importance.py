"""Token Importance Scores (eq. 14) of all steering requests of a batch, in shared passes.

For all surrogates but "inject" one backward through the kept rows of the step's own pass serves
every request; for "inject" a second forward over the relaxed states precedes it. Sequences do not
see each other, so each request's gradient is its own although all objectives are summed.

Legend: `C` packed candidates, `O` packed objective rows, `K` kept rows, `D` width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from boe_vllm.base.arrays import IntArray
from boe_vllm.models.functional import accurate
from boe_vllm.models.rows import SequenceRows, pack
from boe_vllm.sampling.distributions import entropy_gradient
from boe_vllm.sampling.statistics import LogProbabilities
from boe_vllm.steering.guidance import guided, with_unconditional
from boe_vllm.steering.parts import PairMember, members_of, places_of, summed
from boe_vllm.steering.queries import TokenImportance
from boe_vllm.steering.response import Responses
from boe_vllm.steering.step import DenoisingPass, QueryResult
from boe_vllm.steering.surrogate import FrozenRows, reveal, soft_writes

Tensor = torch.Tensor

REVEALING = ("kv", "response", "rectified")
"""Surrogates that need the candidates' revealed keys and values."""


def token_importance(
    current: DenoisingPass, queries: Sequence[tuple[int, TokenImportance]]
) -> list[QueryResult]:
    """[C] scores per query, nats; `queries` are pairs of a sequence of the pass and its query."""
    answers: list[QueryResult | None] = [None] * len(queries)
    single = [n for n, (_, query) in enumerate(queries) if query.surrogate != "inject"]
    frozen = [
        n
        for n, (_, query) in enumerate(queries)
        if query.surrogate == "inject" and query.context == "frozen"
    ]
    exact = [
        n
        for n, (_, query) in enumerate(queries)
        if query.surrogate == "inject" and query.context == "exact"
    ]
    for members, solve in ((single, _single_pass), (frozen, _injected), (exact, _injected)):
        if members:
            for n, answer in zip(
                members, solve(current, [queries[m] for m in members]), strict=True
            ):
                answers[n] = answer
    return [answer for answer in answers if answer is not None]


def _single_pass(
    current: DenoisingPass, queries: Sequence[tuple[int, TokenImportance]]
) -> list[QueryResult]:
    """All surrogates but "inject": one backward on the step's own saved."""
    assert current.saved is not None
    parts = members_of(current, queries)
    soft = _soft_writes(current, parts)
    kept = _packed(current.saved_rows, parts, "candidates").to(current.device)
    revealing = [n for n, part in enumerate(parts) if part.query.surrogate in REVEALING]
    lens = [len(part.query.candidates) for part in parts]
    places = _places(lens, revealing).to(current.device)
    observe = None
    if revealing:
        changes = reveal(
            soft[places],
            current,
            [parts[n].place for n in revealing],
            [parts[n].query.candidates for n in revealing],
        )
        observe = Responses(current, [parts[n] for n in revealing], changes)
    with current.clock.part("backward"):
        dx = current.model.backward(
            _objective_gradient(current, parts),
            current.saved,
            _active_rows(current, parts),
            observe=observe,
        )
    change = accurate(soft) - accurate(_mask_embedding(current, soft.dtype))
    scores = -(accurate(dx[kept]) * change).sum(-1)
    if observe is not None:
        scores[places] = observe.drops_C.to(scores)
    return [
        QueryResult(
            value=value,
            forwards=len(own) * (query.surrogate in REVEALING),
            backwards=len(own),
            rows_forward=len(own) * len(query.candidates) * (query.surrogate in REVEALING),
            rows_backward=sum(current.layout.saved_lens[place] for place in own),
        )
        for (_, query), own, value in zip(
            queries,
            places_of(parts, len(queries)),
            summed(scores, parts, len(queries)),
            strict=True,
        )
    ]


def _injected(
    current: DenoisingPass, queries: Sequence[tuple[int, TokenImportance]]
) -> list[QueryResult]:
    """ "inject": a second forward with all candidates' soft writes, then its backward."""
    model, first = current.model, current
    parts = members_of(first, queries)
    soft = _soft_writes(first, parts)
    guides = [first.guide(s) for s, _ in queries]
    sequences, unconditional = with_unconditional(
        [_relaxed_rows(first, s, query) for s, query in queries],
        guides,
        first.log_probs.mask_token_id,
    )
    layout = pack(sequences, first.device)
    context = None
    if any(layout.frozen_lens):
        assert first.saved is not None
        context = FrozenRows(first.saved, layout, [part.place for part in parts])
    x = model.embed(layout.tokens).clone()
    live_rows = [
        start + part.query.candidates for start, part in zip(layout.live_starts, parts, strict=True)
    ]
    x[torch.from_numpy(np.concatenate(live_rows)).to(first.device)] = soft
    hidden, saved = model.run(x, layout, context)
    rules = [
        first.log_probs.constraint_R[first.logit_rows(s, np.arange(len(rows.logit_positions)))]
        for (s, _), rows in zip(queries, sequences, strict=False)
    ]
    second = DenoisingPass(
        model=model,
        sequences=sequences,
        layout=layout,
        log_probs=first.log_probs.of(
            guided(hidden, layout, unconditional, guides), np.concatenate(rules)
        ),
        saved=saved,
        guides=tuple(guides),
        unconditional=unconditional,
    )
    parts = members_of(second, [(n, query) for n, (_, query) in enumerate(queries)])
    assert saved is not None
    with first.clock.part("backward"):
        dx = model.backward(_objective_gradient(second, parts), saved, _active_rows(second, parts))
    kept = _packed(second.saved_rows, parts, "candidates").to(first.device)
    change = accurate(soft) - accurate(_mask_embedding(first, soft.dtype))
    scores = -(accurate(dx[kept]) * change).sum(-1)
    return [
        QueryResult(
            value=value,
            forwards=len(own),
            backwards=len(own),
            rows_forward=sum(layout.live_lens[place] for place in own),
            rows_backward=sum(layout.saved_lens[place] for place in own),
        )
        for own, value in zip(
            places_of(parts, len(queries)), summed(scores, parts, len(queries)), strict=True
        )
    ]


def _relaxed_rows(first: DenoisingPass, s: int, query: TokenImportance) -> SequenceRows:
    """The rows of one sequence in the second pass."""
    rows = first.sequences[s]
    live, outside = rows.live_positions, rows.frozen_rows
    if query.context == "frozen":
        live = rows.logit_positions
        outside = first.layout.attention.kv_seqlens[s] - len(live)
    return SequenceRows(
        tokens=rows.tokens,
        logit_positions=rows.logit_positions,
        keep="all" if query.active is None else "masked",
        live_positions=live,
        frozen_rows=outside,
    )


def _soft_writes(current: DenoisingPass, parts: Sequence[PairMember]) -> Tensor:
    """[C, D] soft writes, packed part by part; a unconditional's are those of its sequence."""
    own = [part for part in parts if part.place == part.source]
    rows = np.concatenate([current.logit_rows(p.source, p.query.candidates) for p in own])
    sharpen = np.concatenate([np.full(len(p.query.candidates), p.query.sharpen) for p in own])
    soft = soft_writes(current.log_probs, rows, sharpen)
    again = _places([len(p.query.candidates) for p in own], [p.number for p in parts[len(own) :]])
    return torch.cat([soft, soft[again.to(soft.device)]]) if len(again) else soft


def _objective_gradient(current: DenoisingPass, parts: Sequence[PairMember]) -> Tensor:
    """[K, D] gradient of the summed entropies at the kept rows' final hidden states."""
    log_probs: LogProbabilities = current.log_probs
    rows = np.concatenate([current.logit_rows(p.source, p.query.objective) for p in parts])
    weights = np.concatenate([np.full(len(p.query.objective), p.weight) for p in parts])
    kept = _packed(current.saved_rows, parts, "objective").to(current.device)
    total = sum(current.layout.saved_lens)
    dhidden = torch.zeros(
        (total, log_probs.hidden_RD.shape[1]),
        dtype=log_probs.hidden_RD.dtype,
        device=current.device,
    )
    for places, logp in log_probs.rows(rows):
        gradient = entropy_gradient(logp, log_probs.memory.gradient)
        if (weights[places] != 1).any():
            gradient *= torch.from_numpy(weights[places]).to(gradient)[:, None]
        dhidden[kept[places]] = current.model.logits_backward(gradient).to(dhidden)
    return dhidden


def _active_rows(current: DenoisingPass, parts: Sequence[PairMember]) -> Tensor:
    """[K, 1, 1] 1 where the attention output passes a gradient (eq. 30), else 0."""
    active_rows = np.zeros(sum(current.layout.saved_lens))
    for part in parts:
        start = current.layout.saved_starts[part.place]
        if part.query.active is None:
            active_rows[start : start + current.layout.saved_lens[part.place]] = 1
        else:
            active_rows[start + part.query.active] = 1
    dtype = current.log_probs.hidden_RD.dtype
    return torch.from_numpy(active_rows).to(current.device, dtype)[:, None, None]


def _mask_embedding(current: DenoisingPass, dtype: torch.dtype) -> Tensor:
    token = torch.tensor([current.log_probs.mask_token_id], device=current.device)
    return current.model.embed(token).to(dtype)


def _packed(rows_of, parts: Sequence[PairMember], name: str) -> Tensor:
    pieces: list[IntArray] = [rows_of(part.place, getattr(part.query, name)) for part in parts]
    return torch.from_numpy(np.concatenate(pieces))


def _starts(lens: Sequence[int]) -> list[int]:
    return [0, *np.cumsum(lens)[:-1].tolist()]


def _places(lens: Sequence[int], members: Sequence[int]) -> Tensor:
    """Packed places of the given members."""
    starts = _starts(lens)
    pieces = [np.arange(starts[n], starts[n] + lens[n]) for n in members]
    return torch.from_numpy(np.concatenate(pieces) if pieces else np.empty(0, np.int64))
