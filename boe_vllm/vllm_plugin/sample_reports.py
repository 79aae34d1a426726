"""Each sample's report in its own place: over HTTP, in its choice.

vLLM carries one report for a request, whose `n` samples are requests of their own to the engine,
and leaves it out of streams. Here the reports of all samples travel together in the request's
`kv_transfer_params`, and the HTTP server puts each into the choice that it belongs to: of a plain
response, and of the last chunk of each choice of a stream. Tokens that were written into the prompt
are counted among the response's tokens.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, TypeAlias

from vllm.outputs import RequestOutput

from boe_vllm.vllm_plugin.scheduler import CANVAS_KEY, REPORT_KEY
from boe_vllm.vllm_plugin.snapshot_events import SnapshotEvents, with_snapshots
from boe_vllm.vllm_plugin.wrapping import wrap

SAMPLES_KEY = "boe_samples"
"""Where the reports of several samples are in `RequestOutput.kv_transfer_params`, by index."""
FIELD = "boe"
"""The field of a choice that holds its report."""

Report: TypeAlias = Mapping[str, Any]
CANVASES = "_boe_vllm_canvases"
"""The attribute of a request's state with the last snapshots of its canvases, if there are any."""
_OF_PARENT = "_boe_vllm_reports"
_EVENT = "data: "


def wrap_completions(module: ModuleType) -> None:
    """Put reports into the choices of completions."""
    serving = module.OpenAIServingCompletion
    plain, streamed = "request_output_to_completion_response", "completion_stream_generator"
    wrap(serving, plain, {"final_res_batch", "request"}, _completion_response)
    wrap(serving, streamed, {"request", "result_generator"}, _completion_stream)


def wrap_chat(module: ModuleType) -> None:
    """Put reports into the choices of chats."""
    serving, expected = module.OpenAIServingChat, {"request", "result_generator"}
    wrap(serving, "chat_completion_full_generator", expected, _chat_response)
    wrap(serving, "chat_completion_stream_generator", expected, _chat_stream)


def reports_of(output: RequestOutput) -> dict[int, Report]:
    """The reports of a request's samples, by index, as far as they are known."""
    params = output.kv_transfer_params or {}
    if SAMPLES_KEY in params:
        return dict(params[SAMPLES_KEY])
    return {0: params[REPORT_KEY]} if REPORT_KEY in params else {}


def infilled(reports: Sequence[Report]) -> int:
    """Tokens that were written into prompts."""
    return sum(len(run["tokens"]) for report in reports for run in report.get("infill", ()))


# ---- from the engine's outputs to a request's ----------------------------------------------------


def joined(state: Any, kv_transfer_params: dict[str, Any] | None) -> dict[str, Any] | None:
    """An output's params with the reports, and the last canvases, of all samples of its request.

    Args:
        state: vLLM's of the sample.
        kv_transfer_params: of the sample's output.
    """
    if state.parent_req is not None:
        kv_transfer_params = _together(state.parent_req, state.request_index, kv_transfer_params)
    owner = state if state.parent_req is None else state.parent_req
    return _with_canvases(owner, state.request_index, kv_transfer_params)


def _together(parent: Any, index: int, params: dict[str, Any] | None) -> dict[str, Any] | None:
    """A sample's params with the reports of all samples so far: vLLM keeps only the last ones."""
    reports: dict[int, Report] = vars(parent).setdefault(_OF_PARENT, {})
    if params and REPORT_KEY in params:
        reports[index] = params[REPORT_KEY]
    if not reports:
        return params
    first = reports[min(reports)]
    return {**(params or {}), REPORT_KEY: first, SAMPLES_KEY: dict(sorted(reports.items()))}


def _with_canvases(owner: Any, index: int, params: dict[str, Any] | None) -> dict[str, Any] | None:
    """The params with the last snapshots of all samples: of outputs that a client has not taken in
    yet vLLM keeps the last one's params only."""
    canvases: dict[int, Any] = vars(owner).setdefault(CANVASES, {})
    if params and CANVAS_KEY in params:
        canvases[index] = params[CANVAS_KEY]
    return {**(params or {}), CANVAS_KEY: dict(canvases)} if canvases else params


# ---- from a request's outputs to the response ----------------------------------------------------


def _completion_response(original: Callable[..., Any]) -> Callable[..., Any]:
    def request_output_to_completion_response(
        self: Any, final_res_batch: list[RequestOutput], *args: Any, **kwargs: Any
    ) -> Any:
        response = original(self, final_res_batch, *args, **kwargs)
        reports = [
            reports_of(output).get(completion.index)
            for output in final_res_batch
            for completion in output.outputs
        ]
        return _completed(response, reports)

    return request_output_to_completion_response


def _chat_response(original: Callable[..., Any]) -> Callable[..., Any]:
    async def chat_completion_full_generator(
        self: Any, request: Any, result_generator: Any, *args: Any, **kwargs: Any
    ) -> Any:
        last: list[RequestOutput] = []

        async def noted() -> AsyncGenerator[RequestOutput, None]:
            async with contextlib.aclosing(result_generator):
                async for output in result_generator:
                    last[:] = [output]
                    yield output

        response = await original(self, request, noted(), *args, **kwargs)
        if not last or not hasattr(response, "choices"):
            return response  # an error
        reports = reports_of(last[0])
        return _completed(response, [reports.get(choice.index) for choice in response.choices])

    return chat_completion_full_generator


def _completed(response: Any, reports: Sequence[Report | None]) -> Any:
    """The response with a report in each of its choices."""
    found = [report for report in reports if report is not None]
    if not found:
        return response
    for choice, report in zip(response.choices, reports, strict=True):
        if report is not None:
            setattr(choice, FIELD, report)
    for name in (SAMPLES_KEY, CANVAS_KEY):
        response.kv_transfer_params.pop(name, None)
    response.usage.completion_tokens += infilled(found)
    response.usage.total_tokens += infilled(found)
    return response


# ---- from a request's outputs to a stream --------------------------------------------------------


class _Stream:
    """The reports of a stream's choices on their way into its last chunks."""

    def __init__(self, serving: Any, request: Any) -> None:
        """Of a request, whose samples for each prompt are choices of their own."""
        self.samples = request.n or 1
        asked = (request.vllm_xargs or {}).get("stream_canvas")
        self.snapshots = SnapshotEvents(serving.renderer.tokenizer) if asked else None
        self.waiting: dict[int, Report] = {}
        self.sent: dict[int, Report] = {}

    def note(self, prompt: int, output: RequestOutput) -> None:
        """An output is about to become chunks."""
        reports = reports_of(output)
        if self.snapshots is not None:
            self.snapshots.note(prompt * self.samples, output)
        for completion in output.outputs:
            choice = completion.index + prompt * self.samples
            if completion.finish_reason is not None and completion.index in reports:
                self.waiting[choice] = reports[completion.index]

    def completed(self, event: str) -> str:
        """An event with what belongs into it."""
        if not (self.waiting or infilled([*self.sent.values()])) or event[6:7] != "{":
            return event
        chunk = json.loads(event.removeprefix(_EVENT))
        choices = chunk.get("choices") or []
        for choice in choices:
            index = choice["index"]
            if choice.get("finish_reason") is not None and index in self.waiting:
                self.sent[index] = choice[FIELD] = self.waiting.pop(index)
        if usage := chunk.get("usage"):
            counted = [self.sent[c["index"]] for c in choices if c["index"] in self.sent]
            more = infilled(counted if choices else [*self.sent.values()])
            usage["completion_tokens"] += more
            usage["total_tokens"] += more
        return f"{_EVENT}{json.dumps(chunk, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _through(stream: _Stream, events: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    async with contextlib.aclosing(events):  # a client that leaves ends the request at once
        async for event in with_snapshots(events, stream.snapshots):
            yield stream.completed(event)


def _completion_stream(original: Callable[..., Any]) -> Callable[..., Any]:
    def completion_stream_generator(
        self: Any, request: Any, engine_inputs: Any, result_generator: Any, *args: Any, **kw: Any
    ) -> AsyncGenerator[str, None]:
        stream = _Stream(self, request)

        async def noted() -> AsyncGenerator[tuple[int, RequestOutput], None]:
            async with contextlib.aclosing(result_generator):
                async for prompt, output in result_generator:
                    stream.note(prompt, output)
                    yield prompt, output

        return _through(stream, original(self, request, engine_inputs, noted(), *args, **kw))

    return completion_stream_generator


def _chat_stream(original: Callable[..., Any]) -> Callable[..., Any]:
    def chat_completion_stream_generator(
        self: Any, request: Any, result_generator: Any, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[str, None]:
        stream = _Stream(self, request)

        async def noted() -> AsyncGenerator[RequestOutput, None]:
            async with contextlib.aclosing(result_generator):
                async for output in result_generator:
                    stream.note(0, output)
                    yield output

        return _through(stream, original(self, request, noted(), *args, **kwargs))

    return chat_completion_stream_generator
