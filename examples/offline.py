"""Solve puzzles with the bundled model: confidence decoding against Backward-on-Entropy.

    python examples/offline.py --items 60 --tokens-per-step 4

Prints the first puzzles with their answers and the order in which the cells were committed, then
what each policy solved and what it cost. The last line is JSON: one object per policy.
"""

from __future__ import annotations

import argparse
import json
import os
import time

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")

from tqdm import tqdm
from vllm import LLM, SamplingParams

import boe_vllm
from boe_vllm.lab.tasks import Item, Task, get_task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=boe_vllm.tiny_model_path())
    parser.add_argument("--tasks", default="sudoku6,sudoku6-few", help="comma-separated")
    parser.add_argument("--items", type=int, default=60, help="unseen items per task")
    parser.add_argument("--policies", default="confidence,boe", help="comma-separated")
    parser.add_argument("--tokens-per-step", type=int, default=4)
    parser.add_argument("--show", type=int, default=1, help="items to print per task")
    args = parser.parse_args()

    llm = LLM(args.model, sampler="boe", seed=0)
    lines = []
    for policy in args.policies.split(","):
        line = {"model": os.path.basename(args.model.rstrip("/")), "policy": policy}
        line |= dict(items=0, solved=0, forwards=0, backwards=0, seconds=0.0)
        for name in args.tasks.split(","):
            task = get_task(name)
            items = task.items(args.items, seed=0, split="test")
            start = time.perf_counter()
            outputs = llm.generate(
                [item.prompt for item in items],
                sampling_params(task, policy, args.tokens_per_step),
                use_tqdm=lambda *a, name=name, policy=policy, **k: tqdm(
                    *a, **(k | {"desc": f"{policy}, {name}"})
                ),
            )
            seconds = time.perf_counter() - start
            reports = [output.kv_transfer_params["boe"] for output in outputs]
            texts = [output.outputs[0].text for output in outputs]
            solved = sum(task.score(*pair).valid for pair in zip(items, texts, strict=True))
            for item, text, report in list(zip(items, texts, reports, strict=True))[: args.show]:
                print_item(task, item, text, report)
            forwards = sum(report["forwards"] for report in reports)
            backwards = sum(report["backwards"] for report in reports)
            print(
                f"{policy:>12} on {name}: {solved}/{len(items)} solved, "
                f"{forwards / len(items):.1f} forwards and {backwards / len(items):.1f} backwards "
                f"an item, {seconds:.1f} s\n"
            )
            line["items"] += len(items)
            line["solved"] += solved
            line["forwards"] += forwards
            line["backwards"] += backwards
            line["seconds"] = round(line["seconds"] + seconds, 2)
        lines.append(line)
    print(json.dumps(lines))


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
    """The prompt, the answer, and the denoising step that committed each token of the canvas."""
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
        print(f"    {tokens}    committed in step {steps}")


if __name__ == "__main__":
    main()
