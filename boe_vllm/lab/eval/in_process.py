"""The denoising loop in this process, without vLLM: the engine's tokens, texts and costs.

It has no tokens to schedule and no requests to wait for: items of a sweep are decoded side by side,
so many at a time. Requests end where the engine would end them.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator
from typing import Any

from boe_vllm.base.process_memory import keep_freed_memory
from boe_vllm.decoding.loop import DenoisingLoop
from boe_vllm.lab.eval.answers import Answer, cut_at_end, cut_at_stops
from boe_vllm.lab.eval.cells import Job
from boe_vllm.lab.eval.prompts import Prompts
from boe_vllm.lab.eval.settings import Settings
from boe_vllm.lab.pictures.denoiser import load
from boe_vllm.lab.tasks import Task
from boe_vllm.request.config import parse_sampler_config

RUNNING = 64
"""Items that are decoded at a time."""


@dataclasses.dataclass(slots=True)
class Running:
    """One request on its way."""

    job: Job
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
        self._denoiser = load(settings.model)

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
                job = waiting.pop()
                self._open(loop, str(number), job, prompts)
                running[str(number)] = Running(job, time.perf_counter())
                number += 1
            for name, result in loop.step(list(running)).items():
                request = running[name]
                if result.error is not None:
                    raise ValueError(f"{_name(request.job)}: {result.error}")
                request.tokens += result.tokens
                text, reason = self._end(request)
                if reason is None and result.done:
                    reason = "length"
                if reason is not None:
                    assert result.report is not None
                    loop.remove(name)
                    yield _answer(running.pop(name), text, reason, result.report)

    def _open(self, loop: DenoisingLoop, name: str, job: Job, prompts: Prompts) -> None:
        tokens = self._tokens(job, prompts)
        try:
            resolved = self._denoiser.resolve(
                parse_sampler_config(job.cell.fields, base=self._settings.server),
                prompt_len=len(tokens),
                max_tokens=job.cell.gen_length,
                temperature=self._settings.temperature,
                seed=job.seed,
            )
        except ValueError as error:
            raise ValueError(f"{_name(job)}: {error}") from error
        loop.add(name, tokens, resolved)

    def _end(self, request: Running) -> tuple[str, str | None]:
        """The request's text, and why it ends now if it does; tokens beyond its end are cut."""
        length = request.job.cell.gen_length
        reason = "length" if len(request.tokens) >= length else None
        del request.tokens[length:]
        shown = cut_at_end(request.tokens, self._denoiser.config.eos_token_id)
        if not self._settings.whole_canvas and len(shown) < len(request.tokens):
            del request.tokens[len(shown) + 1 :]
            reason = "stop"
        whole = self._denoiser.decode(shown)
        text = cut_at_stops(whole, self._tasks[request.job.cell.task].stop)
        if text != whole and not self._settings.whole_canvas:
            reason = "stop"
        return text, reason

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


def _answer(request: Running, text: str, reason: str, report: dict[str, Any]) -> Answer:
    return Answer(
        job=request.job,
        text=text,
        token_ids=request.tokens,
        finish_reason=reason,
        report=dict(report),
        scheduled=request.scheduled,
        finished=time.perf_counter(),
    )


def _name(job: Job) -> str:
    return f"{job.cell.key}, item {job.index}"
