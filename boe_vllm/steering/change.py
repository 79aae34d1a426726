"""How far each prediction has moved since the step before, in nats.

A request's final hidden states of the step before are kept on its canvas, not their distributions:
they are `V / D` times smaller (31 times for LLaDA-8B), and the logits that follow from them come
out the same when they are computed again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from boe_vllm.base.arrays import FloatArray, IntArray
from boe_vllm.base.transfer import Transfer
from boe_vllm.steering.step import DenoisingPass, Query, QueryResult

Tensor = torch.Tensor

EPSILON = 1e-12
"""Added to both probabilities (KLASS), so that the first prediction has a finite KL to nothing."""
_MEMORY = "prediction_change"


@dataclasses.dataclass(frozen=True, slots=True)
class _Before:
    """Final hidden states of one request's masked positions, this block's and the next's, in the
    step before."""

    positions: IntArray
    hidden_ND: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PredictionChange(Query[FloatArray]):
    """KL(prediction now || prediction one step before) of each position: float64 [M], nats.

    The first time, a position's KL is that from nothing (`p_0 = 0`), which is large. To be asked in
    every step. Costs no forward.
    """

    positions: IntArray
    """[M] the view's positions."""

    @classmethod
    def solve(
        cls, current: DenoisingPass, queries: Sequence[tuple[int, PredictionChange]]
    ) -> list[QueryResult[FloatArray]]:
        """Compare with what the last step left behind, and leave this step's behind."""
        starts = np.cumsum([0, *(len(query.positions) for _, query in queries)])
        transfer = Transfer(current.device)
        rows, known, kept = [], [], []
        for (s, query), start in zip(queries, starts[:-1], strict=True):
            rows.append(current.logit_rows(s, np.arange(len(query.positions))))
            before = _exchange(current, s)
            if before is not None:
                _, now, then = np.intersect1d(
                    query.positions, before.positions, return_indices=True
                )
                known.append(start + now)
                kept.append((before.hidden_ND, transfer.add(then)))
        packed = np.concatenate(rows)
        seen = np.concatenate([np.empty(0, np.int64), *known])
        new = np.setdiff1d(np.arange(len(packed)), seen)
        found = []
        if len(seen):
            hidden = torch.cat([hidden_ND[then.tensor] for hidden_ND, then in kept])
            found.append(_kl(current, packed[seen], hidden))
        if len(new):
            found.append(_kl(current, packed[new], None))
        kl = np.empty(len(packed))
        if found:
            kl[np.concatenate([seen, new])] = torch.cat(found).cpu().numpy()
        return [QueryResult(value=kl[a:b]) for a, b in zip(starts[:-1], starts[1:], strict=True)]


def _exchange(current: DenoisingPass, s: int) -> _Before | None:
    """What the last step left behind for a sequence; this step's takes its place."""
    positions = current.sequences[s].wanted_positions
    memory = current.device_memory[s]
    before: _Before | None = memory.get(_MEMORY)
    first = int(current.logit_rows(s, np.zeros(1, np.int64))[0])
    memory[_MEMORY] = _Before(
        positions, current.log_probs.hidden_RD[first : first + len(positions)].clone()
    )
    return before


def _kl(current: DenoisingPass, rows: IntArray, before_ND: Tensor | None) -> Tensor:
    """[N] KLs of the logit rows' predictions from those of the states before, or from nothing."""
    log_probs = current.log_probs
    pieces = []
    if before_ND is None:
        pieces = [_kl_rows(now, None) for _, now in log_probs.rows(rows)]
    else:
        before = log_probs.of(before_ND, log_probs.constraint_R[rows])
        tiles = zip(log_probs.rows(rows), before.tiles(), strict=True)
        pieces = [_kl_rows(now, then) for (_, now), (_, then) in tiles]
    return torch.cat(pieces)


def _kl_rows(now_rV: Tensor, before_rV: Tensor | None) -> Tensor:
    """[r] KLs in float64, a few rows at a time: a tile in float64 would break the memory budget."""
    few = max(1, len(now_rV) // 8)
    kl = []
    for start in range(0, len(now_rV), few):
        rows = slice(start, start + few)
        p = now_rV[rows].double().softmax(-1)
        if before_rV is None:
            q = torch.zeros((), dtype=p.dtype, device=p.device)
        else:
            q = before_rV[rows].double().softmax(-1)
        kl.append((p * ((p + EPSILON).log() - (q + EPSILON).log())).sum(-1))
    return torch.cat(kl)
