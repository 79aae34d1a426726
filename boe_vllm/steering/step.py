"""The step's own pass, as steering finds it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from boe_vllm.arrays import IntArray
from boe_vllm.models.llada import LLaDAForDiffusion, Tape
from boe_vllm.prediction import LogProbabilities
from boe_vllm.rows import RowLayout, SequenceRows


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DenoisingPass:
    """A forward over the live rows of all sequences, with what it left behind."""

    model: LLaDAForDiffusion
    sequences: tuple[SequenceRows, ...]
    layout: RowLayout
    log_probs: LogProbabilities
    tape: Tape | None

    @property
    def device(self) -> torch.device:
        """Where the pass ran."""
        return self.layout.device

    def logit_rows(self, sequence: int, index: IntArray) -> IntArray:
        """Packed logit rows of a sequence's masked positions given by index."""
        return self.layout.logit_starts[sequence] + index

    def kept_rows(self, sequence: int, index: IntArray) -> IntArray:
        """Packed kept rows of the same: a sequence's kept rows begin with its logit rows."""
        return self.layout.kept_starts[sequence] + index

    def key_rows(self, sequence: int, index: IntArray) -> IntArray:
        """Rows of keys and values of the same: a sequence's keys begin with its logit rows."""
        return self.layout.attention.kv_starts[sequence] + index


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """The answer to one ask, and what it cost its request beyond the step's own forward."""

    value: Any
    forwards: int = 0
    backwards: int = 0
    rows_forward: int = 0
    rows_backward: int = 0
