"""Who takes part in an query: the sequence itself and, under guidance, its unconditional unconditional."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from boe_vllm.base.arrays import FloatArray
from boe_vllm.steering.queries import TokenImportance
from boe_vllm.steering.step import DenoisingPass

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PairMember:
    """What one sequence of a pass adds to an query: every query's own, then the unconditional' of the guided.

    A write changes the sequence and its unconditional alike, so the two parts of a guided query add up.
    """

    query: TokenImportance
    number: int
    """Which of the queries."""
    source: int
    """The sequence whose predictions the query is about."""
    place: int
    """The sequence of the pass whose rows this part concerns: the source or its unconditional."""
    weight: float
    """Of this sequence's logits in those that are read."""


def members_of(
    current: DenoisingPass, queries: Sequence[tuple[int, TokenImportance]]
) -> list[PairMember]:
    """The queries' own parts, in their order, and then those of unconditional."""
    own, unconditional = [], []
    for n, (s, query) in enumerate(queries):
        guide = current.guide(s)
        weights = (1.0, 0.0) if guide is None else guide.weights
        own.append(PairMember(query=query, number=n, source=s, place=s, weight=weights[0]))
        if guide is not None:
            place = current.unconditional[s]
            unconditional.append(
                PairMember(query=query, number=n, source=s, place=place, weight=weights[1])
            )
    return own + unconditional


def places_of(parts: Sequence[PairMember], queries: int) -> list[list[int]]:
    """The sequences of the pass that serve each query."""
    return [[part.place for part in parts if part.number == n] for n in range(queries)]


def summed(scores: Tensor, parts: Sequence[PairMember], queries: int) -> list[FloatArray]:
    """[C] per query: the sum of its parts' scores, on the host."""
    host = scores.double().cpu().numpy()
    sums: list[FloatArray] = [np.empty(0)] * queries
    start = 0
    for n, part in enumerate(parts):
        piece = host[start : start + len(part.query.candidates)]
        start += len(piece)
        sums[part.number] = piece if n < queries else sums[part.number] + piece
    return sums
