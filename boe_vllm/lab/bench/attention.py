"""Active-query attention, forward and backward, against dense attention.

Dense is PyTorch's fused `scaled_dot_product_attention` over a batch of equal sequences, its
backward by autograd. Ours runs over the same sequences packed, with a share of the rows active: the
forward computes every row, the backward only what active rows need (gradients of their queries,
and of the keys and values of active rows, against all keys).
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from boe_vllm.attention import AttentionLayout, attention_backward, attention_forward
from boe_vllm.lab.bench import checkpoint, common
from boe_vllm.lab.bench.machine import Environment, print_facts

FRACTIONS = (0.0625, 0.25, 0.5, 1.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.set_defaults(repeats=7, requests=8)
    parser.add_argument("--lengths", type=common.integers, help="default: 256,1024,4096")


def run(args: argparse.Namespace) -> None:
    """Measure, print the table and the JSON line."""
    environment = Environment(args.device, args.dtype, args.clock)
    config = checkpoint.read_config(args)
    details = []
    for length in common.step_lengths(args, [256, 1024, 4096], args.block_length or 32):
        common.progress(f"{length} positions")
        cases = _cases(args, config, length)
        times = common.interleaved(cases, args)
        details += _summary(times, config, args, length)
    facts = environment.facts()
    common.add_share(details, facts)
    common.print_table(
        f"Attention of {args.requests} sequences, {config.n_heads} heads of "
        f"{config.d_model // config.n_heads}; milliseconds",
        details,
    )
    print_facts(facts)
    print(
        "active: share of the rows whose queries pass a gradient. speedup: dense over ours, of the "
        "backward alone and of forward and backward together, medians of the ratios within a "
        f"round, {args.repeats} rounds.\n"
        "GFLOP/s counts 10 L D per row of a dense backward and (6 L + 4 A) D per active row of "
        "ours, D the width; share: of the machine's matrix products."
    )
    ratios = {(row["length"], row["active"]): row["backward speedup"] for row in details}
    keys = {"attention.backward_speedup_1024_0.25": ratios.get((1024, 0.25))}
    common.print_result("attention", keys, details=details, environment=facts, args=args)


def _cases(
    args: argparse.Namespace, config: Any, length: int
) -> dict[str, Callable[[], Callable[[], Any]]]:
    """Dense forward and backward, our forward, and our backward for every active share."""
    device, dtype = torch.device(args.device), common.DTYPES[args.dtype]
    heads, size = config.n_heads, config.d_model // config.n_heads
    scale = size**-0.5
    generator = torch.Generator(device=device).manual_seed(args.seed)
    shape = (4, args.requests * length, heads, size)
    packed = torch.randn(shape, generator=generator, device=device).to(dtype).unbind()
    q, k, v, do = packed
    batched = [x.unflatten(0, (args.requests, length)).transpose(1, 2).contiguous() for x in packed]
    bq, bk, bv, bdo = batched
    leaves = [x.clone().requires_grad_() for x in (bq, bk, bv)]
    output = F.scaled_dot_product_attention(leaves[0], leaves[1], leaves[2], scale=scale)
    full = (length,) * args.requests
    whole = AttentionLayout(q_seqlens=full, kv_seqlens=full, active_seqlens=full)

    def dense_forward() -> Any:
        with torch.no_grad():
            return F.scaled_dot_product_attention(bq, bk, bv, scale=scale)

    def dense_backward() -> Any:
        return torch.autograd.grad(output, leaves, bdo, retain_graph=True)

    def forward() -> Any:
        return attention_forward(q, k, v, layout=whole, scale=scale)

    cases: dict[str, Callable[[], Callable[[], Any]]] = {
        "dense forward": common.ready(dense_forward),
        "dense backward": common.ready(dense_backward),
        "forward": common.ready(forward),
    }
    for share in FRACTIONS:
        active = (max(1, round(share * length)),) * args.requests
        layout = AttentionLayout(q_seqlens=full, kv_seqlens=full, active_seqlens=active)
        index = layout.active_index(device)
        backward = functools.partial(
            attention_backward, do[index], q[index], k, v, layout=layout, scale=scale
        )
        cases[f"backward {share}"] = common.ready(backward)
    return cases


def _summary(
    times: dict[str, list[float]], config: Any, args: argparse.Namespace, length: int
) -> list[dict[str, Any]]:
    rows = []
    forward = common.median(times["forward"])
    per_row = args.requests * config.d_model
    for share in FRACTIONS:
        active = max(1, round(share * length))
        ours = times[f"backward {share}"]
        together = [f + b for f, b in zip(times["forward"], ours, strict=True)]
        dense = [
            f + b for f, b in zip(times["dense forward"], times["dense backward"], strict=True)
        ]
        work = per_row * active * (6 * length + 4 * active)
        rows.append(
            {
                "length": length,
                "active": share,
                "dense forward": common.median(times["dense forward"]) * 1e3,
                "dense backward": common.median(times["dense backward"]) * 1e3,
                "forward": forward * 1e3,
                "backward": common.median(ours) * 1e3,
                "backward speedup": common.median_ratio(times["dense backward"], ours),
                "speedup": common.median_ratio(dense, together),
                "dense GFLOP/s": 10
                * per_row
                * length**2
                / common.median(times["dense backward"])
                / 1e9,
                "GFLOP/s": work / common.median(ours) / 1e9,
            }
        )
    return rows
