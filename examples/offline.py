"""Solve puzzles with the bundled model under `confidence`, `boe` (Backward-on-Entropy) and `joint`.

    python examples/offline.py --items 60 --tokens-per-step 4

Prints the first puzzles with their answers and the order in which the cells were written, then a
table of what each policy solved and what it cost. The last line is JSON: one object per policy.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")

from tqdm import tqdm
from vllm import LLM, SamplingParams

import boe_vllm
from boe_vllm.lab.tasks import Item, Task, get_task

Line = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=boe_vllm.tiny_model_path())
    parser.add_argument("--tasks", default="sudoku6,sudoku6-few", help="comma-separated")
    parser.add_argument("--items", type=int, default=60, help="unseen items per task")
    parser.add_argument("--policies", default="confidence,boe,joint", help="comma-separated")
    parser.add_argument("--tokens-per-step", type=int, default=4)
    parser.add_argument("--show", type=int, default=1, help="items to print per task")
    args = parser.parse_args()

    llm = LLM(args.model, sampler="boe", seed=0)
    lines = [
        solve(llm, get_task(task), policy, args)
        for task in args.tasks.split(",")
        for policy in args.policies.split(",")
    ]
    print_table(lines, args)
    model = os.path.basename(args.model.rstrip("/"))
    totals = [total(policy, lines) | {"model": model} for policy in args.policies.split(",")]
    print(json.dumps(totals))


def solve(llm: LLM, task: Task, policy: str, args: argparse.Namespace) -> Line:
    """Solve the task's items under a policy, and print the first ones."""
    items = task.items(args.items, seed=0, split="test")
    start = time.perf_counter()
    outputs = llm.generate(
        [item.prompt for item in items],
        sampling_params(task, policy, args.tokens_per_step),
        use_tqdm=lambda *a, **k: tqdm(*a, **(k | {"desc": f"{policy}, {task.name}"})),
    )
    seconds = time.perf_counter() - start
    reports = [output.kv_transfer_params["boe"] for output in outputs]
    texts = [output.outputs[0].text for output in outputs]
    for item, text, report in list(zip(items, texts, reports, strict=True))[: args.show]:
        print_item(task, item, text, report)
    return {
        "task": task.name,
        "policy": policy,
        "items": len(items),
        "solved": sum(task.score(*pair).valid for pair in zip(items, texts, strict=True)),
        "forwards": sum(report["forwards"] for report in reports),
        "backwards": sum(report["backwards"] for report in reports),
        "seconds": round(seconds, 2),
    }


def sampling_params(task: Task, policy: str, tokens_per_step: int) -> SamplingParams:
    """Greedy decoding of the task's canvas under a policy, with a trace."""
    return SamplingParams(
        temperature=0.0,
        max_tokens=task.gen_length,
        extra_args={
            "policy": policy,
            "block_length": task.block_length,
            "tokens_per_step": tokens_per_step,
            "trace": True,
        },
    )


def print_item(task: Task, item: Item, text: str, report: dict) -> None:
    """The prompt, the answer, and the denoising step that wrote each token of the canvas."""
    trace = report["trace"]
    step_at = dict(zip(trace["position"], trace["step"], strict=True))
    answer = task.parse(text)
    verdict = "right" if task.score(item, text).valid else "wrong"
    print(f"{report['policy']}, {item.prompt} {answer} ({verdict})")
    side = round(len(answer) ** 0.5)
    width = side if task.name.startswith("sudoku") and side * side == len(answer) else len(answer)
    for start in range(0, len(answer), max(1, width)):
        cells = range(start, min(start + width, len(answer)))
        tokens = " ".join(f"{answer[cell]:>2}" for cell in cells)
        steps = " ".join(f"{step_at.get(cell, -1):>2}" for cell in cells)
        print(f"    {tokens}    written in step {steps}")
    print()


def print_table(lines: list[Line], args: argparse.Namespace) -> None:
    """What each policy solved and what an item cost it."""
    print(f"{args.items} unseen items of each task, {args.tokens_per_step} tokens a step")
    print(f"  {'task':12} {'policy':12} {'solved':>8} {'forwards':>9} {'backwards':>10} {'s':>6}")
    for line in lines:
        solved = f"{line['solved']}/{line['items']}"
        forwards, backwards = (line[name] / line["items"] for name in ("forwards", "backwards"))
        print(
            f"  {line['task']:12} {line['policy']:12} {solved:>8} {forwards:9.1f} "
            f"{backwards:10.1f} {line['seconds']:6.1f}"
        )
    print("  forwards and backwards: per item; a pass over few rows counts as one\n")


def total(policy: str, lines: list[Line]) -> Line:
    """One policy over all tasks."""
    own = [line for line in lines if line["policy"] == policy]
    names = ("items", "solved", "forwards", "backwards", "seconds")
    return {"policy": policy} | {name: round(sum(line[name] for line in own), 2) for name in names}


if __name__ == "__main__":
    main()
