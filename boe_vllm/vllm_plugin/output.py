"""What the model runner tells the scheduler, and what a failing request tells its client."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from vllm.exceptions import GenerationError
from vllm.outputs import RequestOutput
from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput

from boe_vllm.decoding.accounting import TokenLogprobs
from boe_vllm.decoding.loop import StepResult
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


def to_output(
    req_ids: Sequence[str], results: dict[str, StepResult], errors: dict[str, str]
) -> DiffusionModelRunnerOutput:
    """What vLLM's scheduler reads, for the scheduled requests in their order.

    Args:
        req_ids: the scheduled requests.
        results: of the denoising step, by request.
        errors: of requests that did not take part in it.
    """
    errors = errors | {r: result.error for r, result in results.items() if result.error}
    tokens = [list(results[r].tokens) if r in results else [] for r in req_ids]
    return DiffusionModelRunnerOutput(
        req_ids=list(req_ids),
        req_id_to_index={req_id: index for index, req_id in enumerate(req_ids)},
        sampled_token_ids=tokens,
        logprobs=to_logprobs([results[r].logprobs if r in results else None for r in req_ids]),
        reports={r: result.report for r, result in results.items() if result.report is not None},
        errors=errors,
        snapshots={r: result.snapshot for r, result in results.items() if result.snapshot},
        done={r for r, result in results.items() if result.done and r not in errors},
    )


def to_logprobs(requests: Sequence[list[TokenLogprobs] | None]) -> LogprobsLists | None:
    """The log-probabilities of all requests' new tokens, one row each, as vLLM slices them.

    Rows are as wide as the widest; vLLM cuts each to what its request asked for.

    Args:
        requests: for each scheduled request, one entry per new token; None if it did not ask.
    """
    rows = [row for request in requests for row in request or ()]
    if not rows:
        return None
    width = max(len(row.token_ids) for row in rows)
    token_ids = np.zeros((len(rows), width), np.int64)
    logprobs = np.full((len(rows), width), -np.inf, np.float32)
    for index, row in enumerate(rows):
        token_ids[index, : len(row.token_ids)] = row.token_ids
        logprobs[index, : len(row.logprobs)] = row.logprobs
    starts = np.cumsum([0] + [len(request or ()) for request in requests])
    return LogprobsLists(
        logprob_token_ids=token_ids,
        logprobs=logprobs,
        sampled_token_ranks=np.array([row.rank for row in rows], np.int64),
        cu_num_generated_tokens=starts.tolist(),
    )


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
