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

from boe_vllm.arrays import IntArray
from boe_vllm.distributions import entropy_gradient
from boe_vllm.models.functional import accurate
from boe_vllm.prediction import LogProbabilities
from boe_vllm.rows import SequenceRows, pack
from boe_vllm.steering.asks import TokenImportance
from boe_vllm.steering.guidance import guided, with_twins
from boe_vllm.steering.parts import Part, parts_of, places_of, summed
from boe_vllm.steering.response import Responses
from boe_vllm.steering.step import Answer, DenoisingPass
from boe_vllm.steering.surrogate import FrozenRows, reveal, soft_writes

Tensor = torch.Tensor

REVEALING = ("kv", "response", "rectified")
"""Surrogates that need the candidates' revealed keys and values."""


def token_importance(
    current: DenoisingPass, asks: Sequence[tuple[int, TokenImportance]]
) -> list[Answer]:
    """[C] scores per ask, nats; `asks` are pairs of a sequence of the pass and its ask."""
    answers: list[Answer | None] = [None] * len(asks)
    single = [n for n, (_, ask) in enumerate(asks) if ask.surrogate != "inject"]
    frozen = [
        n
        for n, (_, ask) in enumerate(asks)
        if ask.surrogate == "inject" and ask.context == "frozen"
    ]
    exact = [
        n for n, (_, ask) in enumerate(asks) if ask.surrogate == "inject" and ask.context == "exact"
    ]
    for members, solve in ((single, _single_pass), (frozen, _injected), (exact, _injected)):
        if members:
            for n, answer in zip(members, solve(current, [asks[m] for m in members]), strict=True):
                answers[n] = answer
    return [answer for answer in answers if answer is not None]


def _single_pass(
    current: DenoisingPass, asks: Sequence[tuple[int, TokenImportance]]
) -> list[Answer]:
    """All surrogates but "inject": one backward on the step's own tape."""
    assert current.tape is not None
    parts = parts_of(current, asks)
    soft = _soft_writes(current, parts)
    kept = _packed(current.kept_rows, parts, "candidates").to(current.device)
    revealing = [n for n, part in enumerate(parts) if part.ask.surrogate in REVEALING]
    lens = [len(part.ask.candidates) for part in parts]
    places = _places(lens, revealing).to(current.device)
    observe = None
    if revealing:
        changes = reveal(
            soft[places],
            current,
            [parts[n].place for n in revealing],
            [parts[n].ask.candidates for n in revealing],
        )
        observe = Responses(current, [parts[n] for n in revealing], changes)
    with current.clock.part("backward"):
        dx = current.model.backward(
            _objective_gradient(current, parts),
            current.tape,
            _open_rows(current, parts),
            observe=observe,
        )
    change = accurate(soft) - accurate(_mask_embedding(current, soft.dtype))
    scores = -(accurate(dx[kept]) * change).sum(-1)
    if observe is not None:
        scores[places] = observe.drops_C.to(scores)
    return [
        Answer(
            value=value,
            forwards=len(own) * (ask.surrogate in REVEALING),
            backwards=len(own),
            rows_forward=len(own) * len(ask.candidates) * (ask.surrogate in REVEALING),
            rows_backward=sum(current.layout.kept_lens[place] for place in own),
        )
        for (_, ask), own, value in zip(
            asks, places_of(parts, len(asks)), summed(scores, parts, len(asks)), strict=True
        )
    ]


def _injected(current: DenoisingPass, asks: Sequence[tuple[int, TokenImportance]]) -> list[Answer]:
    """ "inject": a second forward with all candidates' soft writes, then its backward."""
    model, first = current.model, current
    parts = parts_of(first, asks)
    soft = _soft_writes(first, parts)
    guides = [first.guide(s) for s, _ in asks]
    sequences, twins = with_twins(
        [_relaxed_rows(first, s, ask) for s, ask in asks], guides, first.log_probs.mask_token_id
    )
    layout = pack(sequences, first.device)
    context = None
    if any(layout.frozen_lens):
        assert first.tape is not None
        context = FrozenRows(first.tape, layout, [part.place for part in parts])
    x = model.embed(layout.tokens).clone()
    live_rows = [
        start + part.ask.candidates for start, part in zip(layout.live_starts, parts, strict=True)
    ]
    x[torch.from_numpy(np.concatenate(live_rows)).to(first.device)] = soft
    hidden, tape = model.run(x, layout, context)
    rules = [
        first.log_probs.rules_R[first.logit_rows(s, np.arange(len(rows.logit_positions)))]
        for (s, _), rows in zip(asks, sequences, strict=False)
    ]
    second = DenoisingPass(
        model=model,
        sequences=sequences,
        layout=layout,
        log_probs=first.log_probs.of(guided(hidden, layout, twins, guides), np.concatenate(rules)),
        tape=tape,
        guides=tuple(guides),
        twins=twins,
    )
    parts = parts_of(second, [(n, ask) for n, (_, ask) in enumerate(asks)])
    assert tape is not None
    with first.clock.part("backward"):
        dx = model.backward(_objective_gradient(second, parts), tape, _open_rows(second, parts))
    kept = _packed(second.kept_rows, parts, "candidates").to(first.device)
    change = accurate(soft) - accurate(_mask_embedding(first, soft.dtype))
    scores = -(accurate(dx[kept]) * change).sum(-1)
    return [
        Answer(
            value=value,
            forwards=len(own),
            backwards=len(own),
            rows_forward=sum(layout.live_lens[place] for place in own),
            rows_backward=sum(layout.kept_lens[place] for place in own),
        )
        for own, value in zip(
            places_of(parts, len(asks)), summed(scores, parts, len(asks)), strict=True
        )
    ]


def _relaxed_rows(first: DenoisingPass, s: int, ask: TokenImportance) -> SequenceRows:
    """The rows of one sequence in the second pass."""
    rows = first.sequences[s]
    live, outside = rows.live_positions, rows.frozen_rows
    if ask.context == "frozen":
        live = rows.logit_positions
        outside = first.layout.attention.kv_seqlens[s] - len(live)
    return SequenceRows(
        tokens=rows.tokens,
        logit_positions=rows.logit_positions,
        keep="all" if ask.active is None else "masked",
        live_positions=live,
        frozen_rows=outside,
    )


def _soft_writes(current: DenoisingPass, parts: Sequence[Part]) -> Tensor:
    """[C, D] soft writes, packed part by part; a twin's are those of its sequence."""
    own = [part for part in parts if part.place == part.source]
    rows = np.concatenate([current.logit_rows(p.source, p.ask.candidates) for p in own])
    sharpen = np.concatenate([np.full(len(p.ask.candidates), p.ask.sharpen) for p in own])
    soft = soft_writes(current.log_probs, rows, sharpen)
    again = _places([len(p.ask.candidates) for p in own], [p.number for p in parts[len(own) :]])
    return torch.cat([soft, soft[again.to(soft.device)]]) if len(again) else soft


def _objective_gradient(current: DenoisingPass, parts: Sequence[Part]) -> Tensor:
    """[K, D] gradient of the summed entropies at the kept rows' final hidden states."""
    log_probs: LogProbabilities = current.log_probs
    rows = np.concatenate([current.logit_rows(p.source, p.ask.objective) for p in parts])
    weights = np.concatenate([np.full(len(p.ask.objective), p.weight) for p in parts])
    kept = _packed(current.kept_rows, parts, "objective").to(current.device)
    total = sum(current.layout.kept_lens)
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


def _open_rows(current: DenoisingPass, parts: Sequence[Part]) -> Tensor:
    """[K, 1, 1] 1 where the attention output passes a gradient (eq. 30), else 0."""
    open_rows = np.zeros(sum(current.layout.kept_lens))
    for part in parts:
        start = current.layout.kept_starts[part.place]
        if part.ask.active is None:
            open_rows[start : start + current.layout.kept_lens[part.place]] = 1
        else:
            open_rows[start + part.ask.active] = 1
    dtype = current.log_probs.hidden_RD.dtype
    return torch.from_numpy(open_rows).to(current.device, dtype)[:, None, None]


def _mask_embedding(current: DenoisingPass, dtype: torch.dtype) -> Tensor:
    token = torch.tensor([current.log_probs.mask_token_id], device=current.device)
    return current.model.embed(token).to(dtype)


def _packed(rows_of, parts: Sequence[Part], name: str) -> Tensor:
    pieces: list[IntArray] = [rows_of(part.place, getattr(part.ask, name)) for part in parts]
    return torch.from_numpy(np.concatenate(pieces))


def _starts(lens: Sequence[int]) -> list[int]:
    return [0, *np.cumsum(lens)[:-1].tolist()]


def _places(lens: Sequence[int], members: Sequence[int]) -> Tensor:
    """Packed places of the given members."""
    starts = _starts(lens)
    pieces = [np.arange(starts[n], starts[n] + lens[n]) for n in members]
    return torch.from_numpy(np.concatenate(pieces) if pieces else np.empty(0, np.int64))
