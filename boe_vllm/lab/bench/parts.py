"""Where a step's time goes: the network's functions, timed by a watch around each of them.

torch's profiler would slow small operations more than large ones; a watch costs a microsecond.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

from boe_vllm.lab.bench import common
from boe_vllm.models import block, functional
from boe_vllm.models.decoder import Decoder
from boe_vllm.steering import importance

Watched = tuple[str, Any, str]

FUNCTIONS: tuple[Watched, ...] = (
    ("layers forward", Decoder, "run"),
    ("logits", Decoder, "logits"),
    ("soft writes", importance, "_soft_writes"),
    ("  of it, product with the vocabulary", Decoder, "soft_embed"),
    ("gradient of the entropies", importance, "_objective_gradient"),
    ("  of it, product with the vocabulary", Decoder, "logits_backward"),
    ("layers backward", Decoder, "backward"),
    ("  of it, attention", block, "attention_backward"),
    ("  of it, SwiGLU", block, "swiglu_backward"),
    ("  of it, normalisation", functional, "rms_norm_backward"),
)
"""Name in the table, where the function is found, and its name there."""
STEP = "whole step"


def times_by_part(
    cases: Mapping[str, Callable[[], Callable[[], Any]]], rounds: int
) -> list[dict[str, Any]]:
    """One row per part: ms of each case, medians over rounds, and what the others add to the first.

    Args:
        cases: name -> a function that prepares a step (not timed) and returns it; on the CPU.
        rounds: measured rounds, all cases one after the other in each, after two that are not.
    """
    taken: dict[str, list[list[float]]] = {name: [] for name in cases}
    for number in range(-2, rounds):
        for name, prepare in cases.items():
            work = prepare()
            with _watches() as sums:
                start = time.perf_counter()
                work()
                whole = time.perf_counter() - start
            if number >= 0:
                taken[name].append([*sums, whole])
    labels = [*(label for label, _, _ in FUNCTIONS), STEP]
    medians = {
        name: [common.median(column) * 1e3 for column in zip(*values, strict=True)]
        for name, values in taken.items()
    }
    first = next(iter(cases))
    return [
        {"part": label}
        | {f"{name} ms": medians[name][n] for name in cases}
        | {
            f"{name} adds": f"{(medians[name][n] - medians[first][n]) / medians[first][-1]:.1%}"
            for name in cases
            if name != first
        }
        for n, label in enumerate(labels)
    ]


@contextlib.contextmanager
def _watches() -> Iterator[list[float]]:
    """Seconds spent in each of `FUNCTIONS` while the context lasts."""
    sums = [0.0] * len(FUNCTIONS)

    def add(place: int, seconds: float) -> None:
        sums[place] += seconds

    with contextlib.ExitStack() as stack:
        for place, (_, owner, name) in enumerate(FUNCTIONS):
            note = functools.partial(add, place)
            watch = common.watched(getattr(owner, name), note, time.perf_counter)
            stack.enter_context(mock.patch.object(owner, name, watch))
        yield sums
