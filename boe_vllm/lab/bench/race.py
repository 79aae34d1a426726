"""One workload under several policies and caches and by the baseline, timed in turn."""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from boe_vllm.lab.bench import baseline, common
from boe_vllm.lab.bench.agreement import Commits, from_trace, is_tie
from boe_vllm.lab.bench.baseline import Decoded, PlainLLaDA
from boe_vllm.lab.bench.checkpoint import Tensors
from boe_vllm.lab.bench.engine import Engine, Generated, Workload
from boe_vllm.lab.bench.flops import NetworkFlops
from boe_vllm.lab.bench.states import VARIANTS
from boe_vllm.models.llada import LLaDAConfig

POLICIES: dict[str, dict[str, Any]] = {
    "confidence": {"policy": "confidence"},
    "boe mask": VARIANTS["mask"],
    "boe kv": VARIANTS["kv"],
}
CACHES = ("none", "prefix", "dual")
BASELINE = "baseline"
BATCH = 16
"""Requests of a baseline's batch."""


class Race:
    """Runs a workload and keeps what came out last."""

    def __init__(
        self,
        args: argparse.Namespace,
        config: LLaDAConfig,
        engine: Engine,
        network: PlainLLaDA,
        workload: Workload,
    ) -> None:
        self.args, self.engine, self.network, self.workload = args, engine, network, workload
        self.flops = NetworkFlops(config)
        self.generated: dict[tuple[str, str], Generated] = {}
        self.engine_steps: dict[tuple[str, str], int] = {}
        self.decoded: list[Decoded] = []

    def warm_up(self) -> None:
        """A few short requests through everything."""
        few = Workload(
            prompts=[prompt[:16] for prompt in self.workload.prompts[:2]],
            gen_lens=[min(8, length) for length in self.workload.gen_lens[:2]],
        )
        for policy in self.args.policies:
            for cache in self.args.caches:
                self.engine.generate(few, self._fields(policy, cache))
        self._decode(few)

    def run(self, runners: Sequence[tuple[str, str]], *, baseline: bool) -> list[dict[str, Any]]:
        """One row per (policy, cache), after the baseline's."""
        cases: dict[str, Callable[[], Callable[[], Any]]] = {}
        if baseline:
            cases[BASELINE] = common.ready(self._run_baseline)
        for runner in runners:
            work = functools.partial(self._run_engine, runner)
            cases[" ".join(runner)] = common.ready(work)
        times = common.interleaved(cases, self.args, warm_up=False, tell=True)
        rows = [self._baseline_row(times[BASELINE])] if baseline else []
        rows += [self._engine_row(runner, times[" ".join(runner)]) for runner in runners]
        for row in rows:
            row["over first"] = row["tokens/s"] / rows[0]["tokens/s"]
        return rows

    def check_tokens(self, tensors: Tensors) -> dict[str, int]:
        """Compare confidence without a cache with the baseline where the canvas is the same."""
        counts = dict.fromkeys(("compared", "equal", "ties", "wrong"), 0)
        ours = self.generated.get(("confidence", "none"))
        if ours is None:
            return counts
        block = self.args.block_length
        exact = None
        for n, (tokens, decoded) in enumerate(zip(ours.tokens, self.decoded, strict=True)):
            if self._canvas(n) != len(decoded.canvas):
                continue
            counts["compared"] += 1
            if tokens == decoded.tokens:
                counts["equal"] += 1
                continue
            exact = exact or PlainLLaDA(
                self.network.config, tensors, dtype=torch.float64, device=self.args.device
            )
            again = self.engine.generate(
                Workload(prompts=[self.workload.prompts[n]], gen_lens=[self._canvas(n)]),
                {**self._fields("confidence", "none"), "trace": True},
            )
            theirs = Commits(tokens=np.array(decoded.canvas), step_of=np.array(decoded.step_of))
            tie = is_tie(
                exact,
                self.workload.prompts[n],
                from_trace(again.reports[0]["trace"]),
                theirs,
                block,
            )
            counts["ties" if tie else "wrong"] += 1
        return counts

    # ---- the runs ------------------------------------------------------------------------------

    def _run_engine(self, runner: tuple[str, str]) -> None:
        before = self.engine.steps
        self.generated[runner] = self.engine.generate(self.workload, self._fields(*runner))
        self.engine_steps[runner] = self.engine.steps - before

    def _run_baseline(self) -> None:
        self.decoded = self._decode(self.workload)

    def _decode(self, workload: Workload) -> list[Decoded]:
        return baseline.decode_all(
            self.network,
            workload.prompts,
            workload.gen_lens,
            block_length=self.args.block_length,
            tokens_per_step=self.args.tokens_per_step,
            batch=BATCH,
        )

    def _fields(self, policy: str, cache: str) -> dict[str, Any]:
        fields = {
            **POLICIES[policy],
            "cache": cache,
            "block_length": self.args.block_length,
            "tokens_per_step": self.args.tokens_per_step,
        }
        return fields | ({"rho": self.args.rho} if fields["policy"] == "boe" else {})

    def _canvas(self, request: int) -> int:
        block = self.args.block_length
        return -(-self.workload.gen_lens[request] // block) * block

    # ---- the rows ------------------------------------------------------------------------------

    def _row(
        self, runner: tuple[str, str], times: list[float], steps: int, rows: float, work: float
    ) -> dict[str, Any]:
        elapsed = common.median(times)
        return {
            "policy": runner[0],
            "cache": runner[1],
            "s": elapsed,
            "tokens/s": self.workload.generated / elapsed,
            "steps": steps,
            "rows": rows / steps,
            "GFLOP": work / steps / 1e9,
            "GFLOP/s": work / elapsed / 1e9,
        }

    def _baseline_row(self, times: list[float]) -> dict[str, Any]:
        steps, rows, work = 0, 0, 0
        block = self.args.block_length
        for members, generation in baseline.batches(self.workload.gen_lens, block, BATCH):
            length = max(len(self.workload.prompts[n]) for n in members) + generation
            own = generation // block * -(-block // self.args.tokens_per_step)
            steps += own
            rows += own * len(members) * length
            work += own * self.flops.full_logits(len(members), length)
        return self._row((BASELINE, "none"), times, steps, rows, work)

    def _engine_row(self, runner: tuple[str, str], times: list[float]) -> dict[str, Any]:
        generated = self.generated[runner]
        rows = generated.total("rows_forward") + generated.total("rows_backward")
        work = sum(
            self._request_flops(n, report, steers=runner[0] != "confidence")
            for n, report in enumerate(generated.reports)
        )
        return self._row(runner, times, self.engine_steps[runner], rows, work)

    def _request_flops(self, request: int, report: dict[str, Any], *, steers: bool) -> float:
        """What a request's own account says that it computed."""
        flops, args = self.flops, self.args
        length = len(self.workload.prompts[request]) + self._canvas(request)
        forward, backward = report["rows_forward"], report["rows_backward"]
        work = (forward + backward) * flops.row + flops.attention(forward, length)
        work += 6 * backward * length * flops.width * flops.layers
        blocks = self._canvas(request) // args.block_length
        masked = [*range(args.block_length, 0, -args.tokens_per_step)] * blocks
        vocabulary = 0
        for count in masked[: report["denoising_steps"]]:
            candidates = math.ceil(args.rho * count)
            steered = steers and candidates > min(args.tokens_per_step, count)
            vocabulary += count + (count + candidates if steered else 0)
        return work + vocabulary * flops.vocabulary
