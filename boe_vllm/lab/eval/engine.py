"""vLLM, offline: every request of a sweep in flight, finished ones as they come."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any

# Set before vLLM is imported. The engine runs in this process: if this process is killed, nothing
# is left behind, and steps do not depend on when requests arrive from another one.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind

from boe_vllm.lab.eval.answers import Answer, cut_at_end, cut_at_stops
from boe_vllm.lab.eval.cells import Job
from boe_vllm.lab.eval.prompts import Prompts
from boe_vllm.lab.eval.settings import Settings
from boe_vllm.lab.tasks import Task

# Requests that vLLM holds at least, running or waiting: a slot is never empty.
IN_FLIGHT = 1024


class Engine:
    """One engine for a whole sweep."""

    def __init__(self, settings: Settings, tasks: dict[str, Task]) -> None:
        """Start it."""
        self._settings, self._tasks = settings, tasks
        config = {}
        if settings.frequencies is not None:
            config["frequencies"] = str(settings.frequencies)
        arguments = {"seed": 0, "disable_log_stats": False} | settings.engine_args
        self._llm = LLM(settings.model_path, sampler_config=config, **arguments)

    def run(self, jobs: Iterable[Job], prompts: Prompts) -> Iterator[Answer]:
        """Answers to the jobs, in the order in which they finish.

        Raises:
            ValueError: for a job that the engine refuses, by name.
        """
        engine = self._llm.llm_engine
        most = max(IN_FLIGHT, 2 * engine.vllm_config.scheduler_config.max_num_seqs)
        names = map(str, itertools.count())
        jobs = iter(jobs)
        held: dict[str, Job] = {}
        while True:
            for job in itertools.islice(jobs, most - len(held)):
                name = next(names)
                try:
                    (prompt,) = engine.renderer.render_cmpl([prompts(job.item)])
                    engine.add_request(name, prompt, self._parameters(job))
                except ValueError as error:
                    raise ValueError(f"{job.cell.key}, item {job.index}: {error}") from error
                held[name] = job
            if not held:
                return
            for output in engine.step():
                if output.finished:
                    yield self._answer(held.pop(output.request_id), output)

    def _parameters(self, job: Job) -> SamplingParams:
        task = self._tasks[job.cell.task]
        whole = self._settings.whole_canvas or task.goes_on
        stops = () if whole else task.stop
        return SamplingParams(
            temperature=self._settings.temperature,
            max_tokens=job.cell.gen_length,
            seed=job.seed,
            stop=list(stops) or None,
            ignore_eos=whole,
            extra_args=dict(job.cell.fields),
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _answer(self, job: Job, output: Any) -> Answer:
        (completion,) = output.outputs
        tokens, text = list(completion.token_ids), completion.text
        tokenizer = self._llm.get_tokenizer()
        if self._tasks[job.cell.task].goes_on:
            text = tokenizer.decode(tokens, skip_special_tokens=False)
        elif self._settings.whole_canvas:
            shown = cut_at_end(tokens, tokenizer.eos_token_id)
            text = tokenizer.decode(shown, skip_special_tokens=True)
            text = cut_at_stops(text, self._tasks[job.cell.task].stop)
        return Answer(
            job=job,
            text=text,
            token_ids=tokens,
            finish_reason=completion.finish_reason,
            report=dict(output.kv_transfer_params["boe"]),
            scheduled=output.metrics.scheduled_ts,
            finished=output.metrics.last_token_ts,
        )
