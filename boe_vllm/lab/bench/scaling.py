"""How the time of a step grows: with requests, with length, and with active rows.

Each series changes one size; an exponent is the slope of a straight line through the logarithms of
size and median time. For active rows the time is what steering adds to a confidence step of the
same state, since the plain step does not depend on them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from boe_vllm.lab.bench import checkpoint, common
from boe_vllm.lab.bench.flops import NetworkFlops
from boe_vllm.lab.bench.machine import Environment, print_facts
from boe_vllm.lab.bench.states import draw_state, one_step, open_loop, rows_of, variant_fields

PLAIN, STEERED = "confidence", "mask"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.set_defaults(repeats=5, requests=8)
    parser.add_argument("--counts", type=common.integers, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--lengths", type=common.integers, default=[64, 128, 256, 512, 1024])
    parser.add_argument("--active", type=common.integers, default=[8, 16, 32, 64, 128])
    parser.add_argument("--rho", type=float, default=0.25, help="share of candidates")


def run(args: argparse.Namespace) -> None:
    """Measure, print the tables and the JSON line."""
    environment = Environment(args.device, args.dtype, args.clock)
    config = checkpoint.read_config(args)
    model = checkpoint.load_model(args, config, checkpoint.read_tensors(args, config))
    bench = _Bench(args, open_loop(args, model), NetworkFlops(config))
    block = args.block_length or 32
    length = common.step_lengths(
        argparse.Namespace(**vars(args) | {"lengths": None}), [256], block
    )[0]
    half = block // 2
    series = {
        "requests": [(n, length, half) for n in args.counts],
        "length": [(args.requests, n, half) for n in args.lengths if n > half],
        "active rows": [(args.requests, length, n) for n in args.active if n < length],
    }
    details: dict[str, list[dict[str, Any]]] = {}
    for name, settings in series.items():
        common.progress(f"step time against {name}")
        details[name] = bench.measure(settings)
    keys = _keys(details)
    facts = environment.facts()
    for name, rows in details.items():
        common.add_share(rows, facts)
        common.print_table(f"Step time against {name}", rows)
    print_facts(facts)
    for name, value in keys.items():
        print(f"{name}: {value:.3f}")
    print(
        "1 is linear. Against requests (4 and more) the larger of the two steps' exponents is "
        "given; against length the attention's share grows beyond linear; for active rows it is "
        f"the exponent of what steering adds (rho = {args.rho}). share: of the machine's matrix "
        "products."
    )
    common.print_result("scaling", keys, details=details, environment=facts, args=args)


class _Bench:
    """Measures both kinds of steps at given sizes."""

    def __init__(self, args: argparse.Namespace, loop: Any, flops: NetworkFlops) -> None:
        self.args, self.loop, self.flops = args, loop, flops

    def measure(self, settings: Sequence[tuple[int, int, int]]) -> list[dict[str, Any]]:
        """One row per (requests, length, masked); all settings are interleaved."""
        cases = {}
        for requests, length, masked in settings:
            state = draw_state(
                self.loop.model.config,
                requests=requests,
                length=length,
                block=min(length - 1, max(masked, 2)),
                masked=masked,
                seed=self.args.seed,
            )
            for name in (PLAIN, STEERED):
                fields = variant_fields(name, self.args.rho)
                cases[f"{name} {requests} {length} {masked}"] = lambda state=state, fields=fields: (
                    one_step(self.loop, state, fields)
                )
        times = common.interleaved(cases, self.args)
        return [self._row(times, *setting) for setting in settings]

    def _row(
        self, times: dict[str, list[float]], requests: int, length: int, masked: int
    ) -> dict[str, Any]:
        plain, steered = (
            times[f"{name} {requests} {length} {masked}"] for name in (PLAIN, STEERED)
        )
        work = requests * self.flops.step(rows_of(length, masked, {"policy": PLAIN})) / 1e9
        return {
            "requests": requests,
            "length": length,
            "active": masked,
            "rows": requests * length,
            "confidence ms": common.median(plain) * 1e3,
            "mask ms": common.median(steered) * 1e3,
            "added ms": common.median([b - a for a, b in zip(plain, steered, strict=True)]) * 1e3,
            "GFLOP": work,
            "GFLOP/s": work / common.median(plain),
        }


def _keys(details: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    def fit(series: str, size: str, column: str, least: int = 0) -> float:
        rows = [row for row in details[series] if row[size] >= least]
        return common.exponent([row[size] for row in rows], [row[column] for row in rows])

    both = [fit("requests", "requests", column, 4) for column in ("confidence ms", "mask ms")]
    return {
        "scaling.requests_exponent": max(both),
        "scaling.length_exponent": fit("length", "length", "confidence ms"),
        "scaling.active_rows_exponent": fit("active rows", "active", "added ms"),
    }
