"""The paper's tables and figure (TABES, arXiv 2602.00250), and the contest of all policies, as
arguments of `boe-vllm eval`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from boe_vllm.lab.eval.variants import Variant, parse
from boe_vllm.lab.tasks import TASKS

BENCHMARKS = ("mbpp", "humaneval", "gsm8k", "math500", "countdown-file", "sudoku-file")
PUZZLES = ("sudoku4", "sudoku6", "sudoku6-few", "countdown", "addition")
PAPER = "boe:preset=paper"
JOINT = "joint"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """Defaults that a table gives to the arguments; whatever the command line says wins."""

    title: str
    tasks: tuple[str, ...]
    bundled: tuple[str, ...]
    """Tasks for the bundled checkpoint, each at its own canvas length."""
    variants: tuple[Variant, ...]
    of_text: tuple[str, ...] | None = None
    """Tasks for the bundled checkpoint of text; None takes `tasks`."""
    gen_lengths: tuple[int, ...]
    tokens_per_step: tuple[int, ...]
    temperature: float = 0.0
    one_by_one: bool = False
    """Cells run one after the other, where their wall time is a column."""
    published: bool = True
    """Policies take the settings that their authors publish for a task, instead of defaults."""
    whole_canvas: bool = False
    paired: str | None = None
    against: tuple[str, ...] = ()


def _variants(*texts: str) -> tuple[Variant, ...]:
    return tuple(parse(text) for text in texts)


def _ablation(label: str, **changes: Any) -> Variant:
    return Variant(label=label, fields={"policy": "boe", "preset": "paper"} | changes)


PRESETS = {
    "table 2": Preset(
        title="Tables 2 and 3: policies on benchmarks",
        tasks=BENCHMARKS,
        bundled=PUZZLES,
        variants=_variants(
            "confidence", "margin", "entropy", "pc", "remdm-llada", "lookum", PAPER, JOINT
        ),
        gen_lengths=(128, 256),
        tokens_per_step=(2,),
    ),
    "table 4": Preset(
        title="Table 4: quality of text",
        tasks=("text",),
        bundled=("sudoku6-few",),
        of_text=("stories",),
        variants=_variants("ancestral", "remdm", "confidence", PAPER, "boe", JOINT),
        gen_lengths=(1024,),
        tokens_per_step=(8,),  # T = 128 steps of 1024 tokens
        temperature=1.0,
    ),
    "table 5": Preset(
        title="Table 5: ablations",
        tasks=("gsm8k",),
        bundled=("sudoku6", "sudoku6-few", "countdown"),
        variants=(
            parse("confidence"),
            _ablation("BoE (full)"),
            _ablation("w/o confidence gating", gate="none"),
            _ablation("w/o anti-collapse", floor_weight=0.0),
            _ablation("w/o ActiveQueryAttention", active="all"),
            _ablation("rho 0.10", rho=0.1),
            _ablation("rho 0.25", rho=0.25),
            _ablation("rho 0.50", rho=0.5),
        ),
        gen_lengths=(128,),
        tokens_per_step=(1,),
        one_by_one=True,
    ),
    "figure 4": Preset(
        title="Figure 4: score against network function evaluations",
        tasks=("humaneval", "mbpp", "gsm8k", "math500"),
        bundled=("sudoku6", "sudoku6-few", "countdown"),
        variants=_variants("entropy", "confidence", "lookum", PAPER, JOINT),
        gen_lengths=(256,),
        tokens_per_step=(1, 2, 4, 8),
    ),
}

OWN_RATE = frozenset(
    {"eb", "threshold", "factor", "klass", "punt", "dapd", "dawn", "verify", "credit", "hierarchy"}
)
"""Policies that decide themselves how many tokens they write in a step."""


def own_rate(fields: Mapping[str, Any]) -> bool:
    """Whether a cell's policy decides itself how many tokens it writes in a step."""
    return fields["policy"] in OWN_RATE or fields.get("commit") in ("rounds", "drafts")


CONTEST = "contest"
RIVALS = ("confidence", "confident-random", "info-gain", "lookum", "joint", "pairwise exact")


def contestants() -> dict[str, dict[str, Any]]:
    """Label -> fields: every bundled policy with its defaults, then every preset of a policy."""
    from boe_vllm.request.reference import policy_entries

    entries = policy_entries(bundled=True)
    plain = {entry.name: {"policy": entry.name} for entry in entries}
    presets = {
        f"{entry.name} {preset}": {"policy": entry.name, "preset": preset}
        for entry in entries
        for preset in entry.presets
    }
    return plain | presets


def contest() -> Preset:
    """Every policy on every bundled task, on equal terms, and `boe` against its rivals."""
    return Preset(
        title="Policies on the bundled tasks",
        tasks=tuple(TASKS),
        bundled=tuple(TASKS),
        variants=tuple(Variant(label=k, fields=v) for k, v in contestants().items()),
        gen_lengths=(128,),
        tokens_per_step=(1, 2, 4, 8),
        one_by_one=True,
        published=False,
        whole_canvas=True,
        paired="boe",
        against=RIVALS,
    )


def preset_named(name: str) -> Preset:
    """A preset by the name that settings have it under."""
    return contest() if name == CONTEST else PRESETS[name]


# What PC-Sampler's authors set by task (their scripts): lambda.
PC_LAMBDA = {
    "sudoku4": 0.0,
    "sudoku4-few": 0.0,
    "sudoku6": 0.0,
    "sudoku6-few": 0.0,
    "sudoku-file": 0.0,
    "countdown": 1.0,
    "countdown-file": 1.0,
}


def published_fields(task: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Settings that a policy's authors publish for a task, under those given."""
    if fields["policy"] == "pc" and task in PC_LAMBDA:
        return {"lambd": PC_LAMBDA[task]} | fields
    return fields
