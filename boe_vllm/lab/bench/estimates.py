"""Every gain score and every estimator of coupling on given states, with oracle and cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from boe_vllm.base.arrays import FloatArray
from boe_vllm.decoding.loop import DenoisingLoop
from boe_vllm.lab.bench.decoded import DecodedState, pass_over
from boe_vllm.lab.bench.ranks import share_of_gain, spearman
from boe_vllm.policies.base import top
from boe_vllm.steering.coupling import Coupling
from boe_vllm.steering.importance import TokenImportance
from boe_vllm.steering.lookahead import Lookahead
from boe_vllm.steering.step import DenoisingPass, Query, QueryResult, solve_together

LOOKAHEAD = "lookahead"
GAINS: dict[str, dict[str, Any]] = {
    "confidence": {},
    "mask": {"surrogate": "mask"},
    "inject frozen": {"surrogate": "inject", "context": "frozen"},
    "inject exact": {"surrogate": "inject", "context": "exact"},
    "kv": {"surrogate": "kv"},
    "response": {"surrogate": "response"},
    "rectified": {"surrogate": "rectified"},
}
"""Gain scores: the confidence itself, and each surrogate with all of M active and summed."""
COUPLINGS = ("exact", "pairs", "attention", "overlap")
CHEAP = 1.3
"""What a cheap estimator may cost, in confidence steps."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Fidelity:
    """How one estimate fared in one state."""

    name: str
    measure: str | None = None
    """Of couplings."""
    spearman: float
    share: float | None = None
    """Of the possible gain, for gains."""
    rows: int
    """Of the forwards and backwards beyond the step's own."""


def step_fields(name: str, *, rho: float) -> dict[str, Any]:
    """A step that uses an estimate, as a request would ask for it."""
    if name == LOOKAHEAD:
        return {"policy": "lookahead", "rho": rho}
    if name in COUPLINGS:
        return {"policy": "pairwise", "coupling": name, "coupling_measure": "kl"}
    return {"policy": "boe", "preset": "kv", "rho": rho, **GAINS[name]}


@torch.no_grad()
def gain_fidelity(
    loop: DenoisingLoop, states: Sequence[DecodedState], *, rho: float
) -> list[Fidelity]:
    """All scores, score by score, each in the order of the states; the oracle last."""
    current, statistics = pass_over(loop, states)
    candidates = [
        np.sort(top(own.confidence, math.ceil(rho * len(own.confidence)))) for own in statistics
    ]
    oracle = _answers(
        current, [Lookahead(writes=tuple(chosen[:, None]), tokens=None) for chosen in candidates]
    )
    drops = [
        np.array([own.entropy[p.index].sum() - p.entropies().sum() for p in given.value])
        for own, given in zip(statistics, oracle, strict=True)
    ]
    found = []
    for name, settings in GAINS.items():
        if settings:
            given = _answers(
                current,
                [
                    _importance(state, c, settings)
                    for state, c in zip(states, candidates, strict=True)
                ],
            )
            scores, rows = [a.value for a in given], list(map(_rows, given))
        else:
            scores = [own.confidence[c] for own, c in zip(statistics, candidates, strict=True)]
            rows = [0] * len(states)
        found += [_gain(name, *each) for each in zip(scores, drops, rows, strict=True)]
    return found + [_gain(LOOKAHEAD, d, d, _rows(a)) for d, a in zip(drops, oracle, strict=True)]


@torch.no_grad()
def coupling_fidelity(
    loop: DenoisingLoop, states: Sequence[DecodedState], *, budget: int
) -> list[Fidelity]:
    """All estimators in both measures, each in the order of the states."""
    current, statistics = pass_over(loop, states)
    pools = [
        np.sort(top(own.confidence, min(2 * budget, len(own.confidence)))) for own in statistics
    ]
    found = []
    for measure in ("kl", "pmi"):
        oracle: list[QueryResult] = []
        for name in COUPLINGS:
            queries = [
                Coupling(
                    pool=pool,
                    tokens=own.proposal[pool],
                    entropy=own.entropy[pool],
                    estimator=name,  # type: ignore[arg-type]
                    measure=measure,  # type: ignore[arg-type]
                )
                for own, pool in zip(statistics, pools, strict=True)
            ]
            given = _answers(current, queries)
            oracle = oracle or given
            found += [
                Fidelity(
                    name=name,
                    measure=measure,
                    spearman=spearman(_pairs(own.value), _pairs(exact.value)),
                    rows=_rows(own),
                )
                for own, exact in zip(given, oracle, strict=True)
            ]
    return found


def _importance(
    state: DecodedState, candidates: np.ndarray, settings: Mapping[str, Any]
) -> TokenImportance:
    everyone = np.arange(len(state.masked))
    fields: dict[str, Any] = {"context": "frozen", "sharpen": 1.0, **settings}
    return TokenImportance(candidates=candidates, objective=everyone, active=everyone, **fields)


def _answers(current: DenoisingPass, queries: Sequence[Query]) -> list[QueryResult]:
    given = solve_together(current, dict(enumerate(queries)))
    return [given[n] for n in range(len(queries))]


def _gain(name: str, score: FloatArray, drop: FloatArray, rows: int) -> Fidelity:
    share = share_of_gain(int(top(score, 1)[0]), drop)
    return Fidelity(name=name, spearman=spearman(score, drop), share=share, rows=rows)


def _rows(given: QueryResult) -> int:
    return given.rows_forward + given.rows_backward


def _pairs(matrix: FloatArray) -> FloatArray:
    return matrix[np.triu_indices(len(matrix), 1)]
