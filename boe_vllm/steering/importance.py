"""Token Importance Scores (eq. 14) of all steering requests of a batch, in shared passes.

For "mask" and "kv" one backward through the kept rows of the step's own pass serves every request;
for "inject" a second forward over the relaxed states precedes it. Sequences do not see each other,
so each request's gradient is its own although all objectives are summed.

Legend: `C` packed candidates, `O` packed objective rows, `K` kept rows, `D` width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)

from boe_vllm.arrays import FloatArray, IntArray
from boe_vllm.models.functional import accurate
from boe_vllm.prediction import LogProbabilities, entropy_gradient
from boe_vllm.rows import SequenceRows, pack
from boe_vllm.steering.asks import TokenImportance
from boe_vllm.steering.step import Answer, DenoisingPass
from boe_vllm.steering.surrogate import FrozenRows, Revealed, reveal, soft_writes

Tensor = torch.Tensor


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
    """ "mask" and "kv": one backward on the step's own tape."""
    assert current.tape is not None
    model = current.model
    soft = _soft_writes(current, asks)
    kept = _packed(current.kept_rows, asks, "candidates").to(current.device)
    revealing = [n for n, (_, ask) in enumerate(asks) if ask.surrogate == "kv"]
    lens = [len(ask.candidates) for _, ask in asks]
    places = _places(lens, revealing).to(current.device)
    changes, response = None, None
    if revealing:
        changes = reveal(
            soft[places],
            current,
            [asks[n][0] for n in revealing],
            [asks[n][1].candidates for n in revealing],
        )
        response = _Response(changes, kept[places])
    dx = model.backward(
        _objective_gradient(current, asks),
        current.tape,
        _open_rows(current, asks),
        observe=response,
    )
    change = accurate(soft) - accurate(_mask_embedding(current, soft.dtype))
    scores = -(accurate(dx[kept]) * change).sum(-1)
    if response is not None:
        scores[places] = -response.total()
    host = scores.double().cpu().numpy()
    return [
        Answer(
            value=host[start : start + n],
            forwards=int(ask.surrogate == "kv"),
            backwards=1,
            rows_forward=n if ask.surrogate == "kv" else 0,
            rows_backward=current.layout.kept_lens[s],
        )
        for (s, ask), start, n in zip(asks, _starts(lens), lens, strict=True)
    ]


class _Response:
    """Adds up `<dH/dK, change of K> + <dH/dV, change of V>` of the candidates, layer by layer."""

    def __init__(self, changes: Revealed, kept_C: Tensor) -> None:
        self.changes, self.kept_C = changes, kept_C
        self.sum_C: Tensor | None = None

    def __call__(self, layer: int, dk_KGP: Tensor, dv_KGP: Tensor) -> None:
        part = (accurate(dk_KGP[self.kept_C]) * accurate(self.changes.keys[layer])).sum((1, 2))
        part = part + (accurate(dv_KGP[self.kept_C]) * accurate(self.changes.values[layer])).sum(
            (1, 2)
        )
        self.sum_C = part if self.sum_C is None else self.sum_C + part

    def total(self) -> Tensor:
        """[C] over all layers and, under tensor parallelism, all heads."""
        assert self.sum_C is not None
        if get_tensor_model_parallel_world_size() == 1:
            return self.sum_C
        return tensor_model_parallel_all_reduce(self.sum_C)


def _injected(current: DenoisingPass, asks: Sequence[tuple[int, TokenImportance]]) -> list[Answer]:
    """ "inject": a second forward with all candidates' soft writes, then its backward."""
    model, first = current.model, current
    frozen = asks[0][1].context == "frozen"
    owners = [s for s, _ in asks]
    soft = _soft_writes(first, asks)
    sequences = []
    for s, ask in asks:
        rows = first.sequences[s]
        keep = "all" if ask.active is None else "masked"
        live, outside = rows.live_positions, rows.frozen_rows
        if frozen:
            live = rows.logit_positions
            outside = first.layout.attention.kv_seqlens[s] - len(live)
        sequences.append(
            SequenceRows(
                tokens=rows.tokens,
                logit_positions=rows.logit_positions,
                keep=keep,
                live_positions=live,
                frozen_rows=outside,
            )
        )
    layout = pack(sequences, first.device)
    context = None
    if any(layout.frozen_lens):
        assert first.tape is not None
        context = FrozenRows(first.tape, layout, owners)
    x = model.embed(layout.tokens).clone()
    lens = [len(ask.candidates) for _, ask in asks]
    live_rows = [
        start + ask.candidates for start, (_, ask) in zip(layout.live_starts, asks, strict=True)
    ]
    x[torch.from_numpy(np.concatenate(live_rows)).to(first.device)] = soft
    hidden, tape = model.run(x, layout, context)
    forbidden = np.concatenate(
        [
            first.log_probs.forbidden[first.logit_rows(s, np.arange(len(rows.logit_positions)))]
            for s, rows in zip(owners, sequences, strict=True)
        ]
    )
    second = DenoisingPass(
        model=model,
        sequences=tuple(sequences),
        layout=layout,
        log_probs=first.log_probs.of(hidden, forbidden),
        tape=tape,
    )
    moved = [(n, ask) for n, (_, ask) in enumerate(asks)]
    assert tape is not None
    dx = model.backward(_objective_gradient(second, moved), tape, _open_rows(second, moved))
    kept = _packed(second.kept_rows, moved, "candidates").to(first.device)
    change = accurate(soft) - accurate(_mask_embedding(first, soft.dtype))
    host = (-(accurate(dx[kept]) * change).sum(-1)).double().cpu().numpy()
    return [
        Answer(
            value=host[start : start + n],
            forwards=1,
            backwards=1,
            rows_forward=layout.live_lens[place],
            rows_backward=layout.kept_lens[place],
        )
        for place, (start, n) in enumerate(zip(_starts(lens), lens, strict=True))
    ]


def _soft_writes(current: DenoisingPass, asks: Sequence[tuple[int, TokenImportance]]) -> Tensor:
    rows = np.concatenate([current.logit_rows(s, ask.candidates) for s, ask in asks])
    sharpen = np.concatenate([np.full(len(ask.candidates), ask.sharpen) for _, ask in asks])
    return soft_writes(current.log_probs, rows, sharpen)


def _objective_gradient(
    current: DenoisingPass, asks: Sequence[tuple[int, TokenImportance]]
) -> Tensor:
    """[K, D] gradient of the summed entropies at the kept rows' final hidden states."""
    log_probs: LogProbabilities = current.log_probs
    rows = np.concatenate([current.logit_rows(s, ask.objective) for s, ask in asks])
    kept = _packed(current.kept_rows, asks, "objective").to(current.device)
    total = sum(current.layout.kept_lens)
    dhidden = torch.zeros(
        (total, log_probs.hidden_RD.shape[1]),
        dtype=log_probs.hidden_RD.dtype,
        device=current.device,
    )
    for places, logp in log_probs.rows(rows):
        dhidden[kept[places]] = current.model.logits_backward(entropy_gradient(logp)).to(dhidden)
    return dhidden


def _open_rows(current: DenoisingPass, asks: Sequence[tuple[int, TokenImportance]]) -> Tensor:
    """[K, 1, 1] 1 where the attention output passes a gradient (eq. 30), else 0."""
    open_rows = np.zeros(sum(current.layout.kept_lens))
    for s, ask in asks:
        start = current.layout.kept_starts[s]
        if ask.active is None:
            open_rows[start : start + current.layout.kept_lens[s]] = 1
        else:
            open_rows[start + ask.active] = 1
    dtype = current.log_probs.hidden_RD.dtype
    return torch.from_numpy(open_rows).to(current.device, dtype)[:, None, None]


def _mask_embedding(current: DenoisingPass, dtype: torch.dtype) -> Tensor:
    token = torch.tensor([current.log_probs.mask_token_id], device=current.device)
    return current.model.embed(token).to(dtype)


def _packed(rows_of, asks: Sequence[tuple[int, TokenImportance]], name: str) -> Tensor:
    pieces: list[IntArray] = [rows_of(s, getattr(ask, name)) for s, ask in asks]
    return torch.from_numpy(np.concatenate(pieces))


def _starts(lens: Sequence[int]) -> list[int]:
    return [0, *np.cumsum(lens)[:-1].tolist()]


def _places(lens: Sequence[int], members: Sequence[int]) -> Tensor:
    """Packed places of the given members."""
    starts = _starts(lens)
    pieces = [np.arange(starts[n], starts[n] + lens[n]) for n in members]
    return torch.from_numpy(np.concatenate(pieces) if pieces else np.empty(0, np.int64))
