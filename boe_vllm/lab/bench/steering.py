"""What steering adds to a denoising step.

For every way to steer: the time of one step and its ratio to a confidence step, as a mean over the
decode of a whole block, from all of its rows masked down to one, one token per step. Steps are
measured at some numbers of masked rows (`--every` takes all) and interpolated linearly in between;
measured are both ends, the middle, and both sides of the point below which a single candidate is
left and the step steers nothing. Ratios are formed within a round, where all ways to steer run one
after the other on the same states, and the median over the rounds counts.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from boe_vllm.lab.bench import checkpoint, common
from boe_vllm.lab.bench.baseline import PlainLLaDA
from boe_vllm.lab.bench.dense import dense_boe_step
from boe_vllm.lab.bench.flops import NetworkFlops
from boe_vllm.lab.bench.machine import Environment, print_facts
from boe_vllm.lab.bench.parts import times_by_part
from boe_vllm.lab.bench.states import (
    DENSE,
    VARIANTS,
    State,
    candidates_of,
    draw_state,
    one_step,
    open_loop,
    rows_of,
    variant_fields,
)

PLAIN = "confidence"
WARM_UP = 3
"""First rounds at a new length, until the heap has grown to what the steps need."""
Times = dict[str, dict[int, list[float]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    known = [*VARIANTS, DENSE]
    parser.set_defaults(repeats=5, requests=8)
    parser.add_argument("--lengths", type=common.integers, help="default: 256,512,1024")
    parser.add_argument("--blocks", type=common.integers, help="default: 32,64")
    parser.add_argument("--variants", type=common.names(known), default=known)
    parser.add_argument("--rho", type=float, default=0.25, help="share of candidates")
    parser.add_argument("--every", action="store_true", help="measure at every number of masks")
    parser.add_argument(
        "--parts",
        action="store_true",
        help="where a step's time goes with half a block masked, of the first length and block",
    )


def run(args: argparse.Namespace) -> None:
    """Measure, print the tables and the JSON line."""
    if args.parts and args.device != "cpu":
        raise common.UsageError(f"--parts: expected --device cpu beside it, got {args.device}")
    environment = Environment(args.device, args.dtype, args.clock)
    config = checkpoint.read_config(args)
    tensors = checkpoint.read_tensors(args, config)
    loop = open_loop(args, checkpoint.load_model(args, config, tensors))
    dtype = next(loop.model.parameters()).dtype
    dense = PlainLLaDA(config, tensors, dtype=dtype, device=args.device)
    flops = NetworkFlops(config)
    blocks = args.blocks or ([args.block_length] if args.block_length else [32, 64])
    details: list[dict[str, Any]] = []
    keys: dict[str, float] = {}
    for block in blocks:
        for length in common.step_lengths(args, [256, 512, 1024], block):
            if length <= block:
                raise common.UsageError(f"--lengths: expected more than a block of {block}")
            times: Times = {name: {} for name in dict.fromkeys([PLAIN, *args.variants])}
            counts = range(1, block + 1) if args.every else sampled_counts(block, args.rho)
            for masked in counts:
                state = _state(config, length, block, masked, args)
                measured = common.interleaved(
                    {name: _case(name, loop, dense, state, args.rho) for name in times},
                    args,
                    seed=masked,
                    warm_up=1 if times[PLAIN] else WARM_UP,
                )
                for name, values in measured.items():
                    times[name][masked] = values
            common.progress(f"block {block}, {length} positions: measured at {list(counts)} masked")
            rows = _summary(times, flops, length, block, args)
            details += rows
            keys |= _keys(rows, length, block)
    facts = environment.facts()
    common.add_share(details, facts)
    for length, block in dict.fromkeys((row["length"], row["block"]) for row in details):
        common.print_table(
            f"One step of {args.requests} requests of {length} positions, mean over the decode of "
            f"a block of {block}",
            [
                {k: v for k, v in row.items() if k not in ("length", "block")}
                for row in details
                if (row["length"], row["block"]) == (length, block)
            ],
        )
    if args.parts:
        _print_parts(loop, config, details[0]["length"], blocks[0], args)
    _explain(facts, config, flops, args)
    common.print_result("steering", keys, details=details, environment=facts, args=args)


def _print_parts(loop: Any, config: Any, length: int, block: int, args: argparse.Namespace) -> None:
    masked = max(1, block // 2)
    state = _state(config, length, block, masked, args)
    names = dict.fromkeys([PLAIN, *(name for name in args.variants if name != DENSE)])
    cases = {
        name: functools.partial(one_step, loop, state, variant_fields(name, args.rho))
        for name in names
    }
    common.print_table(
        f"Where the time of a step goes, {length} positions, {masked} of {block} masked",
        times_by_part(cases, 3 * args.repeats),
    )


def _state(config: Any, length: int, block: int, masked: int, args: argparse.Namespace) -> State:
    return draw_state(
        config,
        requests=args.requests,
        length=length,
        block=block,
        masked=masked,
        seed=args.seed,
    )


def sampled_counts(block: int, rho: float) -> list[int]:
    """Numbers of masked rows that determine a function linear on either side of the edge."""
    edge = max(m for m in range(1, block + 1) if math.ceil(rho * m) <= 1)
    return sorted({1, edge, min(edge + 1, block), max(1, block // 2), block})


def block_mean(times: Mapping[int, float], block: int) -> float:
    """Mean over 1 .. block masked rows of times known at some of them."""
    known = sorted(times)
    everywhere = np.interp(np.arange(1, block + 1), known, [times[m] for m in known])
    return float(everywhere.mean())


def _case(
    name: str, loop: Any, dense: PlainLLaDA, state: State, rho: float
) -> Callable[[], Callable[[], Any]]:
    if name != DENSE:
        return lambda: one_step(loop, state, variant_fields(name, rho))
    tokens = torch.from_numpy(state.tokens).to(dense.device)
    masked = torch.from_numpy(state.masked).to(dense.device)
    return lambda: lambda: dense_boe_step(dense, tokens, masked, rho=rho)


def _summary(
    times: Times, flops: NetworkFlops, length: int, block: int, args: argparse.Namespace
) -> list[dict[str, Any]]:
    def means(name: str) -> list[float]:
        rounds = range(args.repeats)
        return [block_mean({m: t[r] for m, t in times[name].items()}, block) for r in rounds]

    plain = means(PLAIN)
    rows = []
    for name in times:
        own = means(name)
        work = block_mean({m: _flops(name, flops, length, m, args) for m in times[name]}, block)
        count = block_mean({m: _rows(name, length, m, args) for m in times[name]}, block)
        ratios = [a / b for a, b in zip(own, plain, strict=True)]
        rows.append(
            {
                "step": name,
                "length": length,
                "block": block,
                "ms": common.median(own) * 1e3,
                "ratio": common.median(ratios),
                "spread": max(ratios) - min(ratios),
                "rows": count * args.requests,
                "GFLOP": work * args.requests / 1e9,
                "GFLOP/s": work * args.requests / 1e9 / common.median(own),
            }
        )
    for row in rows:
        row["GFLOP ratio"] = row["GFLOP"] / rows[0]["GFLOP"]
    return rows


def _rows(name: str, length: int, masked: int, args: argparse.Namespace) -> float:
    """Rows of all passes of one request's step."""
    rows = rows_of(length, masked, _fields(name, args))
    return rows.live + rows.kept + rows.second


def _flops(
    name: str, flops: NetworkFlops, length: int, masked: int, args: argparse.Namespace
) -> float:
    return flops.step(rows_of(length, masked, _fields(name, args)))


def _fields(name: str, args: argparse.Namespace) -> dict[str, Any]:
    return variant_fields("inject exact, all" if name == DENSE else name, args.rho)


def _keys(rows: Sequence[Mapping[str, Any]], length: int, block: int) -> dict[str, float]:
    """The promised keys, from the settings that they are promised for."""
    ratios = {row["step"]: row["ratio"] for row in rows}
    keys = {}
    if (length, block) == (256, 32):
        for name in ("mask", "kv", DENSE):
            if name in ratios:
                keys[f"steering.{name}_over_confidence"] = ratios[name]
    if (length, block) == (1024, 64) and "mask" in ratios:
        keys["steering.mask_over_confidence_1024"] = ratios["mask"]
    return keys


def _explain(facts: dict[str, Any], config: Any, flops: NetworkFlops, args: Any) -> None:
    print_facts(facts)
    edge = max(
        m for m in range(1, 1000) if not candidates_of(m, {"policy": "boe", "rho": args.rho})
    )
    print(
        f"ratio: to a confidence step in the same round, median of {args.repeats} rounds; spread: "
        f"largest less smallest of them.\n"
        f"rows: of all forwards and backwards of a step; a row costs {flops.row / 1e6:,.1f} MFLOP "
        f"in the layers and {flops.vocabulary / 1e6:,.1f} against {config.vocab_size:,} tokens. "
        f"With rho = {args.rho} the last {edge} steps of a block steer nothing.\n"
        f"GFLOP ratio: what the ratio would be if every product ran at the same speed; share: of "
        f"the machine's matrix products.\n"
        f"dense: two forwards of all rows and autograd through all of them (bench/dense.py)."
    )
