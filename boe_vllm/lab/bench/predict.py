"""What a step of each policy would take on a GPU, and what it would wait for.

The passes of each policy are counted on real decodes of a small network (`--states`): random
weights at the given lengths, which are never sure and so ask most often, or the bundled checkpoint
on its own puzzles, at their lengths. From passes, rows, launches and copies, the network's sizes
and the machine's ceilings follows the time of a step (`boe_vllm/lab/bench/costs.py`), as a mean
over the steps of one block. Nothing runs on a GPU.

Policies with a number of tokens of their own make fewer or more steps than the others, so that
their steps cannot be compared. For puzzles, which are decoded to their ends, the time of an answer
is printed as well: that of all steps of a batch, divided by its requests.

`--check FILE` compares with what `scripts/gpu_check.py` has measured, its JSON lines.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import boe_vllm
from boe_vllm.lab.bench import common, costs
from boe_vllm.lab.bench.ceilings import CARDS, Ceilings
from boe_vllm.lab.bench.checkpoint import read_llada
from boe_vllm.lab.bench.costs import Network, Prediction
from boe_vllm.lab.bench.counted import Lengths, count_puzzles, count_random, puzzles
from boe_vllm.lab.bench.launches import CODES, CURRENT, Code
from boe_vllm.lab.bench.passes import Step, layer_passes, layer_rows
from boe_vllm.lab.bench.predict_check import compare
from boe_vllm.lab.bench.scenarios import STEPS
from boe_vllm.models.llada import LLaDAConfig

COMMON_OPTIONS = False
"""Nothing is timed here, so that the other benchmarks' options mean nothing."""
MODELS = {"llada-8b": LLaDAConfig(mlp_hidden_size=12288)}
BASE = "confidence"
LIMIT = 1.5
"""Times a confidence step, from which on a default is said to be dear at one request."""
DEFAULTS = ("joint", "joint adaptive", "boe")
CACHES = ("none", "prefix", "dual")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument(
        "--model", default="llada-8b", help="llada-8b, tiny, or a checkpoint's folder"
    )
    parser.add_argument("--device", choices=sorted(CARDS), default="h200")
    parser.add_argument("--requests", type=common.integers, default=[1, 8, 25, 64])
    known = list(STEPS)
    parser.add_argument(
        "--policies", type=common.names(known), default=known[:8], help=f"out of {known}"
    )
    parser.add_argument("--caches", type=common.names(CACHES), default=["none", "dual"])
    parser.add_argument("--states", choices=("random", "puzzles"), default="random")
    parser.add_argument(
        "--code",
        choices=sorted(CODES),
        default=CURRENT,
        help="whose launches and bytes: the package's as it is (default), or another's",
    )
    parser.add_argument("--prompt-len", type=int, default=224)
    parser.add_argument("--gen-len", type=int, default=128)
    parser.add_argument("--block-length", type=int, default=32)
    parser.add_argument("--tokens-per-step", type=int, default=4)
    parser.add_argument("--check", type=Path, metavar="FILE", help="JSON lines of a GPU's check")


def run(args: argparse.Namespace) -> None:
    """Print the tables, or the comparison with what was measured."""
    ceilings, network = CARDS[args.device], Network.of(_config(args.model))
    if args.check is not None:
        compared = compare(args.check, network, ceilings)
        common.print_table(
            f"{args.check.name}, predicted by the rates of {ceilings.name}", compared
        )
        _finish({"predict.worst": max(_off(row["of it"]) for row in compared)}, compared, args)
        return
    rows = []
    for requests in args.requests:
        part = _table(requests, network, ceilings, args)
        common.print_table(_title(requests, args), part)
        rows += [{"requests": requests, **row} for row in part]
    keys = {
        f"predict.{row['policy'].replace(' ', '_')}_over_confidence": row["ratio"]
        for row in rows
        if row["requests"] == 1 and row["cache"] == "none" and row["policy"] != BASE
    }
    _explain(ceilings, keys, args)
    _finish(keys, rows, args)


def _finish(keys: dict[str, float | None], details: Any, args: argparse.Namespace) -> None:
    common.print_result(
        "predict",
        keys,
        details=details,
        environment={"ceilings": CARDS[args.device].name, "boe_vllm": boe_vllm.__version__},
        args=argparse.Namespace(**(vars(args) | {"check": args.check and str(args.check)})),
    )


def _off(ratio: float) -> float:
    """How many times too large or too small, at least 1."""
    return max(ratio, 1 / ratio)


def _config(name: str) -> LLaDAConfig:
    if name in MODELS:
        return MODELS[name]
    try:
        return read_llada(boe_vllm.model_path(name))
    except ValueError as error:
        raise common.UsageError(f"--model: expected one of {list(MODELS)}, or: {error}") from error


def _table(
    requests: int, network: Network, ceilings: Ceilings, args: argparse.Namespace
) -> list[dict[str, Any]]:
    rows, code = [], CODES[args.code]
    for cache in args.caches:
        plain = None
        for name in sorted(args.policies, key=lambda name: name != BASE):
            steps = _counted(name, cache, requests, args)
            predicted = costs.mean([costs.predict(step, network, ceilings, code) for step in steps])
            if name == BASE:
                plain = predicted
            row = _row(name, cache, steps, predicted, plain, network, code)
            if args.states == "puzzles":
                answers = puzzles(requests)
                row["steps an answer"] = len(steps) * requests / answers
                row["ms an answer"] = predicted.seconds * 1e3 * len(steps) / answers
            rows.append(row)
    return rows


def _counted(name: str, cache: str, requests: int, args: argparse.Namespace) -> list[Step]:
    fields = STEPS[name] if cache == "none" else {**STEPS[name], "cache": cache}
    if args.states == "puzzles":
        return count_puzzles(fields, requests, args.tokens_per_step)
    lengths = Lengths(
        prompt=args.prompt_len,
        canvas=args.gen_len,
        block=args.block_length,
        tokens_per_step=args.tokens_per_step,
    )
    return count_random(fields, requests, lengths)


def _row(
    name: str,
    cache: str,
    steps: Sequence[Step],
    predicted: Prediction,
    plain: Prediction | None,
    network: Network,
    code: Code,
) -> dict[str, Any]:
    """One line of a table; passes, rows and launches are means over the steps."""
    many = len(steps)
    rounds = [passes for step in steps for passes in step if passes]
    launches = sum(costs.round_launches(passes, network, code) for passes in rounds)
    return {
        "policy": name,
        "cache": cache,
        "passes": sum(map(layer_passes, steps)) / many,
        "rows": sum(map(layer_rows, steps)) / many,
        "rounds": len(rounds) / many,
        "launches": launches / many,
        "ms": predicted.seconds * 1e3,
        "ratio": predicted.seconds / plain.seconds if plain else None,
        "device ms": predicted.busy * 1e3,
        "binds": predicted.binds,
    }


def _title(requests: int, args: argparse.Namespace) -> str:
    work = f"{args.prompt_len} + {args.gen_len} tokens, blocks of {args.block_length}"
    if args.states == "puzzles":
        work = "puzzles of the bundled checkpoint at their own lengths"
    many = f"{requests} request{'s' * (requests > 1)}"
    return f"{many}, {work}, {args.tokens_per_step} tokens a step, {args.model} on {args.device}"


def _explain(ceilings: Ceilings, keys: dict[str, float | None], args: argparse.Namespace) -> None:
    print(
        f"\npasses: through all layers, of one step of all requests together; rows: of these; "
        f"rounds: times that the host waits for numbers.\n"
        f"ratio: to {BASE} with the same cache; device ms: in which the device works; "
        f"binds: what most of the step waits for.\n"
        f"{ceilings.name}: {ceilings.copy / 1e12:.1f} TB/s, {ceilings.flops / 1e12:.0f} TFLOP/s, "
        f"{ceilings.launch * 1e6:.1f} us a launch, {ceilings.blocking_copy * 1e6:.0f} us a "
        f"blocking copy."
    )
    for key, ratio in keys.items():
        name = key.removeprefix("predict.").removesuffix("_over_confidence").replace("_", " ")
        if ratio is not None and name in DEFAULTS:
            side = "above" if ratio > LIMIT else "within"
            print(
                f"{name} at one request and {args.tokens_per_step} tokens a step: predicted at "
                f"{ratio:.2f} times a {BASE} step, {side} {LIMIT}."
            )
