"""What the model runner tells the scheduler, and what a failing request tells its client."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from vllm.exceptions import GenerationError
from vllm.outputs import RequestOutput
from vllm.v1.outputs import ModelRunnerOutput

from boe_vllm.vllm_plugin import shutdown


@dataclass
class DiffusionModelRunnerOutput(ModelRunnerOutput):
    """The tokens of one denoising step and how each request is doing.

    Plain Python values only: it is pickled on its way from the workers.
    """

    reports: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Accounting so far (steps, forwards, backwards, trace), by request id."""
    errors: dict[str, str] = field(default_factory=dict)
    """Why a request cannot go on, by request id."""
    counters: dict[str, int] = field(default_factory=dict)
    """What the worker has done since its last output; see `decoding.accounting`."""
    snapshots: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Canvases of requests that want theirs seen, by request id."""
    done: set[str] = field(default_factory=set)
    """Requests whose canvas needs no further step."""


async def with_reasons(
    outputs: AsyncGenerator[RequestOutput, None], engine: Any
) -> AsyncGenerator[RequestOutput, None]:
    """A request's outputs; where it failed, or the engine stops, the error says why.

    Raises:
        GenerationError: which the HTTP server answers with status 500 and the text.
        GracefulHTTPError: with status 503.
    """
    async with contextlib.aclosing(outputs):  # a client that leaves ends the request at once
        async for output in outputs:
            for completion in output.outputs:
                if completion.finish_reason == "error":
                    raise GenerationError(str(completion.stop_reason or "the request failed"))
                if completion.finish_reason == "abort" and shutdown.stopping(engine):
                    raise shutdown.refusal()
            yield output
