"""Partial passes: a few rows run again under supposed tokens, all other rows frozen as they were.

Legend: `Q` packed rows of all states, `N` states of a sequence, `m` rows of each, `D` width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch

from boe_vllm.attention.overlay import Overlay, group_overlays, overlay_attention
from boe_vllm.base.arrays import IntArray
from boe_vllm.models.functional import rms_norm
from boe_vllm.steering.guidance import combined
from boe_vllm.steering.step import DenoisingPass

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class States:
    """Hypothetical states of one sequence, all over equally many of its masked positions."""

    sequence: int
    """Which sequence of the step's pass."""
    places: IntArray
    """[N, m] indices into the sequence's masked positions: the rows that are run."""


def run_partial(
    current: DenoisingPass,
    states: Sequence[States],
    x_QD: Tensor,
    *,
    observe: Callable[[int, Tensor, Tensor], None] | None = None,
    final: bool = True,
) -> Tensor | None:
    """Final normalised hidden states of the states' rows, [Q, D].

    Args:
        current: the step's pass; its saved holds every row's keys and values.
        states: what is supposed where; rows are packed state by state.
        x_QD: the rows' embeddings under the supposition.
        observe: called with (layer, keys, values), [Q, G, P] each, for every layer.
        final: whether the final states are wanted; otherwise the last block's mixing is skipped.
    """
    assert current.saved is not None
    model, layout = current.model, current.layout.attention
    kept = np.concatenate([current.saved_rows(s.sequence, s.places.ravel()) for s in states])
    rotary = current.saved.rotary_2A1p[:, torch.from_numpy(kept).to(current.device)]
    overlays = [
        Overlay(
            kv_start=layout.kv_starts[s.sequence],
            kv_len=layout.kv_seqlens[s.sequence],
            columns_Nm=torch.from_numpy(s.places).to(current.device),
        )
        for s in states
    ]
    saved = current.saved.layers[0]
    groups = group_overlays(
        overlays,
        heads=saved.queries_AHP.shape[1],
        row_elements=saved.keys_SGP[0].numel(),
        device=current.device,
    )
    x, last = x_QD, len(model.layers) - 1
    for index, (block, saved) in enumerate(zip(model.layers, current.saved.layers, strict=True)):
        q, k, v = block.project(x, rotary)
        if observe is not None:
            observe(index, k, v)
        if index == last and not final:
            return None
        mixed = overlay_attention(
            q, k, v, saved.keys_SGP, saved.values_SGP, groups=groups, scale=block.scale
        )
        x, _ = block.feed(block.attend(x, mixed))
    return rms_norm(x, model.ln_f, model.config.rms_norm_eps)


def run_guided(current: DenoisingPass, states: Sequence[States], x_QD: Tensor) -> Tensor:
    """`run_partial`'s final states, guided by the same rows of the unconditional where sequences are."""
    lens = [given.places.size for given in states]
    pieces = x_QD.split(lens)
    members = [n for n, given in enumerate(states) if given.sequence in current.unconditional]
    unconditional = [
        dataclasses.replace(states[n], sequence=current.unconditional[states[n].sequence])
        for n in members
    ]
    x_QD = torch.cat([x_QD, *(pieces[n] for n in members)])
    hidden = run_partial(current, [*states, *unconditional], x_QD)
    assert hidden is not None
    found = list(hidden.split(lens + [lens[n] for n in members]))
    for place, n in enumerate(members, len(states)):
        guide = current.guide(states[n].sequence)
        assert guide is not None
        found[n] = combined(found[n], found[place], guide)
    return torch.cat(found[: len(states)])
