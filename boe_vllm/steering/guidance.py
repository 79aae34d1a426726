"""Classifier-free guidance: each guided sequence has an unconditional copy in the same pass, whose
prompt is masked. The two are a CFG pair.

LLaDA (ML-GSAI/LLaDA `generate.py`, `cfg_scale` w): `V = V_u + (w + 1)(V_c - V_u)`, where `V_c` are
the logits of the sequence and `V_u` those of its unconditional copy. Logits are linear in the final
normalised hidden states, so these are combined instead, `h = (w + 1) h_c - w h_u`: one product with
the vocabulary serves both, and every gradient of the guided logits reaches the two members of the
pair with the weights `w + 1` and `-w`.

The copies are packed after all other sequences of a pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, NewType, TypeVar

import numpy as np
import torch

from boe_vllm.base.arrays import BoolArray, FloatArray
from boe_vllm.models.functional import accurate
from boe_vllm.models.rows import RowLayout, SequenceRows

if TYPE_CHECKING:
    from boe_vllm.steering.step import DenoisingPass, Query

Tensor = torch.Tensor
Q = TypeVar("Q", bound="Query[Any]")

Place = NewType("Place", int)
"""A sequence of a layout, which is a request's own or an unconditional copy."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Guidance:
    """How a request is guided."""

    scale: float
    """w, above 0."""
    given: BoolArray
    """[L] positions that came with the request and not as masks: masked in the copy."""

    @property
    def weights(self) -> tuple[float, float]:
        """Weights of the sequence and of its unconditional copy in the guided logits."""
        return self.scale + 1.0, -self.scale

    def unconditional(self, rows: SequenceRows, mask_token_id: int) -> SequenceRows:
        """The same rows of the sequence without its prompt."""
        given = self.given[: len(rows.tokens)]
        return dataclasses.replace(rows, tokens=np.where(given, mask_token_id, rows.tokens))


def with_unconditional(
    sequences: Sequence[SequenceRows], guides: Sequence[Guidance | None], mask_token_id: int
) -> tuple[tuple[SequenceRows, ...], dict[int, Place]]:
    """The sequences, then the copies of those that are guided; sequence -> place of its copy."""
    packed, unconditional = list(sequences), {}
    for s, (rows, guide) in enumerate(zip(sequences, guides, strict=True)):
        if guide is not None:
            unconditional[s] = Place(len(packed))
            packed.append(guide.unconditional(rows, mask_token_id))
    return tuple(packed), unconditional


def guided(
    hidden_RD: Tensor,
    layout: RowLayout,
    unconditional: Mapping[int, Place],
    guides: Sequence[Guidance | None],
) -> Tensor:
    """[R, D] final hidden states of the sequences' logit rows, guided where they are; the copies'
    own rows are left out.

    Args:
        hidden_RD: of all places of the pass, copies included.
        layout: of that pass.
        unconditional: guided sequence -> place of its copy.
        guides: of the sequences.
    """
    if not unconditional:
        return hidden_RD
    starts, lens = layout.logit_starts, layout.logit_lens
    out = hidden_RD[: starts[min(unconditional.values())]].clone()
    for s, place in unconditional.items():
        guide = guides[s]
        assert guide is not None
        own, other = (slice(starts[n], starts[n] + lens[n]) for n in (s, place))
        out[own] = combined(hidden_RD[own], hidden_RD[other], guide)
    return out


def combined(hidden_ND: Tensor, unconditional_ND: Tensor, guide: Guidance) -> Tensor:
    """[N, D] `(w + 1) h_c - w h_u`, computed in at least float32."""
    own, other = guide.weights
    return (own * accurate(hidden_ND) + other * accurate(unconditional_ND)).to(hidden_ND.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PairMember(Generic[Q]):
    """One place that a query concerns: its sequence's own or, under guidance, the copy's.

    A write changes both members of a pair alike, so what they contribute adds up.
    """

    query: Q
    number: int
    """Which of the queries."""
    source: int
    """The sequence whose predictions the query is about."""
    place: Place
    """Whose rows this member has: the source's or its copy's."""
    weight: float
    """Of this member's logits in those that are read."""

    @property
    def own(self) -> bool:
        """Whether it is the sequence itself."""
        return self.place == self.source


def members_of(current: DenoisingPass, queries: Sequence[tuple[int, Q]]) -> list[PairMember[Q]]:
    """The queries' own members, in their order, and then the unconditional copies."""
    own, copies = [], []
    for n, (s, query) in enumerate(queries):
        guide = current.guide(s)
        weights = (1.0, 0.0) if guide is None else guide.weights
        place = current.place(s)
        own.append(PairMember(query=query, number=n, source=s, place=place, weight=weights[0]))
        if guide is not None:
            place = current.unconditional[s]
            copies.append(
                PairMember(query=query, number=n, source=s, place=place, weight=weights[1])
            )
    return own + copies


def places_of(members: Sequence[PairMember[Any]], queries: int) -> list[list[Place]]:
    """The places that serve each query."""
    return [[member.place for member in members if member.number == n] for n in range(queries)]


def summed(
    values: Tensor, members: Sequence[PairMember[Any]], lens: Sequence[int]
) -> list[FloatArray]:
    """Float64 on the host, per query: the sum of its members' values.

    Args:
        values: [N] packed member by member.
        members: as `members_of` has them.
        lens: of each query's values.
    """
    host = values.double().cpu().numpy()
    sums = [np.zeros(length) for length in lens]
    start = 0
    for member in members:
        end = start + lens[member.number]
        sums[member.number] += host[start:end]
        start = end
    return sums
