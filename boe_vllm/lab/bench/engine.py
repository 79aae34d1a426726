"""vLLM with our plugin, offline and in this process, so that all that is compared shares it."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from boe_vllm.lab.bench.common import UsageError
from boe_vllm.models.llada import LLaDAConfig


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Requests of a benchmark."""

    prompts: list[list[int]]
    """Token ids."""
    gen_lens: list[int]
    """Tokens that each asks for; nothing ends earlier."""

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def generated(self) -> int:
        """Tokens that all requests ask for together."""
        return sum(self.gen_lens)


def draw_workload(
    config: LLaDAConfig,
    *,
    requests: int,
    prompt_len: tuple[int, int],
    gen_len: tuple[int, int],
    seed: int,
) -> Workload:
    """Random tokens; lengths uniform between the given ends."""
    rng = np.random.default_rng(seed)
    words = np.setdiff1d(
        np.arange(config.vocab_size), [config.mask_token_id, config.eos_token_id or 0]
    )
    lengths = rng.integers(prompt_len[0], prompt_len[1], requests, endpoint=True)
    return Workload(
        prompts=[rng.choice(words, length).tolist() for length in lengths],
        gen_lens=rng.integers(gen_len[0], gen_len[1], requests, endpoint=True).tolist(),
    )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Generated:
    """What the engine returned."""

    tokens: list[list[int]]
    """Per request, without the prompt."""
    reports: list[dict[str, Any]]
    """Per request: its steps, passes and rows, and its trace if it asked for one."""

    def total(self, name: str) -> int:
        """Sum of an entry of the reports."""
        return sum(report.get(name, 0) for report in self.reports)


class Engine:
    """One engine that serves every policy: policies are per request."""

    def __init__(
        self,
        folder: str,
        args: argparse.Namespace,
        *,
        max_model_len: int,
        max_running: int,
        **settings: Any,
    ) -> None:
        """Start vLLM in this process.

        Args:
            folder: a checkpoint.
            args: the common options.
            max_model_len: longest prompt plus canvas.
            max_running: requests that run at the same time.
            settings: further engine arguments.
        """
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        from vllm import LLM
        from vllm.platforms import current_platform

        if current_platform.device_type != args.device.split(":")[0]:
            raise UsageError(
                f"--device: expected {current_platform.device_type}, which vLLM was built for, "
                f"got {args.device!r}"
            )
        self.llm = LLM(
            model=folder,
            dtype=args.dtype,
            skip_tokenizer_init=True,
            max_model_len=max_model_len,
            max_num_seqs=max_running,
            max_num_batched_tokens=max_running * max_model_len,
            disable_log_stats=True,
            **settings,
        )
        self.steps = 0
        """Engine steps so far."""
        self._count_steps()

    def generate(self, workload: Workload, fields: Mapping[str, Any]) -> Generated:
        """Serve all requests under one policy, at temperature 0.

        Raises:
            RuntimeError: when a request did not return what it asked for.
        """
        from vllm import SamplingParams

        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in workload.prompts],
            [
                SamplingParams(
                    max_tokens=length,
                    temperature=0.0,
                    seed=0,
                    ignore_eos=True,
                    detokenize=False,
                    extra_args=dict(fields),
                )
                for length in workload.gen_lens
            ],
            use_tqdm=False,
        )
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        if [len(t) for t in tokens] != workload.gen_lens:
            raise RuntimeError(
                f"engine: expected {workload.gen_lens} tokens, got {[len(t) for t in tokens]} "
                f"under {dict(fields)}; see the engine's log"
            )
        reports = [(output.kv_transfer_params or {}).get("boe", {}) for output in outputs]
        return Generated(tokens=tokens, reports=reports)

    def _count_steps(self) -> None:
        step = self.llm.llm_engine.step

        def counted() -> Any:
            self.steps += 1
            return step()

        self.llm.llm_engine.step = counted

    @property
    def loop(self) -> Any:
        """The denoising loop behind the engine."""
        core = self.llm.llm_engine.engine_core.engine_core
        return core.model_executor.driver_worker.worker.model_runner.loop
