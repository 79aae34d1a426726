"""What the benchmarks share: options, interleaved timing, tables, and the final JSON line."""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

import boe_vllm
from boe_vllm.base.process_memory import keep_freed_memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class UsageError(ValueError):
    """Options that do not fit each other."""


# ---- options -----------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of every benchmark; each sets its own defaults for the sizes of the work."""
    model = parser.add_argument_group("model")
    model.add_argument("--model", help="a checkpoint's folder, or tiny: the bundled one")
    model.add_argument("--d-model", type=int, default=512, help="width of the random model")
    model.add_argument("--layers", type=int, default=8)
    model.add_argument("--heads", type=int, default=8)
    model.add_argument("--mlp", type=int, help="width of the MLP; default: 4 times the model's")
    model.add_argument("--vocab", type=int, default=32000)
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="cpu", help="cpu or cuda")
    machine.add_argument(
        "--dtype", choices=sorted(DTYPES), help="default: bfloat16 on cuda, else float32"
    )
    machine.add_argument("--threads", type=int, help="default: torch's own number")
    machine.add_argument(
        "--clock",
        choices=sorted(CLOCKS),
        default="wall",
        help="cpu: this process's processor time, for a machine that is not quiet; one thread only",
    )
    work = parser.add_argument_group("work")
    work.add_argument("--requests", type=int, default=8)
    work.add_argument("--prompt-len", type=span, metavar="N or LOW,HIGH")
    work.add_argument("--gen-len", type=span, metavar="N or LOW,HIGH")
    work.add_argument("--block-length", type=int)
    work.add_argument("--repeats", type=int, default=5, help="rounds of interleaved measurements")
    work.add_argument("--seed", type=int, default=0)


def checked(args: argparse.Namespace) -> argparse.Namespace:
    """Complete the common options and apply the threads.

    Raises:
        UsageError: for a device that is not there or a number that is not positive.
    """
    for name in ("requests", "repeats", "d_model", "layers", "heads", "vocab"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')}: expected at least 1")
    try:
        device = torch.device(args.device)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device: expected cpu or cuda, got {args.device!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device: got cuda, but torch sees no CUDA device; use --device cpu")
    if args.dtype is None:
        args.dtype = "bfloat16" if device.type == "cuda" else "float32"
    if args.model is not None:
        args.model = boe_vllm.model_path(args.model)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    args.threads = torch.get_num_threads()
    if device.type == "cpu":
        keep_freed_memory()  # as our worker does
    if args.clock == "cpu" and (args.threads > 1 or device.type != "cpu"):
        raise UsageError("--clock cpu: expected --device cpu and --threads 1")
    return args


def span(text: str) -> tuple[int, int]:
    """`N` or `LOW,HIGH`, both ends included."""
    numbers = integers(text)
    if len(numbers) not in (1, 2) or numbers[0] > numbers[-1]:
        raise argparse.ArgumentTypeError(f"expected N or LOW,HIGH, got {text!r}")
    return numbers[0], numbers[-1]


def integers(text: str) -> list[int]:
    """`A,B,C` as positive numbers."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"expected positive numbers A,B,..., got {text!r}")
    return numbers


def names(known: Sequence[str]) -> Callable[[str], list[str]]:
    """A parser for `a,b,...` out of the known names."""

    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        for name in chosen:
            if name not in known:
                raise argparse.ArgumentTypeError(f"expected names out of {known}, got {name!r}")
        return chosen

    return parse


def step_lengths(args: argparse.Namespace, default: Sequence[int], block: int) -> list[int]:
    """Sequence lengths of a benchmark of single steps: `--lengths`, or prompt and generation."""
    if args.lengths is not None:
        return args.lengths
    if args.prompt_len is not None:
        return [args.prompt_len[1] + (args.gen_len[1] if args.gen_len else block)]
    return list(default)


# ---- timing ------------------------------------------------------------------------------------


def seconds(work: Callable[[], Any], device: torch.device, clock: str = "wall") -> float:
    """Time of one call, up to the end of what it put on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    now = CLOCKS[clock]
    start = now()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return now() - start


def watched(
    work: Callable[..., Any], note: Callable[[float], None], now: Callable[[], float]
) -> Callable[..., Any]:
    """`work`, which tells `note` after every call how many seconds it took on the clock `now`."""

    @functools.wraps(work)
    def call(*args: Any, **kwargs: Any) -> Any:
        start = now()
        try:
            return work(*args, **kwargs)
        finally:
            note(now() - start)

    return call


def ready(work: Callable[[], Any]) -> Callable[[], Callable[[], Any]]:
    """A case that has nothing to prepare."""
    return lambda: work


def interleaved(
    cases: Mapping[str, Callable[[], Callable[[], Any]]],
    args: argparse.Namespace,
    *,
    seed: int = 0,
    warm_up: int = 1,
    tell: bool = False,
) -> dict[str, list[float]]:
    """Times of every case, seconds, one per round.

    A round runs each case once, in an order drawn anew, so that whatever else the machine does
    falls on all of them alike and none always follows the same other one.

    Args:
        cases: name -> a function that prepares a run (not timed) and returns the work (timed).
        args: the common options: rounds (`repeats`), device and clock.
        seed: of the order.
        warm_up: first rounds that are not counted.
        tell: report every run, where they are long.
    """
    device = torch.device(args.device)
    rng = np.random.default_rng(seed)
    keys = list(cases)
    times: dict[str, list[float]] = {name: [] for name in keys}
    for round_number in range(-warm_up, args.repeats):
        for place in rng.permutation(len(keys)):
            name = keys[place]
            elapsed = seconds(cases[name](), device, args.clock)
            if tell:
                progress(f"round {round_number + 1} of {args.repeats}: {name}, {elapsed:.1f} s")
            if round_number >= 0:
                times[name].append(elapsed)
    return times


def median(values: Sequence[float]) -> float:
    """The middle value."""
    return statistics.median(values)


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return median([a / b for a, b in zip(above, below, strict=True)])


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of a straight line through the logarithms: `value ~ size ** exponent`."""
    if len(sizes) < 2 or min(values) <= 0:
        return math.nan
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


# ---- output ------------------------------------------------------------------------------------


def progress(text: str) -> None:
    """A line for whoever waits, apart from the results."""
    print(text, file=sys.stderr, flush=True)


def add_share(rows: Sequence[dict[str, Any]], facts: Mapping[str, Any]) -> None:
    """Beside GFLOP/s, its share of the machine's matrix products."""
    for row in rows:
        row["share"] = row["GFLOP/s"] / facts["matmul_peak_gflops"]


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table for people: one column per key, numbers with four significant digits."""
    print(f"\n{title}")
    if not rows:
        return
    columns = list(rows[0])
    cells = [[_cell(row[column]) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    text = [isinstance(rows[0][column], str) for column in columns]
    for line in [columns, ["-" * width for width in widths], *cells]:
        parts = [
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(line, widths, text, strict=True)
        ]
        print("  " + "  ".join(parts).rstrip())


def print_result(
    benchmark: str,
    keys: Mapping[str, float | None],
    *,
    details: Any,
    environment: Mapping[str, Any],
    args: argparse.Namespace,
) -> None:
    """The last line: one JSON object. Keys that this run could not measure are left out."""
    line: dict[str, Any] = {"benchmark": benchmark}
    line |= {name: _rounded(value) for name, value in keys.items() if value is not None}
    line |= {"details": _rounded(details), "environment": dict(environment), "options": vars(args)}
    print()
    print(json.dumps(line, allow_nan=False), flush=True)


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _rounded(value: Any) -> Any:
    """Six significant digits everywhere; JSON has no NaN."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
