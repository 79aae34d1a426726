"""Every policy on every bundled task, on equal terms.

For every task, policy and budget (tokens a step): the share of unseen items whose answer obeys the
task's rules, with its 95 % interval, and what it cost. All policies see the same items, decoded in
one block at temperature 0; policies that decide themselves how many tokens they write run once.
`boe` is compared with its rivals item by item (exact McNemar test, two-sided).

With `--cells FILE` every finished cell is appended to a file, and cells found there are not run
again: a run can be cut short, extended with other tasks or policies, and summed up (`--no-run`).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import boe_vllm
from boe_vllm.lab.bench import checkpoint, common
from boe_vllm.lab.bench.contests import Arena, Cell, frequency_table
from boe_vllm.lab.bench.machine import Environment, print_facts
from boe_vllm.lab.bench.paired import mcnemar
from boe_vllm.lab.bench.states import open_loop
from boe_vllm.lab.eval.statistics import wilson
from boe_vllm.lab.tasks import TASKS, GeneratedTask

CONTESTANTS: dict[str, dict[str, Any]] = {
    "random": {"policy": "random"},
    "confidence": {"policy": "confidence"},
    "margin": {"policy": "margin"},
    "entropy": {"policy": "entropy"},
    "confident-random": {"policy": "confident-random"},
    "origin": {"policy": "origin"},
    "pc": {"policy": "pc"},
    "eb": {"policy": "eb"},
    "threshold": {"policy": "threshold"},
    "factor": {"policy": "factor"},
    "klass": {"policy": "klass"},
    "remdm": {"policy": "remdm"},
    "remdm-llada": {"policy": "remdm-llada"},
    "p2": {"policy": "p2"},
    "info-gain": {"policy": "info-gain"},
    "lookum": {"policy": "lookum"},
    "lookahead": {"policy": "lookahead"},
    "boe": {"policy": "boe"},
    "boe paper": {"policy": "boe", "preset": "paper"},
    "boe prototype": {"policy": "boe", "preset": "prototype"},
    "boe kv": {"policy": "boe", "preset": "kv"},
    "boe future": {"policy": "boe", "preset": "future"},
    "joint": {"policy": "joint"},
    "joint thorough": {"policy": "joint", "preset": "thorough"},
    "pairwise": {"policy": "pairwise"},
    "pairwise exact": {"policy": "pairwise", "preset": "exact"},
}
"""All policies with their defaults, and their presets."""
ADAPTIVE = ("eb", "threshold", "factor", "klass")
RIVALS = ("confidence", "confident-random", "info-gain", "lookum", "pairwise exact")
ONE_ANSWER = ("sudoku4", "sudoku6")
MANY_ANSWERS = "sudoku6-few"
Key = tuple[str, str, int]
"""Task, contestant, tokens per step: what tells cells apart."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.set_defaults(model=boe_vllm.tiny_model_path(), requests=64)
    parser.add_argument("--items", type=int, default=500, help="unseen items per task")
    parser.add_argument("--tasks", type=common.names(list(TASKS)), default=list(TASKS))
    parser.add_argument(
        "--policies", type=common.names(list(CONTESTANTS)), default=list(CONTESTANTS)
    )
    parser.add_argument("--budgets", type=common.integers, default=[1, 2, 4, 8])
    parser.add_argument("--cells", type=Path, help="file of finished cells, JSON lines")
    parser.add_argument(
        "--no-run", action="store_true", help="sum up what --cells has, and run nothing"
    )


def run(args: argparse.Namespace) -> None:
    """Run the cells that are missing, print the tables and the JSON line."""
    if args.no_run and args.cells is None:
        raise common.UsageError("--no-run: expected --cells FILE beside it, which it sums up")
    environment = Environment(args.device, args.dtype, args.clock)
    tasks = [TASKS[name] for name in args.tasks]
    wanted = list(_keys_of_cells(tasks, args))
    known = {cell.key: cell for cell in _read(args.cells) if len(cell.valid) == args.items}
    missing = [key for key in wanted if key not in known]
    if missing and not args.no_run:
        known |= _run_cells(missing, args)
    cells = [known[key] for key in wanted if key in known]
    facts = environment.facts()
    details = [_row(cell) for cell in cells]
    for task in tasks:
        common.print_table(
            f"{task.name}: {args.items} items",
            [
                {k: v for k, v in row.items() if k != "task"}
                for row in details
                if row["task"] == task.name
            ],
        )
    comparisons = _comparisons(cells)
    common.print_table("boe against its rivals, item by item", comparisons)
    print_facts(facts)
    print(
        "share: of valid answers, with the Wilson 95 % interval; steps, forwards, backwards, rows "
        "(of all forwards and backwards): per item, mean; NFE is forwards.\n"
        "wins, losses: items that boe solves and the rival does not, and the other way round; "
        "p: exact McNemar test; rows ratio: boe's rows over the rival's."
    )
    common.print_result(
        "policies",
        _keys(cells),
        details={"cells": details, "comparisons": comparisons},
        environment=facts,
        args=argparse.Namespace(**(vars(args) | {"cells": str(args.cells or "")})),
    )


def _keys_of_cells(tasks: Sequence[GeneratedTask], args: argparse.Namespace) -> Iterator[Key]:
    for task, name in itertools.product(tasks, args.policies):
        for budget in [1] if name in ADAPTIVE else args.budgets:
            if budget <= task.gen_length:
                yield task.name, name, budget


def _run_cells(missing: Sequence[Key], args: argparse.Namespace) -> dict[Key, Cell]:
    """Run cells, and append each to the file as soon as it is finished."""
    from tokenizers import Tokenizer

    config = checkpoint.read_config(args)
    model = checkpoint.load_model(args, config, checkpoint.read_tensors(args, config))
    tokenizer = Tokenizer.from_file(str(Path(args.model) / "tokenizer.json"))
    arena = Arena(open_loop(args, model), tokenizer, running=args.requests, seed=args.seed)
    contestants = dict(CONTESTANTS)
    cells = {}
    with tempfile.TemporaryDirectory(prefix="boe_vllm_") as folder:
        if any(name == "pc" for _, name, _ in missing):
            table = frequency_table(tokenizer, list(TASKS.values()), folder)
            contestants["pc"] = contestants["pc"] | {"frequencies": table}
        for task, name, budget in missing:
            cell = arena.contest(TASKS[task], args.items, name, contestants[name], budget)
            _append(args.cells, cell)
            common.progress(f"{cell.key}: {cell.share:.3f} in {cell.seconds:.0f} s")
            cells[cell.key] = cell
    return cells


def _row(cell: Cell) -> dict[str, Any]:
    low, high = wilson(sum(cell.valid), len(cell.valid))
    return {
        "task": cell.task,
        "policy": cell.contestant,
        "tokens/step": "own" if cell.contestant in ADAPTIVE else str(cell.tokens_per_step),
        "share": cell.share,
        "low": low,
        "high": high,
        "steps": cell.steps,
        "forwards": cell.forwards,
        "backwards": cell.backwards,
        "rows": cell.rows,
        "seconds": cell.seconds,
    }


def _comparisons(cells: Iterable[Cell]) -> list[dict[str, Any]]:
    """`boe` against every rival at the same task and budget."""
    by_key = {cell.key: cell for cell in cells}
    rows = []
    for (task, name, budget), own in by_key.items():
        if name != "boe":
            continue
        for rival in RIVALS:
            other = by_key.get((task, rival, budget))
            if other is None:
                continue
            wins, losses, p = mcnemar(own.valid, other.valid)
            rows.append(
                {
                    "task": task,
                    "tokens/step": str(budget),
                    "rival": rival,
                    "boe": own.share,
                    "its": other.share,
                    "wins": wins,
                    "losses": losses,
                    "p": p,
                    "rows ratio": own.rows / other.rows,
                    "forwards ratio": own.forwards / other.forwards,
                }
            )
    return rows


def _keys(cells: Iterable[Cell]) -> dict[str, float | None]:
    """The promised figures, from the cells that they need."""
    by_key = {cell.key: cell for cell in cells}

    def pair(task: str, rival: str, budget: int) -> tuple[Cell, Cell] | None:
        own, other = by_key.get((task, "boe", budget)), by_key.get((task, rival, budget))
        return (own, other) if own and other else None

    keys: dict[str, float | None] = {}
    for rival in ("confidence", "confident-random"):
        if both := pair(MANY_ANSWERS, rival, 4):
            name = rival.replace("-", "_")
            keys[f"policies.few_4_over_{name}"] = (
                both[0].share / both[1].share if both[1].share else math.inf
            )
            keys[f"policies.few_4_p_{name}"] = mcnemar(both[0].valid, both[1].valid)[2]
    budgets = {cell.tokens_per_step for cell in by_key.values()}
    losses = [
        mcnemar(both[0].valid, both[1].valid)[2]
        for task in ONE_ANSWER
        for budget in budgets
        if (both := pair(task, "confidence", budget)) and both[0].share < both[1].share
    ]
    if pair(ONE_ANSWER[-1], "confidence", max(budgets, default=0)):
        keys["policies.one_answer_least_p_of_a_loss"] = min(losses, default=1.0)
    plain, exact = (
        by_key.get((MANY_ANSWERS, "confidence", 4)),
        pair(MANY_ANSWERS, "pairwise exact", 4),
    )
    if plain and exact and exact[1].share > plain.share:
        gained = (exact[0].share - plain.share) / (exact[1].share - plain.share)
        keys["policies.few_4_share_of_exact_gain"] = gained
    if plain and exact:
        keys["policies.few_4_rows_over_confidence"] = exact[0].rows / plain.rows
    return keys


def _read(path: Path | None) -> list[Cell]:
    if path is None or not path.exists():
        return []
    return [Cell(**json.loads(line)) for line in path.read_text().splitlines()]


def _append(path: Path | None, cell: Cell) -> None:
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps(dataclasses.asdict(cell)) + "\n")
