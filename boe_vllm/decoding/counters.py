"""What engine steps do, counted for the server's metrics.

Whole numbers by key, since they travel from the worker to the server among vLLM's own statistics:
seconds as microseconds, entropies as hundredths of a nat.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from boe_vllm.decoding.canvas import Canvas
from boe_vllm.policies.base import View

PREFIX = "boe/"
MICRO, CENTI = 1_000_000, 100
COSTS = ("forwards", "backwards", "rows_forward", "rows_backward")


class Counters:
    """Counts since the last reading."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def step(self, canvas: Canvas, view: View, masked_before: int) -> None:
        """One request has made a denoising step.

        Args:
            canvas: after the step.
            view: what its policy saw.
            masked_before: masked positions before the step.
        """
        committed = masked_before - int(canvas.masked.sum())
        self.counts[f"denoising_steps/{canvas.policy.name}"] += 1
        if committed > 0:  # else the step took more back than it wrote
            self.counts["committed_tokens"] += committed
        self.counts[f"tokens_per_step/{max(committed, 0)}"] += 1
        left = view.entropy[canvas.masked[view.positions]]
        if len(left):
            self.counts[f"remaining_entropy/{round(float(left.mean()) * CENTI)}"] += 1

    def cost(self, before: Mapping[str, int], after: Mapping[str, int]) -> None:
        """Passes and rows of all requests, as sums before and after a step."""
        for name in COSTS:
            self.counts[name] += after[name] - before[name]

    def time(self, seconds: Mapping[str, float]) -> None:
        """Seconds by part."""
        for name, value in seconds.items():
            self.counts[f"seconds/{name}"] += round(value * MICRO)

    def read(self) -> dict[str, int]:
        """The counts so far, which start again from 0."""
        counts, self.counts = self.counts, Counter()
        return {PREFIX + key: value for key, value in counts.items()}
