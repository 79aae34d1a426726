"""Rows of hypothetical states: what a write would be, and a few rows run again as if it were made.

Soft writes are expected embeddings. A partial pass runs some masked rows of a sequence again under
supposed tokens, while all its other rows keep the keys and values that the step's own pass gave
them; many suppositions about many sequences share one pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch

from boe_vllm.attention.overlay import Overlay, OverlayGroup, group_overlays, overlay_attention
from boe_vllm.base.arrays import FloatArray, IntArray
from boe_vllm.base.transfer import Arrival, Transfer, to_device
from boe_vllm.models.contract import DenoisingNetwork
from boe_vllm.models.functional import chosen_rows
from boe_vllm.models.rows import RowLayout
from boe_vllm.models.saved import KeyValueContext, SavedPass
from boe_vllm.sampling.log_probs import LogProbabilities
from boe_vllm.steering.guidance import Place
from boe_vllm.steering.replaced import ReplacedKeys, key_sets, replace_keys, replaced_attention
from boe_vllm.steering.step import DenoisingPass

Tensor = torch.Tensor


def soft_writes(
    log_probs: LogProbabilities,
    rows_C: IntArray,
    sharpen_C: FloatArray,
    transfer: Transfer | None = None,
) -> Tensor:
    """[C, D] expected embeddings `E^T pi` of the rows (eq. 10); no gradient passes (eq. 29).

    Args:
        log_probs: of the pass.
        rows_C: [C] logit rows of the candidates.
        sharpen_C: [C] below 1, `pi^(1/sharpen)`, renormalised, takes the place of `pi`.
        transfer: what takes these to the device.
    """
    model: DenoisingNetwork = log_probs.model  # type: ignore[assignment]
    transfer = transfer or Transfer(log_probs.device)
    dtype = torch.promote_types(log_probs.hidden_RD.dtype, torch.float32)
    powers = transfer.add(1 / sharpen_C, dtype)
    writes = []
    for places, logp in log_probs.rows(rows_C, transfer):
        if (sharpen_C[places] != 1).any():
            power = powers.tensor[places, None]
            # Rows that are not sharpened keep their bits: they may be another request's.
            logp = torch.where(power == 1, logp, (logp * power).log_softmax(-1))
        writes.append(model.soft_embed(logp.exp()))
    return torch.cat(writes)


# ---- partial passes ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class States:
    """Hypothetical states of one place, all over equally many of its rows."""

    place: Place
    """Of the step's pass."""
    rows: IntArray
    """[N, m] per state, the rows that are run, by their number at the place: a masked position's
    own is its index."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class PartialRows:
    """Where the rows of some states lie in the step's pass, on their way to the device."""

    saved: Arrival
    """[Q] packed saved rows, state by state."""
    groups: list[OverlayGroup]
    """The states by the shape of their attention, on the CPU where only their own rows are new."""
    calls: list[ReplacedKeys]
    """The states by the call that attends them; empty where there are groups."""


def announce(current: DenoisingPass, states: Sequence[States], transfer: Transfer) -> PartialRows:
    """Find the rows of some states, and announce their indices to the device.

    Args:
        current: the step's pass, which has saved every row's keys and values.
        states: what will be run.
        transfer: of the partial pass.
    """
    assert current.saved is not None
    layout, saved = current.layout.attention, current.saved.layers[0]
    rows = np.concatenate([current.saved_rows(s.place, s.rows.ravel()) for s in states])
    overlays = [
        Overlay(
            kv_start=layout.kv_starts[s.place],
            kv_len=layout.kv_seqlens[s.place],
            columns_Nm=s.rows,
        )
        for s in states
    ]
    elements, groups, calls = saved.keys_SGP[0].numel(), [], []
    if current.device.type == "cpu":
        heads = saved.queries_AHP.shape[1]
        groups = group_overlays(overlays, heads=heads, row_elements=elements, transfer=transfer)
    else:
        sets = key_sets(overlays)
        calls = replace_keys(
            sets, key_rows=layout.num_keys, row_elements=elements, transfer=transfer
        )
    return PartialRows(saved=transfer.add(rows), groups=groups, calls=calls)


def run_partial(
    current: DenoisingPass,
    rows: PartialRows,
    x_QD: Tensor,
    *,
    observe: Callable[[int, Tensor, Tensor], None] | None = None,
    final: bool = True,
) -> Tensor | None:
    """[Q, D] final normalised hidden states of the states' rows.

    Args:
        current: the step's pass, which has saved every row's keys and values.
        rows: what is run, state by state, as `announce` found it.
        x_QD: the rows' embeddings under the supposition.
        observe: called with (layer, keys, values), [Q, G, P] each, for every layer.
        final: whether the final states are wanted; otherwise the last layer's mixing is skipped
            and None comes back.
    """
    assert current.saved is not None
    model = current.model
    rotary = current.saved.rotary_2A1p[:, rows.saved.tensor]
    x, last = x_QD, len(model.layers) - 1
    normed: Tensor | None = model.norm_first(x_QD)
    for index, (block, saved) in enumerate(zip(model.layers, current.saved.layers, strict=True)):
        assert normed is not None
        q, k, v, _ = block.project(normed, rotary)
        if observe is not None:
            observe(index, k, v)
        if index == last and not final:
            return None
        given = (q, k, v, saved.keys_SGP, saved.values_SGP)
        if rows.calls:
            mixed = replaced_attention(*given, calls=rows.calls, scale=block.scale)
        else:
            mixed = overlay_attention(*given, groups=rows.groups, scale=block.scale)
        after, normed = block.attend(x, mixed)
        x, normed, _ = block.feed(after, normed, model.norm_after(index))
    return model.norm_last(x)


# ---- what a write changes ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Revealed:
    """How a soft write changes a candidate's keys and values, per layer [C, G, P] each."""

    keys: list[Tensor]
    values: list[Tensor]


def reveal(
    soft_CD: Tensor,
    current: DenoisingPass,
    places: Sequence[Place],
    candidates: Sequence[IntArray],
) -> Revealed:
    """Run each candidate's row alone with its soft write, all other rows frozen as they were.

    Args:
        soft_CD: soft writes, packed in the order of `places`.
        current: the step's pass, with what it saved.
        places: of the pass.
        candidates: for each, indices into the sequence's masked positions.
    """
    assert current.saved is not None
    layers = current.saved.layers
    states = [
        States(place=place, rows=index[:, None])
        for place, index in zip(places, candidates, strict=True)
    ]
    transfer = Transfer(current.device)
    rows = announce(current, states, transfer)
    own = transfer.add(np.concatenate(list(map(current.key_rows, places, candidates))))
    changes = Revealed([], [])

    def note(layer: int, keys_CGP: Tensor, values_CGP: Tensor) -> None:
        changes.keys.append(keys_CGP - layers[layer].keys_SGP[own.tensor])
        changes.values.append(values_CGP - layers[layer].values_SGP[own.tensor])

    run_partial(current, rows, soft_CD, observe=note, final=False)
    return changes


class FrozenRows(KeyValueContext):
    """Keys and values of a second pass: new for its live rows, those of the first for the rest."""

    def __init__(self, first: SavedPass, second: RowLayout, places: Sequence[Place]) -> None:
        """Find the rows.

        Args:
            first: what the first pass saved.
            second: layout of the second.
            places: for each sequence of the second pass, its place in the first.
        """
        self.first = first
        old = first.layout.attention
        pieces = []
        total = sum(second.live_lens)
        for place, start, live in zip(places, second.live_starts, second.live_lens, strict=True):
            pieces.append(np.arange(start, start + live))
            begin, end = old.kv_starts[place] + live, old.kv_starts[place] + old.kv_seqlens[place]
            pieces.append(total + np.arange(begin, end))
        (self.index,) = to_device([np.concatenate(pieces)], second.device)

    def merge(self, layer: int, keys_TGP: Tensor, values_TGP: Tensor) -> tuple[Tensor, Tensor]:
        """[S, G, P] keys and values, [live | frozen] of every sequence."""
        old = self.first.layers[layer]
        return chosen_rows((keys_TGP, values_TGP), (old.keys_SGP, old.values_SGP), self.index)
