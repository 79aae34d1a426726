"""The denoising loop in this process, without vLLM: the engine's tokens, texts and costs.

It has no tokens to schedule and no requests to wait for: items of a sweep are decoded side by side,
so many at a time. Requests end where the engine would end them.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator

from boe_vllm.base.process_memory import keep_freed_memory
from boe_vllm.decoding.loop import DenoisingLoop, StepResult
from boe_vllm.denoiser import Denoiser
from boe_vllm.lab.eval.answers import Answer, cut_at_end, cut_at_stops
from boe_vllm.lab.eval.cells import Job
from boe_vllm.lab.eval.prompts import Prompts
from boe_vllm.lab.eval.settings import Settings
from boe_vllm.lab.tasks import Task
from boe_vllm.request.resolve import SamplingFields
from boe_vllm.request.resolved import ResolvedRequest

RUNNING = 64
"""Items that are decoded at a time."""


@dataclasses.dataclass(kw_only=True, slots=True)
class Running:
    """One request on its way."""

    job: Job
    request: ResolvedRequest
    scheduled: float
    tokens: list[int] = dataclasses.field(default_factory=list)
    """What the engine would have sent so far."""


class InProcess:
    """A checkpoint, and one loop for each call of `run`."""

    def __init__(self, settings: Settings, tasks: dict[str, Task]) -> None:
        """Load the checkpoint.

        Raises:
            ValueError: for settings that only an engine has, or a folder that is no checkpoint.
        """
        if settings.engine_args:
            raise ValueError(
                f"--engine-args: expected none beside --in-process, which has no engine, got "
                f"{settings.engine_args}; leave one of them out"
            )
        keep_freed_memory()  # as our worker does
        self._settings, self._tasks = settings, tasks
        server = {} if settings.frequencies is None else {"frequencies": str(settings.frequencies)}
        self._denoiser = Denoiser.from_pretrained(
            settings.model, settings={"sampler_config": server}
        )

    def run(self, jobs: Iterable[Job], prompts: Prompts) -> Iterator[Answer]:
        """Answers to the jobs, in the order in which they finish.

        Raises:
            ValueError: for a job that cannot be decoded, by name.
        """
        waiting = list(jobs)[::-1]
        loop = self._denoiser.open_loop(self._cache_rows(waiting, prompts))
        running: dict[str, Running] = {}
        number = 0
        while waiting or running:
            while waiting and len(running) < RUNNING:
                running[str(number)] = self._open(loop, str(number), waiting.pop(), prompts)
                number += 1
            for name, result in loop.step(list(running)).items():
                if result.error is not None:
                    raise ValueError(f"{_name(running[name].job)}: {result.error}")
                running[name].tokens += result.tokens
                answer = self._answer(running[name], result)
                if answer is not None:
                    loop.remove(name)
                    del running[name]
                    yield answer

    def _open(self, loop: DenoisingLoop, name: str, job: Job, prompts: Prompts) -> Running:
        tokens = self._tokens(job, prompts)
        sampling = SamplingFields(
            max_tokens=job.cell.gen_length, temperature=self._settings.temperature, seed=job.seed
        )
        try:
            request = self._denoiser.resolve(tokens, sampling, job.cell.fields)
        except ValueError as error:
            raise ValueError(f"{_name(job)}: {error}") from error
        loop.add(name, tokens, request)
        return Running(job=job, request=request, scheduled=time.perf_counter())

    def _answer(self, running: Running, result: StepResult) -> Answer | None:
        """The answer, if the request ends with this step; None if it goes on."""
        if result.report is None:
            return None
        task, end = self._tasks[running.job.cell.task], self._denoiser.special.eos
        whole, stops = self._settings.whole_canvas or task.goes_on, task.stop
        ends = ((), ()) if whole else ((end,), stops)
        tokens, text, reason = self._denoiser.cut(running.request, running.tokens, *ends)
        if task.goes_on:
            text = self._denoiser.tokenizer.decode(tokens, skip_special_tokens=False)
        elif whole:
            text = cut_at_stops(self._denoiser.decode(cut_at_end(tokens, end)), stops)
        if reason == "length" and not result.done and len(tokens) < running.request.max_tokens:
            return None
        return Answer(
            job=running.job,
            text=text,
            token_ids=tokens,
            finish_reason=reason,
            report=dict(result.report),
            scheduled=running.scheduled,
            finished=time.perf_counter(),
        )

    def _tokens(self, job: Job, prompts: Prompts) -> list[int]:
        given = prompts(job.item)
        return given.get("prompt_token_ids") or self._denoiser.encode(given["prompt"])

    def _cache_rows(self, jobs: list[Job], prompts: Prompts) -> int:
        """Rows of keys and values that the requests of these jobs may hold at a time."""
        rows = [
            len(self._tokens(job, prompts)) + job.cell.gen_length + job.cell.fields["block_length"]
            for job in jobs
            if job.cell.fields.get("cache", "none") != "none"
        ]
        return RUNNING * max(rows, default=0)


def _name(job: Job) -> str:
    return f"{job.cell.key}, item {job.index}"
