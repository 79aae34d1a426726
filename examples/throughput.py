"""Tokens a second, offline: a model and a policy against another, or against LLaDA's public loop.

    python examples/throughput.py                                  # boe against the public loop
    python examples/throughput.py --policy boe --against confidence
    python examples/throughput.py --model PATH --policy boe:rho=0.5 --against loop --prompt-len 256
    python examples/throughput.py --model PATH --policy boe --against-model PATH --against boe

Both decode the same requests in this process, in turn and in an order drawn anew in every round;
times are medians over the rounds. The public loop (`boe_vllm.lab.bench.baseline`, after
ML-GSAI/LLaDA's `generate.py`) decodes padded batches with dense attention; the engine batches
continuously. Nothing ends early, and only tokens that were asked for count. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from safetensors.torch import load_file
from vllm import LLM, SamplingParams

import boe_vllm
from boe_vllm.lab.bench.baseline import PlainLLaDA, decode_all
from boe_vllm.lab.eval.variants import Variant, parse
from boe_vllm.lab.tasks import TASKS
from boe_vllm.models.llada import LLaDAConfig

LOOP = "loop"
COSTS = ("forwards", "backwards", "rows_forward", "rows_backward")
Costs = dict[str, float]
Decode = Callable[[], Costs]


def main() -> None:
    args = arguments()
    prompts, length = workload(args)
    engines: dict[str, LLM] = {}
    first = f"{args.policy} on {name_of(args.model)}"
    second = f"{args.against} on {name_of(args.against_model)}"
    if first == second:
        raise SystemExit(f"--against: expected another policy or model, got {second} twice")
    contestants = {
        first: contestant(args.model, args.policy, engines, prompts, length, args),
        second: contestant(args.against_model, args.against, engines, prompts, length, args),
    }
    costs = {name: decode() for name, decode in contestants.items()}  # which also warms up
    times: dict[str, list[float]] = {name: [] for name in contestants}
    order, rng = list(contestants), random.Random(0)
    for _ in range(args.rounds):
        rng.shuffle(order)
        for name in order:
            start = time.perf_counter()
            contestants[name]()
            times[name].append(time.perf_counter() - start)
    report(args, length, costs, {name: statistics.median(t) for name, t in times.items()})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=boe_vllm.TINY, help="a folder, or tiny: the bundled one")
    parser.add_argument("--policy", default="boe", help="with settings if wanted: boe:rho=0.5")
    parser.add_argument("--against", default=LOOP, help="another policy, or loop: the public one")
    parser.add_argument("--against-model", metavar="MODEL", help="default: the same model")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens-per-step", type=int, default=4)
    parser.add_argument("--block-length", type=int, help="default: the canvas, at most 32")
    parser.add_argument("--task", choices=TASKS, help="puzzles as prompts; default with tiny")
    parser.add_argument("--prompt-len", type=int, default=128, help="of random prompts, otherwise")
    parser.add_argument("--gen-len", type=int, default=128, help="tokens to generate for them")
    parser.add_argument("--batch", type=int, default=16, help="requests of one batch of the loop")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    args.against_model = args.against_model or args.model
    if args.task is None and args.model == boe_vllm.TINY:
        args.task = "sudoku6"
    return args


def workload(args: argparse.Namespace) -> tuple[list[list[int]], int]:
    """Prompts as token ids, and the tokens that each request asks for."""
    config = LLaDAConfig.from_pretrained(boe_vllm.model_path(args.model))
    if args.task is None:
        rng = random.Random(0)
        words = [t for t in range(config.vocab_size) if t != config.mask_token_id]
        return [rng.choices(words, k=args.prompt_len) for _ in range(args.requests)], args.gen_len
    from tokenizers import Tokenizer

    task = TASKS[args.task]
    tokenizer = Tokenizer.from_file(f"{boe_vllm.model_path(args.model)}/tokenizer.json")
    items = task.items(args.requests, seed=0, split="test")
    return [tokenizer.encode(item.prompt).ids for item in items], task.gen_length


def contestant(
    model: str,
    policy: str,
    engines: dict[str, LLM],
    prompts: list[list[int]],
    length: int,
    args: argparse.Namespace,
) -> Decode:
    """A function that decodes all requests and says what they cost, per request."""
    path = boe_vllm.model_path(model)
    block = args.block_length or min(length, 32)
    if args.block_length is None and args.task is not None:
        block = TASKS[args.task].block_length
    if policy == LOOP:
        return public_loop(path, prompts, length, block, args)
    if path not in engines:
        engines[path] = LLM(path, disable_log_stats=True)
    fields = {"block_length": block, "tokens_per_step": args.tokens_per_step}
    return engine_decode(engines[path], parse(policy), prompts, length, fields)


def engine_decode(
    llm: LLM, policy: Variant, prompts: list[list[int]], length: int, fields: dict[str, Any]
) -> Decode:
    params = SamplingParams(
        temperature=0.0,
        max_tokens=length,
        ignore_eos=True,
        detokenize=False,
        extra_args=fields | policy.fields,
    )

    def decode() -> Costs:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
        )
        assert all(len(output.outputs[0].token_ids) == length for output in outputs)
        reports = [output.kv_transfer_params["boe"] for output in outputs]
        return {name: sum(r[name] for r in reports) / len(reports) for name in COSTS}

    return decode


def public_loop(
    path: str, prompts: list[list[int]], length: int, block: int, args: argparse.Namespace
) -> Decode:
    config = LLaDAConfig.from_pretrained(path)
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        tensors |= load_file(file)
    dtype = next(iter(tensors.values())).dtype
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = PlainLLaDA(config, tensors, dtype=dtype, device=device)

    def decode() -> Costs:
        decoded = decode_all(
            network,
            prompts,
            [length] * len(prompts),
            block_length=block,
            tokens_per_step=args.tokens_per_step,
            batch=args.batch,
        )
        canvas = len(decoded[0].canvas)
        steps = canvas // block * -(-block // args.tokens_per_step)
        # Every row of a batch, padding among them, goes through every step.
        padded = [
            max(map(len, prompts[n : n + args.batch])) for n in range(0, len(prompts), args.batch)
        ]
        rows = statistics.fmean(padded[n // args.batch] + canvas for n in range(len(prompts)))
        return dict(zip(COSTS, (steps, 0, steps * rows, 0), strict=True))

    return decode


def report(
    args: argparse.Namespace, length: int, costs: dict[str, Costs], seconds: dict[str, float]
) -> None:
    """A table for people, and the JSON line."""
    tokens = args.requests * length
    lines = [
        {"name": name, "tokens_per_second": tokens / seconds[name], "seconds": seconds[name]}
        | costs[name]
        for name in costs
    ]
    what = args.task or f"prompts of {args.prompt_len} random tokens"
    print(f"{args.requests} requests ({what}), {length} tokens each, {args.tokens_per_step} a step")
    width = max(map(len, costs))
    for line in lines:
        rows = line["rows_forward"] + line["rows_backward"]
        print(
            f"  {line['name']:<{width}}  {line['tokens_per_second']:8.1f} tokens/s; per request "
            f"{line['forwards']:.1f} forwards, {line['backwards']:.1f} backwards, {rows:.0f} rows"
        )
    ratio = lines[0]["tokens_per_second"] / lines[1]["tokens_per_second"]
    print(f"  {lines[0]['name']} is {ratio:.2f} times as fast")
    print(json.dumps({"ratio": ratio, "tokens": tokens, "contestants": lines}))


def name_of(model: str) -> str:
    return os.path.basename(model.rstrip("/"))


if __name__ == "__main__":
    main()
