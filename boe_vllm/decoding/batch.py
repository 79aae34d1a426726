"""One denoising step of several requests as data: what is packed, and how each row is read.

pack: canvases -> `StepBatch`. The loop runs the network over it (forward) and turns the logit rows
into statistics (read).

Legend: `B` sequences of a pass, `R` packed logit rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from boe_vllm.base.arrays import IntArray
from boe_vllm.decoding.canvas import Canvas
from boe_vllm.models.cache import CachePlan
from boe_vllm.models.rows import RowLayout, SequenceRows, pack, readable
from boe_vllm.sampling import randomness
from boe_vllm.sampling.constraints import ConstraintTable
from boe_vllm.sampling.statistics import RowStatistics, RowWrites
from boe_vllm.steering.guidance import Guidance, Place, with_unconditional


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepBatch:
    """The rows of one step's own forward and what is to be read of them."""

    canvases: tuple[Canvas, ...]
    """Those whose prediction was carried over come last: they have no rows in this pass."""
    computed: int
    """How many of them have rows."""
    sequences: tuple[SequenceRows, ...]
    """One for each canvas."""
    guides: tuple[Guidance | None, ...]
    """One for each canvas."""
    unconditional: Mapping[int, Place]
    """Guided canvas -> place of its unconditional copy in the layout, after the computed ones."""
    layout: RowLayout
    """Of the computed sequences and the unconditional copies."""
    cache_plans: tuple[CachePlan | None, ...]
    """[B] one for each sequence of the layout."""
    table: ConstraintTable | None
    """None if no request is constrained."""
    constraint_R: IntArray
    """[R] number of each logit row's constraint in the table."""
    writes: RowWrites
    """How each logit row's token is proposed."""
    reads_again: bool
    """Queries will read the step's log-probabilities again, so that they are worth keeping."""

    def rows_of(self, n: int, statistics: RowStatistics) -> tuple[slice, RowStatistics]:
        """Which rows of which statistics are those of a canvas: of this pass, or carried over."""
        carried = self.canvases[n].carried
        if carried is not None:
            return slice(0, len(carried.proposal)), carried
        start = self.layout.logit_starts[n]
        return slice(start, start + self.layout.logit_lens[n]), statistics


def pack_step(canvases: Sequence[Canvas], *, mask_token_id: int, device: torch.device) -> StepBatch:
    """Pack the coming step of some canvases; those with a carried prediction must come last."""
    computed = [canvas for canvas in canvases if canvas.carried is None]
    assert all(canvas.carried is not None for canvas in canvases[len(computed) :])
    plans = [canvas.cache_plan() for canvas in canvases]
    sequences = tuple(map(_rows_of, canvases, plans))
    guides = tuple(canvas.guide for canvas in canvases)
    packed: Sequence[SequenceRows] = sequences[: len(computed)]
    unconditional: Mapping[int, Place] = {}
    if any(guides):
        packed, unconditional = with_unconditional(packed, guides[: len(computed)], mask_token_id)
    layout = pack(packed, device)
    constrained = any(canvas.constraints is not None for canvas in canvases)
    table = ConstraintTable() if constrained else None
    wanted = [rows.wanted_positions for rows in sequences[: len(computed)]]
    needs = [canvas.policy.needs() for canvas in computed]
    return StepBatch(
        canvases=tuple(canvases),
        computed=len(computed),
        sequences=sequences,
        guides=guides,
        unconditional=unconditional,
        layout=layout,
        cache_plans=(*plans[: len(computed)], *[None] * len(unconditional)),
        table=table,
        constraint_R=np.concatenate(
            [
                np.empty(0, np.int64),
                *(
                    _constraints(canvas, positions, table)
                    for canvas, positions in zip(computed, wanted, strict=True)
                ),
            ]
        ),
        writes=_writes(computed, wanted),
        reads_again=any(layout.saved_lens) or any(need.distributions for need in needs),
    )


def _constraints(canvas: Canvas, positions: IntArray, table: ConstraintTable | None) -> IntArray:
    """Numbers of what may be written at some positions."""
    if table is None or canvas.constraints is None:
        return np.zeros(len(positions), np.int64)
    found = canvas.constraints.at(canvas.tokens, canvas.masked, positions)
    return table.numbers(found, len(positions))


def _rows_of(canvas: Canvas, plan: CachePlan | None) -> SequenceRows:
    """The rows that one request's step computes."""
    needs = canvas.policy.needs()
    blocks, masked = canvas.blocks, canvas.masked
    written = blocks.past(masked) if needs.past else blocks.written(masked)
    upcoming = blocks.upcoming(masked[: canvas.visible])
    extra = [written[: len(written) * needs.revision], upcoming[: len(upcoming) * needs.next_block]]
    if plan and plan.live_positions is not None:
        extra = [readable(positions, plan.live_positions, canvas.shift) for positions in extra]
    return SequenceRows(
        tokens=canvas.tokens[: canvas.visible],
        logit_positions=canvas.writable(),
        extra_positions=np.concatenate(extra),
        keep=needs.rows,
        live_positions=plan.live_positions if plan else None,
        frozen_rows=len(plan.slots) if plan and not plan.refresh else 0,
        shift=canvas.shift,
    )


def _writes(canvases: Sequence[Canvas], wanted: Sequence[IntArray]) -> RowWrites:
    """How the tokens of the canvases' logit rows are proposed."""
    temperature, uniform = [np.empty(0)], [np.empty(0)]
    for canvas, positions in zip(canvases, wanted, strict=True):
        temperature.append(np.full(len(positions), canvas.params.temperature))
        numbers = np.full(len(positions), np.nan)
        if canvas.params.temperature > 0:
            numbers = randomness.uniforms(
                canvas.params.seed,
                step=canvas.draw(),
                positions=positions,
                stream=randomness.WRITE,
            )
        uniform.append(numbers)
    return RowWrites(
        temperature=np.concatenate(temperature),
        uniform=np.concatenate(uniform),
        top_logprobs=max((canvas.params.logprobs_per_row for canvas in canvases), default=0),
    )
