"""What comes of one job, whichever backend decodes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from boe_vllm.lab.eval.cells import Job
from boe_vllm.lab.eval.prompts import Prompts


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What came of one job."""

    job: Job
    text: str
    token_ids: list[int]
    finish_reason: str
    report: dict[str, Any]
    """The request's own costs, and its trace if asked for."""
    scheduled: float
    finished: float
    """Seconds, on the backend's clock."""


class Backend(Protocol):
    """What decodes: vLLM's engine, or the denoising loop in this process."""

    def run(self, jobs: Iterable[Job], prompts: Prompts) -> Iterator[Answer]:
        """Answers to the jobs, in the order in which they finish."""
        ...


def cut_at_end(tokens: list[int], eos_token_id: int | None) -> list[int]:
    """The tokens before the first EOS."""
    return tokens[: tokens.index(eos_token_id)] if eos_token_id in tokens else tokens


def cut_at_stops(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the strings that end an answer."""
    for stop in stops:
        text = text.split(stop, 1)[0]
    return text
