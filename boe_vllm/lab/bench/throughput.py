"""Output tokens per second of the engine against LLaDA's public loop.

The engine serves all requests offline (`LLM.generate`), at most `--running` at a time, each with a
canvas of its own length, under confidence and Backward-on-Entropy, with and without caches. The
baseline (`bench/baseline.py`) decodes the same requests with the same weights in padded batches.
Both commit the same number of tokens per step, nothing ends early, and only tokens that were asked
for count. All of them run in one process, one after the other in an order drawn anew in each round.
A second workload of equal lengths shows what the dual cache gains.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from typing import Any

from boe_vllm.lab.bench import checkpoint, common
from boe_vllm.lab.bench.baseline import PlainLLaDA
from boe_vllm.lab.bench.engine import Engine, draw_workload
from boe_vllm.lab.bench.machine import Environment, print_facts
from boe_vllm.lab.bench.race import BASELINE, CACHES, POLICIES, Race

Rows = list[dict[str, Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.set_defaults(
        repeats=2, requests=32, prompt_len=(16, 256), gen_len=(32, 256), block_length=32
    )
    parser.add_argument("--running", type=int, default=16, help="requests at the same time")
    parser.add_argument("--tokens-per-step", type=int, default=4)
    parser.add_argument("--rho", type=float, default=0.5, help="share of candidates")
    parser.add_argument("--policies", type=common.names(list(POLICIES)), default=list(POLICIES))
    parser.add_argument("--caches", type=common.names(CACHES), default=list(CACHES))
    parser.add_argument("--equal-requests", type=int, default=8, help="of the second workload")
    parser.add_argument(
        "--equal-len",
        type=common.integers,
        default=[256, 256],
        metavar="PROMPT,GEN",
        help="lengths of the second workload",
    )
    parser.add_argument("--no-baseline", action="store_true", help="measure the engine alone")
    parser.add_argument("--no-overhead", action="store_true", help="leave out `bench overhead`")


def run(args: argparse.Namespace) -> int:
    """Measure, print the tables and the JSON line; 1 if tokens differ where they may not."""
    if len(args.equal_len) != 2:
        raise common.UsageError(f"--equal-len: expected PROMPT,GEN, got {args.equal_len}")
    environment = Environment(args.device, args.dtype, args.clock)
    config = checkpoint.read_config(args)
    tensors = checkpoint.read_tensors(args, config)
    network = PlainLLaDA(config, tensors, dtype=common.DTYPES[args.dtype], device=args.device)
    prompt, generation = args.equal_len
    longest = max(args.prompt_len[1] + args.gen_len[1], prompt + generation) + args.block_length
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.write_checkpoint(config, tensors, folder)
        engine = Engine(folder, args, max_model_len=longest, max_running=args.running)
    mixed = draw_workload(
        config,
        requests=args.requests,
        prompt_len=args.prompt_len,
        gen_len=args.gen_len,
        seed=args.seed,
    )
    equal = draw_workload(
        config,
        requests=args.equal_requests,
        prompt_len=(prompt, prompt),
        gen_len=(generation, generation),
        seed=args.seed,
    )
    race = Race(args, config, engine, network, mixed)
    race.warm_up()
    runners = [(policy, cache) for policy in args.policies for cache in args.caches]
    rows = race.run(runners, baseline=not args.no_baseline)
    agreement = None if args.no_baseline else race.check_tokens(tensors)
    ends = Race(args, config, engine, network, equal)
    cached = ends.run([("confidence", cache) for cache in args.caches], baseline=False)
    facts = environment.facts()
    overhead = None if args.no_overhead else _overhead(args)
    _print(args, rows, cached, facts, agreement)
    common.print_result(
        "throughput",
        _keys(rows, cached) | _overhead_keys(overhead),
        details={
            "mixed": rows,
            "equal lengths": cached,
            "tokens": agreement,
            "overhead": overhead["details"] if overhead else None,
        },
        environment=facts,
        args=args,
    )
    return int(agreement is not None and agreement["wrong"] > 0)


def _keys(rows: Rows, cached: Rows) -> dict[str, float | None]:
    """Ratios of tokens per second."""
    speed = {(row["policy"], row["cache"]): row["tokens/s"] for row in rows}
    ends = {row["cache"]: row["tokens/s"] for row in cached}

    def ratio(above: float | None, below: float | None) -> float | None:
        return above / below if above and below else None

    reference = speed.get((BASELINE, "none"))
    return {
        "throughput.confidence_over_baseline": ratio(speed.get(("confidence", "none")), reference),
        "throughput.boe_over_baseline_confidence": ratio(
            speed.get(("boe mask", "none")), reference
        ),
        "throughput.boe_kv_over_baseline_confidence": ratio(
            speed.get(("boe kv", "none")), reference
        ),
        "throughput.dual_over_none": ratio(ends.get("dual"), ends.get("none")),
    }


def _overhead(args: argparse.Namespace) -> dict[str, Any]:
    """`bench overhead` in a process of its own: its engine serves another model."""
    command = [sys.executable, "-m", "boe_vllm.lab.bench", "overhead"]
    command += ["--device", args.device, "--threads", str(args.threads), "--clock", args.clock]
    command += ["--repeats", str(max(3, args.repeats))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    print(done.stdout.rpartition("\n{")[0])
    return json.loads(done.stdout.splitlines()[-1])


def _overhead_keys(overhead: dict[str, Any] | None) -> dict[str, float | None]:
    return {k: v for k, v in (overhead or {}).items() if k.startswith("overhead.")}


def _print(
    args: argparse.Namespace,
    rows: Rows,
    cached: Rows,
    facts: dict[str, Any],
    agreement: dict[str, int] | None,
) -> None:
    for some in (rows, cached):
        common.add_share(some, facts)
    common.print_table(
        f"{args.requests} requests, prompts of {args.prompt_len[0]} to {args.prompt_len[1]} tokens "
        f"and {args.gen_len[0]} to {args.gen_len[1]} to generate, {args.tokens_per_step} per step",
        rows,
    )
    common.print_table(
        f"{args.equal_requests} requests, prompts of {args.equal_len[0]} tokens and "
        f"{args.equal_len[1]} to generate",
        cached,
    )
    print_facts(facts)
    print(
        f"tokens/s: tokens that were asked for over the median time of {args.repeats} rounds; "
        "prompts do not count. steps: of the engine, or of the baseline's batches. rows, GFLOP: "
        "per step, of all passes; the baseline's rows include padding and what lies behind a "
        "request's own canvas, and it computes the logits of every row. share: of the machine's "
        "matrix products.\n"
        f"Candidates are {args.rho} of the masked rows; in the last steps of a block there are as "
        "many as tokens due, and nothing is steered."
    )
    if agreement is not None:
        print(
            f"Tokens of confidence without a cache against the baseline's: {agreement['compared']} "
            f"requests have the same canvas in both; {agreement['equal']} are equal, "
            f"{agreement['ties']} part at a tie (in float64), {agreement['wrong']} differ."
        )
