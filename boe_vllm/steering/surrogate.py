"""Relaxed next states: soft writes, and the rows and keys that they lead to.

Legend: `C` packed candidates, `D` width, `V` vocabulary, `G` key heads, `P` size of a head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from boe_vllm.base.arrays import FloatArray, IntArray
from boe_vllm.models.decoder import Decoder
from boe_vllm.models.rows import RowLayout
from boe_vllm.models.saved import KeyValueContext, SavedPass
from boe_vllm.sampling.statistics import LogProbabilities
from boe_vllm.steering.partial import States, run_partial
from boe_vllm.steering.step import DenoisingPass

Tensor = torch.Tensor


def soft_writes(log_probs: LogProbabilities, rows_C: IntArray, sharpen_C: FloatArray) -> Tensor:
    """Expected embeddings `E^T pi` of the rows (eq. 10), [C, D]; no gradient passes (eq. 29).

    `sharpen` below 1 takes `pi^(1/sharpen)`, renormalised, instead of `pi`.
    """
    model: Decoder = log_probs.model  # type: ignore[assignment]
    writes = []
    for places, logp in log_probs.rows(rows_C):
        if (sharpen_C[places] != 1).any():
            power = torch.from_numpy(1 / sharpen_C[places]).to(logp)
            logp = (logp * power[:, None]).log_softmax(-1)
        writes.append(model.soft_embed(logp.exp()))
    return torch.cat(writes)


@dataclasses.dataclass(frozen=True, slots=True)
class Revealed:
    """How a soft write changes a candidate's keys and values, per layer [C, G, P] each."""

    keys: list[Tensor]
    values: list[Tensor]


def reveal(
    soft_CD: Tensor,
    current: DenoisingPass,
    sequences: Sequence[int],
    candidates: Sequence[IntArray],
) -> Revealed:
    """Run each candidate's row alone with its soft write, all other rows frozen as they were.

    Args:
        soft_CD: soft writes, packed in the order of `sequences`.
        current: the step's pass, with its saved.
        sequences: the sequence of each query.
        candidates: per query, indices into the sequence's masked positions.
    """
    assert current.saved is not None
    layers = current.saved.layers
    rows = np.concatenate(list(map(current.key_rows, sequences, candidates)))
    own = torch.from_numpy(rows).to(current.device)
    changes = Revealed([], [])

    def note(layer: int, keys_CGP: Tensor, values_CGP: Tensor) -> None:
        changes.keys.append(keys_CGP - layers[layer].keys_SGP[own])
        changes.values.append(values_CGP - layers[layer].values_SGP[own])

    states = [
        States(sequence=s, places=index[:, None])
        for s, index in zip(sequences, candidates, strict=True)
    ]
    run_partial(current, states, soft_CD, observe=note, final=False)
    return changes


class FrozenRows(KeyValueContext):
    """Keys and values of a second pass: new for the live rows, those of the first for the rest."""

    def __init__(self, first: SavedPass, second: RowLayout, sequences: Sequence[int]) -> None:
        self.first = first
        old = first.layout.attention
        pieces = []
        total = sum(second.live_lens)
        for s, start, live in zip(sequences, second.live_starts, second.live_lens, strict=True):
            pieces.append(np.arange(start, start + live))
            begin, end = old.kv_starts[s] + live, old.kv_starts[s] + old.kv_seqlens[s]
            pieces.append(total + np.arange(begin, end))
        self.index = torch.from_numpy(np.concatenate(pieces)).to(second.device)

    def merge(self, layer: int, keys_TGP: Tensor, values_TGP: Tensor) -> tuple[Tensor, Tensor]:
        """[live | frozen] of every sequence."""
        old = self.first.layers[layer]
        return (
            torch.cat([keys_TGP, old.keys_SGP])[self.index],
            torch.cat([values_TGP, old.values_SGP])[self.index],
        )
