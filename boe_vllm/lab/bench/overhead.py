"""The engine's share of a step beside the network.

The bundled model serves requests in an engine in this process. Counted as the network's are its
passes (embedding, forward, backward, output head, soft writes, partial passes of candidates) and
the statistics of the logits, up to their transfer to the host; everything else that vLLM's engine
does from one step to the next is overhead: scheduling, packing rows, the policy's decision,
bookkeeping, outputs. Where steering computes outside those calls (the entropy's gradient, sums of
scores), it counts as overhead too.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from typing import Any

import torch

import boe_vllm
from boe_vllm.lab.bench import common
from boe_vllm.lab.bench.checkpoint import read_config
from boe_vllm.lab.bench.engine import Engine, draw_workload
from boe_vllm.lab.bench.machine import Environment, print_facts
from boe_vllm.lab.bench.states import VARIANTS

MODEL_PASSES = ("embed", "run", "backward", "logits", "logits_backward", "soft_embed")
FUNCTIONS = (
    ("boe_vllm.decoding.loop", "read_statistics"),
    ("boe_vllm.steering.hypothetical", "run_partial"),
)
"""Further calls that count as the network's, where they are looked up."""
POLICIES: dict[str, dict[str, Any]] = {
    name: VARIANTS[name] for name in ("confidence", "mask", "kv")
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.set_defaults(
        repeats=5, requests=16, prompt_len=(64, 64), gen_len=(64, 64), block_length=32
    )
    parser.set_defaults(model=boe_vllm.tiny_model_path())


def run(args: argparse.Namespace) -> None:
    """Measure, print the table and the JSON line."""
    environment = Environment(args.device, args.dtype, args.clock)
    config = read_config(args)
    workload = draw_workload(
        config,
        requests=args.requests,
        prompt_len=args.prompt_len,
        gen_len=args.gen_len,
        seed=args.seed,
    )
    length = args.prompt_len[1] + -(-args.gen_len[1] // args.block_length) * args.block_length
    engine = Engine(args.model, args, max_model_len=length, max_running=args.requests)
    stopwatch = _Stopwatch(torch.device(args.device), args.clock)
    stopwatch.attach(engine)
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in POLICIES}
    for round_number in range(-1, args.repeats):
        for name, fields in POLICIES.items():
            stopwatch.reset()
            engine.generate(workload, {**fields, "block_length": args.block_length})
            if round_number >= 0:
                samples[name].append(stopwatch.read())
    details: list[dict[str, Any]] = [
        {"policy": name} | {key: common.median([s[key] for s in taken]) for key in taken[0]}
        for name, taken in samples.items()
    ]
    common.print_table(
        f"Engine steps of {args.requests} requests of {length} positions on {args.model}", details
    )
    facts = environment.facts()
    print_facts(facts)
    print(
        "step: time of an engine step; network: the part of it in the network's passes and "
        "the statistics of the logits; share: the rest.\n"
        f"{__doc__.strip().partition(chr(10) * 2)[2]}"
    )
    keys: dict[str, float | None] = {"overhead.engine_share": None}
    for row in details:
        name = "" if row["policy"] == "confidence" else f"_{row['policy']}"
        keys[f"overhead.engine_share{name}"] = row["share"]
    common.print_result("overhead", keys, details=details, environment=facts, args=args)


class _Stopwatch:
    """Adds up the time inside the engine's steps and inside the network, nested calls once."""

    def __init__(self, device: torch.device, clock: str) -> None:
        self.device, self.now = device, common.CLOCKS[clock]
        self.reset()

    def reset(self) -> None:
        """Start again from zero."""
        self.steps, self.step_time, self.network_time, self._inside = 0, 0.0, 0.0, False

    def read(self) -> dict[str, float]:
        """Means over the steps since the last reset."""
        return {
            "steps": self.steps,
            "step ms": self.step_time / self.steps * 1e3,
            "network ms": self.network_time / self.steps * 1e3,
            "overhead ms": (self.step_time - self.network_time) / self.steps * 1e3,
            "share": 1 - self.network_time / self.step_time,
        }

    def attach(self, engine: Engine) -> None:
        """Wrap the engine's step and the network's passes."""
        model = engine.loop.model
        for name in MODEL_PASSES:
            setattr(model, name, self._network(getattr(model, name)))
        for module_name, name in FUNCTIONS:
            module = importlib.import_module(module_name)
            setattr(module, name, self._network(getattr(module, name)))
        llm_engine = engine.llm.llm_engine
        llm_engine.step = self._step(llm_engine.step)

    def _step(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def note(seconds: float) -> None:
            self.step_time += seconds
            self.steps += 1

        return common.watched(work, note, self.now)

    def _network(self, work: Callable[..., Any]) -> Callable[..., Any]:
        def complete(*args: Any, **kwargs: Any) -> Any:
            result = work(*args, **kwargs)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            return result

        def note(seconds: float) -> None:
            self.network_time += seconds

        outermost = common.watched(complete, note, self.now)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return work(*args, **kwargs)
            self._inside = True
            try:
                return outermost(*args, **kwargs)
            finally:
                self._inside = False

        return timed
