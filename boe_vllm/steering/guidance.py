"""Classifier-free guidance: each guided sequence has a unconditional in the same pass, its prompt masked.

LLaDA (ML-GSAI/LLaDA `generate.py`, `cfg_scale` w): `V = V_u + (w + 1)(V_c - V_u)`, where `V_u` are
the logits of the unconditional. Logits are linear in the final normalised hidden states, so these are
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

from boe_vllm.base.arrays import BoolArray
from boe_vllm.models.functional import accurate
from boe_vllm.models.rows import RowLayout, SequenceRows

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Guidance:
    """How a request is guided."""

    scale: float
    """w, above 0."""
    given: BoolArray
    """[L] positions that came with the request and not as masks: masked in the unconditional."""

    @property
    def weights(self) -> tuple[float, float]:
        """Weights of the sequence and of its unconditional in the guided logits."""
        return self.scale + 1.0, -self.scale

    def unconditional(self, rows: SequenceRows, mask_token_id: int) -> SequenceRows:
        """The same rows of the sequence without its prompt."""
        return dataclasses.replace(rows, tokens=np.where(self.given, mask_token_id, rows.tokens))


def with_unconditional(
    sequences: Sequence[SequenceRows], guides: Sequence[Guidance | None], mask_token_id: int
) -> tuple[tuple[SequenceRows, ...], dict[int, int]]:
    """The sequences and then the unconditional of those that are guided; sequence -> place of its unconditional."""
    packed, unconditional = list(sequences), {}
    for s, (rows, guide) in enumerate(zip(sequences, guides, strict=True)):
        if guide is not None:
            unconditional[s] = len(packed)
            packed.append(guide.unconditional(rows, mask_token_id))
    return tuple(packed), unconditional


def guided(
    hidden_RD: Tensor,
    layout: RowLayout,
    unconditional: Mapping[int, int],
    guides: Sequence[Guidance | None],
) -> Tensor:
    """Final hidden states of the sequences' logit rows, guided where they are; without the
    unconditional ones.

    Args:
        hidden_RD: of all sequences of the pass, unconditional included.
        layout: of that pass.
        unconditional: guided sequence -> place of its unconditional one.
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
    """`(w + 1) h_c - w h_u`, in at least float32."""
    own, other = guide.weights
    return (own * accurate(hidden_ND) + other * accurate(unconditional_ND)).to(hidden_ND.dtype)
