"""A canvas as its policy sees it in one denoising step."""

from __future__ import annotations

import numpy as np

from boe_vllm.base.arrays import IntArray
from boe_vllm.decoding.canvas import Canvas
from boe_vllm.policies.base import Revision, View
from boe_vllm.sampling.statistics import RowStatistics


def view_of(canvas: Canvas, positions: IntArray, rows: slice, statistics: RowStatistics) -> View:
    """What the policy sees.

    Args:
        canvas: before the step.
        positions: [M] the masked ones.
        rows: of the statistics that are this request's: those of `positions`, then, if the
            policy needs a revision, those of the written positions.
        statistics: of the step's forward, or carried over.
    """
    written, revision = canvas.written(), None
    if canvas.policy.needs().revision:
        again = slice(rows.start + len(positions), rows.start + len(positions) + len(written))
        revision = Revision(
            proposal=statistics.proposal[again],
            confidence=statistics.confidence[again],
            entropy=statistics.entropy[again],
        )
    rows = slice(rows.start, rows.start + len(positions))
    proposal = statistics.proposal[rows]
    confidence = statistics.confidence[rows]
    late = (
        canvas.late_tokens if canvas.config.frame.confidence_eos_eot_inf else canvas.late_tokens[:0]
    )
    confidence = np.where(np.isin(proposal, late), -np.inf, confidence)
    return View(
        positions=positions,
        proposal=proposal,
        confidence=confidence,
        margin=statistics.margin[rows],
        entropy=statistics.entropy[rows],
        quota=canvas.quota(),
        masked_at_start=canvas.masked_at_start,
        masked_now=int(canvas.masked.sum()),
        step=canvas.account.denoising_steps,
        block_step=canvas.block_step,
        block_steps=canvas.block_steps,
        block_start=canvas.prompt_len + canvas.block * canvas.plan.block_length,
        vocab_size=canvas.vocab_size,
        seed=canvas.params.seed,
        temperature=canvas.params.temperature,
        written=written,
        revision=revision,
        late_tokens=late,
        memory=canvas.memory,
    )
