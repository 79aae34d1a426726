"""The step's own pass, as steering finds it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from boe_vllm.base.arrays import IntArray
from boe_vllm.base.clock import Clock
from boe_vllm.models.cache import CachePlan, KeyValuePool
from boe_vllm.models.decoder import Decoder
from boe_vllm.models.rows import RowLayout, SequenceRows
from boe_vllm.models.saved import SavedPass
from boe_vllm.sampling.constraints import CanvasConstraints
from boe_vllm.sampling.statistics import LogProbabilities
from boe_vllm.steering.guidance import Guidance

if TYPE_CHECKING:
    from boe_vllm.models.cache import CachePlan

DEFAULT_ROW_BUDGET = 8192
"""Most rows of one packed look-ahead pass, unless one state alone has more."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NextStep:
    """How a sequence's next step would be computed and would propose tokens."""

    temperature: float
    seed: int
    step: int
    constraints: CanvasConstraints
    top_logprobs: int = 0
    cache: CachePlan | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DenoisingPass:
    """A forward over the live rows of all sequences, with what it left behind.

    Sequences whose prediction was carried over from the last step's look-ahead come last and have
    no rows here.
    """

    model: Decoder
    sequences: tuple[SequenceRows, ...]
    layout: RowLayout
    log_probs: LogProbabilities
    saved: SavedPass | None
    next_steps: tuple[NextStep, ...] = ()
    """For each sequence."""
    device_memory: tuple[dict[str, Any], ...] = ()
    """For each sequence, what solvers keep on the device from one step to the next."""
    guides: tuple[Guidance | None, ...] = ()
    """For each sequence, its classifier-free guidance; empty if none is guided."""
    unconditional: Mapping[int, int] = dataclasses.field(default_factory=dict)
    """Guided sequence -> place of its unconditional unconditional in the layout, after the sequences. The
    log-probabilities are the guided ones and have no rows of unconditional."""
    pool: KeyValuePool | None = None
    """Where a further pass finds the stored keys and values of its sequences."""
    row_budget: int = DEFAULT_ROW_BUDGET
    """Most rows of one look-ahead pass."""
    clock: Clock = dataclasses.field(default_factory=Clock)
    """Counts the time of the step's parts."""

    @property
    def device(self) -> torch.device:
        """Where the pass ran."""
        return self.layout.device

    def guide(self, sequence: int) -> Guidance | None:
        """How a sequence is guided."""
        return self.guides[sequence] if self.guides else None

    def passes(self, sequence: int) -> int:
        """Sequences that stand for this one in every pass: two if it is guided."""
        return 1 if self.guide(sequence) is None else 2

    def logit_rows(self, sequence: int, index: IntArray) -> IntArray:
        """Packed logit rows of a sequence's masked positions given by index."""
        return self.layout.logit_starts[sequence] + index

    def saved_rows(self, sequence: int, index: IntArray) -> IntArray:
        """Packed kept rows of the same: a sequence's kept rows begin with its logit rows."""
        return self.layout.saved_starts[sequence] + index

    def key_rows(self, sequence: int, index: IntArray) -> IntArray:
        """Rows of keys and values of the same: a sequence's keys begin with its logit rows."""
        return self.layout.attention.kv_starts[sequence] + index


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class QueryResult:
    """The answer to one query, and what it cost its request beyond the step's own forward."""

    value: Any
    forwards: int = 0
    backwards: int = 0
    rows_forward: int = 0
    rows_backward: int = 0
