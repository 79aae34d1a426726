"""Suppositions: some masked positions hold tokens, and a few others are predicted again.

The written positions' rows, and those at which the predictions that are wanted are read, are run
again; all other rows keep the keys and values of the step's own pass. Many suppositions about many
sequences share one partial pass (`hypothetical.run_partial`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from boe_vllm.base.arrays import IntArray
from boe_vllm.base.transfer import Transfer
from boe_vllm.steering.guidance import combined
from boe_vllm.steering.hypothetical import States, announce, run_partial
from boe_vllm.steering.step import DenoisingPass

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Supposition:
    """States of one sequence, all over the same rows, and what is read of them."""

    sequence: int
    """Of the step's pass."""
    rows: IntArray
    """[m] by their number: some masked positions' own, and those at which others are read."""
    tokens: IntArray
    """[N, m] what the rows are supposed to hold, state by state."""
    read: IntArray
    """[r] which of the rows are read, in each state."""

    @property
    def size(self) -> int:
        """Rows that are run at each place of the sequence."""
        return self.tokens.size


def suppose(
    current: DenoisingPass,
    sequence: int,
    *,
    own: IntArray,
    written: IntArray,
    tokens: IntArray,
    read: IntArray,
) -> Supposition:
    """States in which some masked positions hold tokens, and all others what they hold now.

    Args:
        current: the step's pass.
        sequence: of it.
        own: [k] masked positions whose own rows are run, by index.
        written: [N, w] which of them are written in each state, as places in `own`.
        tokens: [N, w] what is written there.
        read: [r] masked positions whose predictions are wanted in every state, by index.
    """
    place = current.place(sequence)
    read_rows = current.read_rows(place, read)
    others = np.setdiff1d(read_rows, own)
    rows = np.concatenate([own, others])
    positions = current.layout.row_positions[place][rows]
    held = np.tile(current.sequences[sequence].tokens[positions], (len(written), 1))
    held[np.arange(len(written))[:, None], written] = tokens
    order = np.argsort(rows)
    return Supposition(
        sequence=sequence,
        rows=rows,
        tokens=held,
        read=order[np.searchsorted(rows, read_rows, sorter=order)],
    )


def run_suppositions(
    current: DenoisingPass, supposed: Sequence[Supposition], transfer: Transfer
) -> Tensor:
    """[R, D] final states of what is read of some suppositions, state by state, guided where their
    sequences are.

    Args:
        current: the step's pass.
        supposed: of different sequences, or of the same.
        transfer: what takes all this to the device.
    """
    sequences = [one.sequence for one in supposed]
    pairs = [n for n, s in enumerate(sequences) if s in current.unconditional]
    places = [current.place(s) for s in sequences]
    places += [current.unconditional[sequences[n]] for n in pairs]
    everyone = [*supposed, *(supposed[n] for n in pairs)]
    states = [
        States(place=place, rows=np.tile(one.rows, (len(one.tokens), 1)))
        for place, one in zip(places, everyone, strict=True)
    ]
    held = [one.tokens for one in supposed]
    held += [_without_prompt(current, supposed[n]) for n in pairs]
    starts = np.cumsum([0, *(one.size for one in everyone)])
    read = [start + _reads(one) for start, one in zip(starts, everyone, strict=False)]
    tokens = transfer.add(np.concatenate([own.ravel() for own in held]))
    wanted = transfer.add(np.concatenate(read))
    packed = announce(current, states, transfer)
    hidden = run_partial(current, packed, current.model.embed(tokens.tensor))
    assert hidden is not None
    hidden = hidden[wanted.tensor]
    if not pairs:
        return hidden
    found = list(hidden.split([len(own) for own in read]))
    for copy, n in enumerate(pairs, len(supposed)):
        guide = current.guide(sequences[n])
        assert guide is not None
        found[n] = combined(found[n], found[copy], guide)
    return torch.cat(found[: len(supposed)])


def _reads(one: Supposition) -> IntArray:
    """[N x r] places of what is read among the rows of all states."""
    states, width = one.tokens.shape
    return (np.arange(states)[:, None] * width + one.read).ravel()


def _without_prompt(current: DenoisingPass, one: Supposition) -> IntArray:
    """[N, m] what the rows hold in the sequence's unconditional copy."""
    guide = current.guide(one.sequence)
    assert guide is not None
    positions = current.layout.row_positions[current.place(one.sequence)][one.rows]
    return np.where(guide.given[positions], current.log_probs.mask_token_id, one.tokens)
