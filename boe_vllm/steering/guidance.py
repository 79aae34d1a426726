"""Classifier-free guidance: each guided sequence has a twin in the same pass, its prompt masked.

LLaDA (ML-GSAI/LLaDA `generate.py`, `cfg_scale` w): `V = V_u + (w + 1)(V_c - V_u)`, where `V_u` are
the logits of the twin. Logits are linear in the final normalised hidden states, so these are
combined instead, `h = (w + 1) h_c - w h_u`: one multiplication with the vocabulary serves both, and
every gradient of the guided logits reaches the two sequences with the weights `w + 1` and `-w`.

Twins are packed after all other sequences of a pass.

Legend: `R` logit rows, `D` width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from boe_vllm.arrays import BoolArray
from boe_vllm.models.functional import accurate
from boe_vllm.rows import RowLayout, SequenceRows

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Guide:
    """How a request is guided."""

    scale: float
    """w, above 0."""
    given: BoolArray
    """[L] positions that came with the request and not as masks: masked in the twin."""

    @property
    def weights(self) -> tuple[float, float]:
        """Weights of the sequence and of its twin in the guided logits."""
        return self.scale + 1.0, -self.scale

    def twin(self, rows: SequenceRows, mask_token_id: int) -> SequenceRows:
        """The same rows of the sequence without its prompt."""
        return dataclasses.replace(rows, tokens=np.where(self.given, mask_token_id, rows.tokens))


def with_twins(
    sequences: Sequence[SequenceRows], guides: Sequence[Guide | None], mask_token_id: int
) -> tuple[tuple[SequenceRows, ...], dict[int, int]]:
    """The sequences and then the twins of those that are guided; sequence -> place of its twin."""
    packed, twins = list(sequences), {}
    for s, (rows, guide) in enumerate(zip(sequences, guides, strict=True)):
        if guide is not None:
            twins[s] = len(packed)
            packed.append(guide.twin(rows, mask_token_id))
    return tuple(packed), twins


def guided(
    hidden_RD: Tensor,
    layout: RowLayout,
    twins: Mapping[int, int],
    guides: Sequence[Guide | None],
) -> Tensor:
    """Final hidden states of the sequences' logit rows, guided where they are; the twins' are gone.

    Args:
        hidden_RD: of all sequences of the pass, twins included.
        layout: of that pass.
        twins: sequence -> place of its twin.
        guides: of the sequences.
    """
    if not twins:
        return hidden_RD
    starts, lens = layout.logit_starts, layout.logit_lens
    out = hidden_RD[: starts[min(twins.values())]].clone()
    for s, twin in twins.items():
        guide = guides[s]
        assert guide is not None
        own, other = (slice(starts[n], starts[n] + lens[n]) for n in (s, twin))
        out[own] = combined(hidden_RD[own], hidden_RD[other], guide)
    return out


def combined(hidden_ND: Tensor, twin_ND: Tensor, guide: Guide) -> Tensor:
    """`(w + 1) h_c - w h_u`, in at least float32."""
    own, other = guide.weights
    return (own * accurate(hidden_ND) + other * accurate(twin_ND)).to(hidden_ND.dtype)
