"""What the model runner tells the scheduler beyond tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.v1.outputs import ModelRunnerOutput


@dataclass
class DiffusionModelRunnerOutput(ModelRunnerOutput):
    """The tokens of one denoising step and how each request is doing.

    Plain Python values only: it is pickled on its way from the workers.
    """

    reports: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Accounting so far (steps, forwards, backwards, trace), by request id."""
    errors: dict[str, str] = field(default_factory=dict)
    """Why a request cannot go on, by request id."""
    tally: dict[str, int] = field(default_factory=dict)
    """What the worker has done since its last output; see `engine.tally`."""
    done: set[str] = field(default_factory=set)
    """Requests whose canvas needs no further step."""
