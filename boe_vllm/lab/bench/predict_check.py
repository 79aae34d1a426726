"""Steps that a GPU has measured beside what the cost model makes of their passes.

The passes are counted anew, on the steps that were timed. Launches and waits are those of the
measurement, so that only the model of time is tried: a step's own forward launches what a
confidence step does, and its other rounds share the rest alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from boe_vllm.lab.bench import common, costs
from boe_vllm.lab.bench.ceilings import Ceilings
from boe_vllm.lab.bench.counted import Lengths, count_random
from boe_vllm.lab.bench.launches import CODES
from boe_vllm.lab.bench.passes import Step, layer_passes, layer_rows
from boe_vllm.lab.bench.scenarios import STEPS

BASE = "confidence"
Line = Mapping[str, Any]


def compare(file: Path, network: costs.Network, ceilings: Ceilings) -> list[dict[str, Any]]:
    """One row per line of check "steps", in their order.

    Args:
        file: JSON lines of `scripts/gpu_check.py`.
        network: sizes of what was measured.
        ceilings: of the card.

    Raises:
        UsageError: for a file without such lines.
    """
    lines = [json.loads(text) for text in file.read_text().splitlines() if text.strip()]
    measured = [line for line in lines if line["check"] == "steps" and "kernels" in line]
    if not measured:
        raise common.UsageError(
            f"--check: expected lines of check 'steps' with kernels in {file}, got none; give the "
            "output of scripts/gpu_check.py on a GPU"
        )
    plain = {_place(line): line for line in measured if line["scenario"] == BASE}
    return [_row(line, plain.get(_place(line), line), network, ceilings) for line in measured]


def _place(line: Line) -> tuple[int, int]:
    return line["requests"], line["prompt"]


def _row(line: Line, plain: Line, network: costs.Network, ceilings: Ceilings) -> dict[str, Any]:
    steps = _steps(line)
    others = sum(len(_rounds(step)) - 1 for step in steps) / len(steps)
    predicted = costs.mean(
        [
            costs.predict(
                step,
                network,
                ceilings,
                CODES[line["code"]],
                launches=_split(step, line["kernels"], plain["kernels"], others),
                copies=_split(step, line["syncs"], plain["syncs"], others),
            )
            for step in steps
        ]
    )
    ms, busy = predicted.seconds * 1e3, predicted.busy * 1e3
    return {
        "policy": line["scenario"],
        "requests": line["requests"],
        "length": line["prompt"] + line["canvas"],
        "passes": sum(map(layer_passes, steps)) / len(steps),
        "rows": sum(map(layer_rows, steps)) / len(steps),
        "kernels": line["kernels"],
        "measured ms": line["ms_step"],
        "predicted ms": ms,
        "of it": ms / line["ms_step"],
        "measured busy": line["busy_ms"],
        "predicted busy": busy,
        "of busy": busy / line["busy_ms"],
        "binds": predicted.binds,
    }


def _steps(line: Line) -> list[Step]:
    """The passes of the steps that were timed."""
    lengths = Lengths(**{name: line[name] for name in Lengths.__slots__})
    first, many = line["first_step"], line["steps"]
    counted = count_random(STEPS[line["scenario"]], line["requests"], lengths, first + many)
    return [_rounds(step) for step in counted[first:]]


def _rounds(step: Step) -> Step:
    return [passes for passes in step if passes]


def _split(step: Step, whole: float, first: float, others: float) -> Sequence[float]:
    """A number of every round, of which `others` come after the first in the mean of the steps."""
    if not others:
        return [whole]
    return [first] + [max(0.0, whole - first) / others] * (len(step) - 1)
