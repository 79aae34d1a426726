"""Relaxed next states: soft writes, and the rows and keys that they lead to.

Legend: `C` packed candidates, `D` width, `V` vocabulary, `G` key heads, `P` size of a head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from boe_vllm.arrays import FloatArray, IntArray
from boe_vllm.attention.revealed import revealed_attention
from boe_vllm.models.llada import KeyValueContext, LLaDAForDiffusion, Tape
from boe_vllm.prediction import LogProbabilities
from boe_vllm.rows import RowLayout
from boe_vllm.steering.step import DenoisingPass

Tensor = torch.Tensor


def soft_writes(log_probs: LogProbabilities, rows_C: IntArray, sharpen_C: FloatArray) -> Tensor:
    """Expected embeddings `E^T pi` of the rows (eq. 10), [C, D]; no gradient passes (eq. 29).

    `sharpen` below 1 takes `pi^(1/sharpen)`, renormalised, instead of `pi`.
    """
    model: LLaDAForDiffusion = log_probs.model  # type: ignore[assignment]
    writes = []
    for places, logp in log_probs.rows(rows_C):
        if (sharpen_C[places] != 1).any():
            power = torch.from_numpy(1 / sharpen_C[places]).to(logp)
            logp = (logp * power[:, None]).log_softmax(-1)
        writes.append(model.soft_embed(logp.exp_()))
    return torch.cat(writes)


@dataclasses.dataclass(frozen=True, slots=True)
class Revealed:
    """How a soft write changes a candidate's keys and values, per layer [C, G, P] each."""

    keys: list[Tensor]
    values: list[Tensor]


def reveal(
    model: LLaDAForDiffusion,
    soft_CD: Tensor,
    current: DenoisingPass,
    sequences: Sequence[int],
    candidates: Sequence[IntArray],
) -> Revealed:
    """Run each candidate's row alone with its soft write, all other rows frozen as they were.

    Args:
        model: the network.
        soft_CD: soft writes, packed in the order of `sequences`.
        current: the step's pass, with its tape.
        sequences: the sequence of each ask.
        candidates: per ask, indices into the sequence's masked positions.
    """
    assert current.tape is not None
    layout = current.layout.attention
    kept = torch.from_numpy(np.concatenate(list(map(current.kept_rows, sequences, candidates))))
    own = torch.from_numpy(np.concatenate(list(map(current.key_rows, sequences, candidates))))
    kept, own = kept.to(current.device), own.to(current.device)
    rotary = current.tape.rotary_2K1p[:, kept]
    changes = Revealed([], [])
    x = soft_CD
    last = len(model.blocks) - 1
    for index, (block, tape) in enumerate(zip(model.blocks, current.tape.layers, strict=True)):
        q, k, v = block.project(x, rotary)
        changes.keys.append(k - tape.keys_SGP[own])
        changes.values.append(v - tape.values_SGP[own])
        if index == last:  # nothing reads the candidates' final states
            break
        mixed = revealed_attention(
            q,
            k,
            v,
            tape.keys_SGP,
            tape.values_SGP,
            own_rows=own,
            candidate_lens=list(map(len, candidates)),
            kv_starts=[layout.kv_starts[s] for s in sequences],
            kv_lens=[layout.kv_seqlens[s] for s in sequences],
            scale=block.scale,
        )
        x, _ = block.feed(block.attend(x, mixed))
    return changes


class FrozenRows(KeyValueContext):
    """Keys and values of a second pass: new for the live rows, those of the first for the rest."""

    def __init__(self, first: Tape, second: RowLayout, sequences: Sequence[int]) -> None:
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
