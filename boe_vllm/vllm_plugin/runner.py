"""The model runner as vLLM's workers see it: requests in, tokens of one denoising step out.

Everything that decides a token is in `decoding.loop`; this module translates.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.model_executor.model_loader import get_model
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, LogprobsLists, ModelRunnerOutput

from boe_vllm.decoding.accounting import TokenLogprobs
from boe_vllm.decoding.loop import DenoisingLoop, StepResult
from boe_vllm.models.special import SpecialTokens
from boe_vllm.request.limits import EngineSettings
from boe_vllm.sampling.prefix import PrefixMatchers
from boe_vllm.vllm_plugin.admission import model_facts, read_resolved, server_settings
from boe_vllm.vllm_plugin.output import DiffusionModelRunnerOutput
from boe_vllm.vllm_plugin.warm_up import warm_up

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.sequence import IntermediateTensors
    from vllm.tasks import SupportedTask
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
    from vllm.v1.outputs import DraftTokenIds

    from boe_vllm.vllm_plugin.network import DecoderForDiffusion

logger = init_logger("vllm." + __name__)


class DiffusionModelRunner:
    """Holds the network and the denoising loop; has no key/value cache of vLLM's."""

    is_pooling_model = False
    model: DecoderForDiffusion
    loop: DenoisingLoop

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        """Remember the configuration; `load_model` does the work.

        Args:
            vllm_config: after the config hook completed it.
            device: where the network goes.
        """
        self.vllm_config = vllm_config
        self.model_config = vllm_config.model_config
        self.load_config = vllm_config.load_config
        self.scheduler_config = vllm_config.scheduler_config
        self.settings = EngineSettings.read(vllm_config.additional_config)
        self.device = device
        self.kv_caches: list[torch.Tensor] = []
        self.model_memory_usage = 0

    # ---- start ---------------------------------------------------------------------------------

    def load_model(self, load_dummy_weights: bool = False) -> None:
        """Load the network with vLLM's loader.

        Raises:
            ValueError: for a checkpoint with missing or unexpected tensors.
        """
        if load_dummy_weights:
            self.load_config.load_format = "dummy"
        self.model = get_model(vllm_config=self.vllm_config)
        config = self.model_config.hf_config
        parameters = self.model.parameters()
        self.model_memory_usage = sum(p.numel() * p.element_size() for p in parameters)
        # The scheduler keeps the rows of all requests that hold a canvas within this.
        rows = self.scheduler_config.max_num_batched_tokens
        self.loop = DenoisingLoop(
            self.model,
            special=SpecialTokens.of(config),
            device=self.device,
            budget_bytes=self.settings.budget_bytes(self.device.type),
            cache_rows=rows,
            row_budget=rows,
            score_grid=self.settings.score_grid,
            canvas_rate=self.settings.max_canvas_rate,
            matchers=self._parser(),
        )

    def _parser(self) -> PrefixMatchers | None:
        """Made now, since it takes a while for a large vocabulary."""
        parser = model_facts(self.model_config).parser
        try:
            return None if parser is None else parser()
        except Exception:
            logger.exception("Grammars without a finite automaton are refused: no parser")
            return None

    def warming_up_model(self) -> None:
        """Run the largest steps, so that too little memory shows now and not under load.

        Raises:
            RuntimeError: when a step fails.
        """
        warm_up(
            self.loop,
            server=server_settings(self.vllm_config),
            model=model_facts(self.model_config),
            max_rows=self.scheduler_config.max_num_batched_tokens,
            max_requests=self.scheduler_config.max_num_seqs,
        )

    def get_model(self) -> DecoderForDiffusion:
        return self.model

    def get_draft_model(self) -> None:
        return None

    def get_supported_tasks(self) -> tuple[SupportedTask, ...]:
        return ("generate",)

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """None: all rows are computed in every step."""
        return {}

    def initialize_kv_cache(
        self,
        kv_cache_config: KVCacheConfig,
        is_profiling: bool = False,
        kv_cache_allocation_context: AbstractContextManager | None = None,
    ) -> None:
        """Nothing to allocate."""

    # ---- a step --------------------------------------------------------------------------------

    def execute_model(
        self,
        scheduler_output: SchedulerOutput,
        intermediate_tensors: IntermediateTensors | None = None,
    ) -> ModelRunnerOutput:
        """Forget finished requests, open canvases for new ones, and run one denoising step.

        Preempted requests keep their canvas and go on with it when they are scheduled again.
        """
        for req_id in scheduler_output.finished_req_ids:
            self.loop.remove(req_id)
        errors: dict[str, str] = {}
        for request in scheduler_output.scheduled_new_reqs:
            try:
                self._add(request)
            except Exception as error:  # of this request alone
                if not isinstance(error, ValueError):
                    logger.exception("Request %s could not begin", request.req_id)
                errors[request.req_id] = str(error)
        req_ids = list(scheduler_output.num_scheduled_tokens)
        if not req_ids:
            return EMPTY_MODEL_RUNNER_OUTPUT
        known = [req_id for req_id in req_ids if req_id in self.loop.canvases]
        for req_id in set(req_ids).difference(known, errors):
            errors[req_id] = "the model runner has no canvas for it"
        output = to_output(req_ids, self._texts(self.loop.step(known)), errors)
        output.counters = self.loop.read_counters()
        return output

    def _texts(self, results: dict[str, StepResult]) -> dict[str, StepResult]:
        """Add the text of what was written into prompts, where there is a tokenizer."""
        for result in results.values():
            runs = (result.report or {}).get("infill", ())
            tokenizer = cached_tokenizer_from_config(self.model_config) if runs else None
            if tokenizer is not None:
                for run in runs:
                    run["text"] = tokenizer.decode(run["tokens"])
        return results

    def _add(self, request: NewRequestData) -> None:
        if request.req_id in self.loop.canvases:
            return
        assert request.prompt_token_ids is not None
        resolved = read_resolved(request.sampling_params)
        self.loop.add(request.req_id, list(request.prompt_token_ids), resolved)

    # ---- what vLLM's workers also ask for ------------------------------------------------------

    def update_max_model_len(self, max_model_len: int) -> None:
        self.model_config.max_model_len = max_model_len

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        return None

    def get_encoder_timing_stats(self) -> dict[str, dict[str, float | int]]:
        return {}

    def reset_mm_cache(self) -> None:
        """Nothing is cached."""

    def reset_encoder_cache(self) -> None:
        """Nothing is cached."""

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "reload_weights is not supported by the diffusion runner; restart the engine"
        )

    def shutdown(self) -> None:
        """Let go of the canvases and of the network."""
        for name in ("loop", "model"):
            self.__dict__.pop(name, None)


def to_output(
    req_ids: Sequence[str], results: dict[str, StepResult], errors: dict[str, str]
) -> DiffusionModelRunnerOutput:
    """What vLLM's scheduler reads, for the scheduled requests in their order.

    Args:
        req_ids: the scheduled requests.
        results: of the denoising step, by request.
        errors: of requests that did not take part in it.
    """
    errors = errors | {r: result.error for r, result in results.items() if result.error}
    tokens = [list(results[r].tokens) if r in results else [] for r in req_ids]
    return DiffusionModelRunnerOutput(
        req_ids=list(req_ids),
        req_id_to_index={req_id: index for index, req_id in enumerate(req_ids)},
        sampled_token_ids=tokens,
        logprobs=to_logprobs([results[r].logprobs if r in results else None for r in req_ids]),
        reports={r: result.report for r, result in results.items() if result.report is not None},
        errors=errors,
        snapshots={r: result.snapshot for r, result in results.items() if result.snapshot},
        done={r for r, result in results.items() if result.done and r not in errors},
    )


def to_logprobs(requests: Sequence[list[TokenLogprobs] | None]) -> LogprobsLists | None:
    """The log-probabilities of all requests' new tokens, one row each, as vLLM slices them.

    Rows are as wide as the widest; vLLM cuts each to what its request asked for.

    Args:
        requests: for each scheduled request, one entry per new token; None if it did not ask.
    """
    rows = [row for request in requests for row in request or ()]
    if not rows:
        return None
    width = max(len(row.token_ids) for row in rows)
    token_ids = np.zeros((len(rows), width), np.int64)
    logprobs = np.full((len(rows), width), -np.inf, np.float32)
    for index, row in enumerate(rows):
        token_ids[index, : len(row.token_ids)] = row.token_ids
        logprobs[index, : len(row.logprobs)] = row.logprobs
    starts = np.cumsum([0] + [len(request or ()) for request in requests])
    return LogprobsLists(
        logprob_token_ids=token_ids,
        logprobs=logprobs,
        sampled_token_ranks=np.array([row.rank for row in rows], np.int64),
        cu_num_generated_tokens=starts.tolist(),
    )


def check_runner(runner: object) -> None:
    """Raise RuntimeError unless a worker of vLLM's has made our runner."""
    if not isinstance(runner, DiffusionModelRunner):
        raise RuntimeError(
            f"boe-vllm: expected vLLM's worker to make a DiffusionModelRunner, got "
            f"{type(runner).__name__}; install a vLLM that this plugin was tested with"
        )
