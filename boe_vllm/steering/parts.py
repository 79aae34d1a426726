"""Who takes part in an ask: the sequence itself and, under guidance, its unconditional twin."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from boe_vllm.arrays import FloatArray
from boe_vllm.steering.asks import TokenImportance
from boe_vllm.steering.step import DenoisingPass

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What one sequence of a pass adds to an ask: every ask's own, then the twins' of the guided.

    A write changes the sequence and its twin alike, so the two parts of a guided ask add up.
    """

    ask: TokenImportance
    number: int
    """Which of the asks."""
    source: int
    """The sequence whose predictions the ask is about."""
    place: int
    """The sequence of the pass whose rows this part concerns: the source or its twin."""
    weight: float
    """Of this sequence's logits in those that are read."""


def parts_of(current: DenoisingPass, asks: Sequence[tuple[int, TokenImportance]]) -> list[Part]:
    """The asks' own parts, in their order, and then those of twins."""
    own, twins = [], []
    for n, (s, ask) in enumerate(asks):
        guide = current.guide(s)
        weights = (1.0, 0.0) if guide is None else guide.weights
        own.append(Part(ask=ask, number=n, source=s, place=s, weight=weights[0]))
        if guide is not None:
            place = current.twins[s]
            twins.append(Part(ask=ask, number=n, source=s, place=place, weight=weights[1]))
    return own + twins


def places_of(parts: Sequence[Part], asks: int) -> list[list[int]]:
    """The sequences of the pass that serve each ask."""
    return [[part.place for part in parts if part.number == n] for n in range(asks)]


def summed(scores: Tensor, parts: Sequence[Part], asks: int) -> list[FloatArray]:
    """[C] per ask: the sum of its parts' scores, on the host."""
    host = scores.double().cpu().numpy()
    sums: list[FloatArray] = [np.empty(0)] * asks
    start = 0
    for n, part in enumerate(parts):
        piece = host[start : start + len(part.ask.candidates)]
        start += len(piece)
        sums[part.number] = piece if n < asks else sums[part.number] + piece
    return sums
