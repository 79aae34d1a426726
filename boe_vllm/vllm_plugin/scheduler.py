"""One engine step is one denoising step of every running request.

vLLM's scheduler counts tokens that are computed once and cached. A masked diffusion model computes
all rows of a request, prompt and canvas, in every step, and a step may commit no token that can be
streamed yet. So this scheduler keeps every running request scheduled, and admits requests by rows.
The queues, priorities, aborts and stop conditions are vLLM's.
"""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from boe_vllm.vllm_plugin.admission import wire_of
from boe_vllm.vllm_plugin.output import DiffusionModelRunnerOutput

logger = init_logger("vllm." + __name__)

REPORT_KEY = "boe"
"""Where a request's accounting is found in `RequestOutput.kv_transfer_params`."""
CANVAS_KEY = "boe_canvas"
"""Where its canvas is, if it wants that seen."""


class DiffusionScheduler(Scheduler):
    """vLLM's scheduler with rows instead of tokens. See the module's text."""

    max_num_active_reqs: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Our runner reads preempted and resumed requests the way of vLLM's first runner.
        self.use_v2_model_runner = False
        self._rows: dict[str, int] = {}
        """Rows that one denoising step of each request computes."""
        self._text_end: dict[str, int] = {}
        """Tokens of each request's output up to the end of its given text, if it has any."""
        self._reports: dict[str, dict[str, Any]] = {}
        self._counters: dict[str, int] = {}

    def add_request(self, request: Request) -> None:
        super().add_request(request)
        wire = wire_of(request.sampling_params)
        # A request that went around admission has no rows of its own: the runner says why.
        self._rows[request.request_id] = self.max_model_len if wire is None else wire["rows"]
        if wire is not None and wire["text_end"]:
            self._text_end[request.request_id] = wire["text_end"]

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        for request in self.running:
            # Exactly one "token" is due, whether or not the last step returned any.
            request.num_computed_tokens = request.num_tokens - 1
        limit = self.max_num_active_reqs
        self.max_num_active_reqs = min(limit, self._number_that_fits(limit))
        try:
            return super().schedule(throttle_prefills)
        finally:
            self.max_num_active_reqs = limit

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        ours = model_runner_output
        if not isinstance(ours, DiffusionModelRunnerOutput):  # nothing was scheduled
            return super().update_from_output(scheduler_output, model_runner_output)
        self._counters = ours.counters
        for req_id, report in ours.reports.items():
            if req_id in self.requests:
                self._reports[req_id] = report
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self._report_early(outputs)
        self._show(outputs, ours.snapshots)
        for req_id, error in ours.errors.items():
            logger.error("Request %s failed: %s", req_id, error)
            self._finish(outputs, req_id, RequestStatus.FINISHED_ERROR, error)
        for req_id in ours.done:
            # Usually vLLM has stopped it already, at its end-of-text token or at max_tokens.
            self._finish(outputs, req_id, RequestStatus.FINISHED_STOPPED)
        return outputs

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """vLLM's statistics of a step, and the worker's counters on its way to `metrics`.

        Of their fields this one holds numbers by name, and nobody reads it where there is no LoRA.
        """
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            stats.running_lora_adapters = self._counters
            self._counters = {}
        return stats

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], *args: Any, **kwargs: Any
    ) -> tuple[list[int], bool]:
        """vLLM stops at a token that ends the request; one within given text does not."""
        # The last token that a request can have ends it, whatever it is.
        end = min(self._text_end.get(request.request_id, 0), request.max_tokens - 1)
        inside = max(0, end - request.num_output_tokens)
        given, rest = new_token_ids[:inside], new_token_ids[inside:]
        if given:
            request.append_output_token_ids(given)
        rest, stopped = super()._update_request_with_output(request, rest, *args, **kwargs)
        return given + rest, stopped

    def _number_that_fits(self, limit: int) -> int:
        """How many requests may run: those that do, and as many waiting ones, in the queue's
        order, as `max_num_batched_tokens` has rows for.

        A preempted request keeps its canvas, so its rows stay taken while it waits.
        """
        waiting = [*self.kv_holding_waiting, *self.waiting]
        preempted = {r.request_id for r in waiting if r.status == RequestStatus.PREEMPTED}
        taken = preempted.union(request.request_id for request in self.running)
        room = self.scheduler_config.max_num_batched_tokens
        room -= sum(self._rows[req_id] for req_id in taken)
        number = len(self.running)
        for request in waiting:
            if request.request_id not in preempted:
                room -= self._rows[request.request_id]
                if room < 0:
                    break
            number += 1
            if number >= limit:
                break
        return max(number, 1)  # the first one always runs, lest everybody waits for ever

    def _finish(
        self,
        outputs: dict[int, EngineCoreOutputs],
        req_id: str,
        status: RequestStatus,
        stop_reason: str | None = None,
    ) -> None:
        """Finish a request that is still there and tell its client."""
        report = self._reports.get(req_id)
        for request in self.finish_requests(req_id, status):
            to_client = outputs.setdefault(request.client_index, EngineCoreOutputs())
            to_client.outputs.append(
                EngineCoreOutput(
                    request_id=req_id,
                    new_token_ids=[],
                    finish_reason=request.get_finished_reason(),
                    stop_reason=stop_reason,
                    **_error_field(stop_reason),
                    events=request.take_events(),
                    kv_transfer_params=None if report is None else {REPORT_KEY: report},
                    trace_headers=request.trace_headers,
                )
            )

    def _report_early(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        """Send the report with every output of a request that has stop strings: vLLM finds those in
        the client's process, so the output that turns out to be the last is not marked as such."""
        for to_client in outputs.values():
            for output in to_client.outputs:
                request = self.requests.get(output.request_id)
                if request is None or request.sampling_params is None:
                    continue
                report = self._reports.get(output.request_id)
                if request.sampling_params.stop and report is not None:
                    output.kv_transfer_params = {REPORT_KEY: report}

    def _show(
        self, outputs: dict[int, EngineCoreOutputs], snapshots: dict[str, dict[str, Any]]
    ) -> None:
        """Send canvases to those who watch them, with a request's output or without any."""
        sent = {o.request_id: o for to_client in outputs.values() for o in to_client.outputs}
        for req_id, snapshot in snapshots.items():
            request = self.requests.get(req_id)
            if req_id not in sent and request is not None:
                sent[req_id] = EngineCoreOutput(request_id=req_id, new_token_ids=[])
                to_client = outputs.setdefault(request.client_index, EngineCoreOutputs())
                to_client.outputs.append(sent[req_id])
            if req_id in sent:
                params = sent[req_id].kv_transfer_params or {}
                sent[req_id].kv_transfer_params = {**params, CANVAS_KEY: snapshot}

    def _free_request(
        self, request: Request, delay_free_blocks: bool = False
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        kv_params, ec_params = super()._free_request(request, delay_free_blocks)
        self._rows.pop(request.request_id, None)
        self._text_end.pop(request.request_id, None)
        report = self._reports.pop(request.request_id, None)
        if report is not None:
            kv_params = {**(kv_params or {}), REPORT_KEY: report}
        return kv_params, ec_params


def _error_field(reason: str | None) -> dict[str, Any]:
    """Why a request failed, in the field that vLLM has for it from 0.33 on."""
    if reason is None or "error" not in EngineCoreOutput.__struct_fields__:
        return {}
    from vllm.outputs import RequestError

    return {"error": RequestError(code="denoising_failed", message=reason)}
