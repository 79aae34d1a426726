"""Snapshots of canvases as events of a stream, between the events of its text.

An event is a chunk without choices, which clients that do not know it pass over:
`{"object": "boe.canvas", "choices": [], "canvas": {"index": 0, "step": 3, "tokens": [...], ...}}`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from vllm.outputs import RequestOutput

from boe_vllm.vllm_plugin.scheduler import CANVAS_KEY

OBJECT = "boe.canvas"


class SnapshotEvents:
    """The snapshots of one stream on their way to its client."""

    def __init__(self, tokenizer: Any) -> None:
        """With the texts of tokens by a tokenizer."""
        self.tokenizer = tokenizer
        self.waiting: asyncio.Queue[str] = asyncio.Queue()
        self._texts: dict[int, str] = {}
        self._steps: dict[int, int] = {}  # of each choice's last snapshot

    def note(self, first: int, output: RequestOutput) -> None:
        """An output has come, perhaps with new snapshots.

        Args:
            first: the choice of its first sample.
            output: of a request, with the last snapshot of each of its samples.
        """
        taken = (output.kv_transfer_params or {}).get(CANVAS_KEY, {})
        for index, snapshot in taken.items():
            if self._steps.get(first + index) != snapshot["step"]:
                self._steps[first + index] = snapshot["step"]
                self._send(first + index, snapshot)

    def _send(self, choice: int, taken: Mapping[str, Any]) -> None:
        canvas = {"index": choice, **taken, "texts": [self._text(t) for t in taken["tokens"]]}
        if "proposals" in taken:
            canvas["proposals"] = [self._text(token) for token in taken["proposals"]]
        event = {"object": OBJECT, "choices": [], "canvas": canvas}
        self.waiting.put_nowait(f"data: {json.dumps(event, ensure_ascii=False)}\n\n")

    def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self.tokenizer.decode([token])
        return self._texts[token]


async def with_snapshots(
    events: AsyncGenerator[str, None], snapshots: SnapshotEvents | None
) -> AsyncGenerator[str, None]:
    """A stream's events, and snapshots as soon as they come."""
    if snapshots is None:
        async for event in events:
            yield event
        return
    queue = snapshots.waiting
    coming, taken = _next(events), asyncio.ensure_future(queue.get())
    try:
        while True:
            await asyncio.wait({coming, taken}, return_when=asyncio.FIRST_COMPLETED)
            if taken.done():  # before the text's event, which may be the last one
                yield taken.result()
                taken = asyncio.ensure_future(queue.get())
                continue
            try:
                event = coming.result()
            except StopAsyncIteration:
                return
            yield event
            coming = _next(events)
    finally:
        for task in (coming, taken):
            task.cancel()
            with contextlib.suppress(BaseException):
                await task


def _next(events: AsyncGenerator[str, None]) -> asyncio.Future[str]:
    return asyncio.ensure_future(anext(events))
