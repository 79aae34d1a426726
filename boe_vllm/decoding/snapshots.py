"""The canvas of a request as somebody watches it fill: a snapshot now and then, as plain values.

Legend: `N` canvas positions, `M` masked positions that might have been written.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from boe_vllm.base.arrays import FloatArray
from boe_vllm.decoding.canvas import Canvas
from boe_vllm.policies.base import Commit, View


class Snapshots:
    """Takes snapshots of canvases, of each at most so many in a second, and always the last one."""

    def __init__(self, rate: float) -> None:
        """At most `rate` snapshots of a canvas in a second."""
        self.interval = 1.0 / rate
        self._due: dict[str, float] = {}

    def take(
        self, request_id: str, canvas: Canvas, view: View | None, commit: Commit | None
    ) -> dict[str, Any] | None:
        """The canvas after a step; None if that comes too soon after the last one.

        Args:
            request_id: of the request.
            canvas: its.
            view: what the step's policy saw; None if nothing was predicted.
            commit: what it decided; None if it could not.
        """
        now = time.monotonic()
        if not canvas.done and now < self._due.get(request_id, now):
            return None
        self._due[request_id] = now + self.interval
        return _snapshot(canvas, view, commit)

    def forget(self, request_id: str) -> None:
        """The request has ended."""
        self._due.pop(request_id, None)


def _snapshot(canvas: Canvas, view: View | None, commit: Commit | None) -> dict[str, Any]:
    start = canvas.prompt_len
    taken: dict[str, Any] = {
        "step": canvas.account.denoising_steps,
        "forwards": canvas.account.forwards,
        "backwards": canvas.account.backwards,
        # [N] tokens, and whether each is still a mask.
        "tokens": canvas.tokens[start:].tolist(),
        "masked": canvas.masked[start:].tolist(),
    }
    if view is not None:
        # [M] of the prediction that the step was decided by, entropies in nats.
        shown = view.positions >= start
        taken["positions"] = (view.positions[shown] - start).tolist()
        taken["proposals"] = view.proposal[shown].tolist()
        taken["entropy"] = _rounded(view.entropy[shown])
        taken["confidence"] = _rounded(np.maximum(view.confidence[shown], 0.0))
        scores = None if commit is None else commit.scores
        if isinstance(scores, np.ndarray) and scores.shape == shown.shape:
            # [M] what the policy chose by; None where it had no score.
            taken["scores"] = [
                round(float(score), 4) if np.isfinite(score) else None for score in scores[shown]
            ]
    return taken


def _rounded(values: FloatArray) -> list[float]:
    return [round(float(value), 4) for value in values]
