"""The denoising loop: one step of every running request in shared, packed passes.

request -> canvas -> rows -> denoiser -> prediction -> policy (-> steering) -> commit -> result
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from boe_vllm.base.clock import Clock
from boe_vllm.decoding.accounting import TokenLikelihood, TokenLogprobs
from boe_vllm.decoding.canvas import Canvas, ResolvedRequest
from boe_vllm.decoding.counters import COSTS, PREFIX, Counters
from boe_vllm.decoding.policy_step import Errors, decide, reading, views_of
from boe_vllm.models.cache import CachedRows, CachePlan, KeyValuePool
from boe_vllm.models.decoder import LLaDAForDiffusion
from boe_vllm.models.functional import Scratch
from boe_vllm.models.rows import SequenceRows, pack
from boe_vllm.policies.base import Commit, View
from boe_vllm.sampling.canvas_constraints import ConstraintTable
from boe_vllm.sampling.statistics import (
    DEFAULT_BUDGET_BYTES,
    LogProbabilities,
    RowStatistics,
    RowWrites,
    VocabularyMemory,
    read_statistics,
)
from boe_vllm.steering.guidance import guided, with_unconditional
from boe_vllm.steering.step import DEFAULT_ROW_BUDGET, DenoisingPass


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What one denoising step gave one request."""

    tokens: list[int]
    """Tokens that may be sent now; often none."""
    logprobs: list[TokenLogprobs] | None
    """One per token, if the request asked."""
    done: bool
    """The whole canvas is committed."""
    report: dict[str, Any] | None
    """Cost and trace so far; present whenever the request may end with this step."""
    error: str | None = None
    """Why the request cannot go on."""


class DenoisingLoop:
    """Holds the canvases of the running requests and steps them together."""

    def __init__(
        self,
        model: LLaDAForDiffusion,
        *,
        mask_token_id: int,
        eos_token_id: int,
        late_tokens: frozenset[int],
        device: torch.device,
        budget_bytes: int = DEFAULT_BUDGET_BYTES,
        cache_rows: int = 0,
        row_budget: int = DEFAULT_ROW_BUDGET,
    ) -> None:
        """Wrap a loaded model.

        Args:
            model: the network.
            mask_token_id: id of the mask token.
            eos_token_id: id of EOS, for `logits_eos_inf`.
            late_tokens: EOS and EoT, for `confidence_eos_eot_inf`.
            device: where the model lives.
            budget_bytes: largest temporary of rows x vocabulary.
            cache_rows: rows of keys and values that requests with a cache may hold together.
            row_budget: most rows of one packed look-ahead pass, unless one state alone has more.
        """
        self.model = model
        self.mask_token_id = mask_token_id
        self.eos_token_id = eos_token_id
        self.late_tokens = late_tokens
        self.device = device
        self.budget_bytes = budget_bytes
        self.row_budget = row_budget
        weight = next(model.parameters())
        self.pool = KeyValuePool(
            cache_rows, **model.cache_shape(), dtype=weight.dtype, device=device
        )
        self.memory, self.saved_memory = VocabularyMemory(), Scratch()
        self.canvases: dict[str, Canvas] = {}
        self.clock, self.counters = Clock(), Counters()

    def add(self, request_id: str, prompt: list[int], params: ResolvedRequest) -> None:
        """Open a canvas for a request."""
        self.canvases[request_id] = Canvas(
            prompt,
            params,
            mask_token_id=self.mask_token_id,
            eos_token_id=self.eos_token_id,
            vocab_size=self.model.vocab_size,
            late_tokens=self.late_tokens,
            pool=self.pool,
        )

    def remove(self, request_id: str) -> None:
        """Forget a request; unknown ids are ignored, since vLLM reports a finish only once."""
        canvas = self.canvases.pop(request_id, None)
        if canvas is not None:
            canvas.release()

    @torch.no_grad()
    def step(self, request_ids: Sequence[str]) -> dict[str, StepResult]:
        """One denoising step of the given requests."""
        results = {r: self._result(self.canvases[r]) for r in request_ids if self.canvases[r].done}
        running = [r for r in request_ids if r not in results]
        if not running:
            return results
        # Those whose prediction the last look-ahead has made already have no rows: they come last.
        running.sort(key=lambda r: self.canvases[r].carried is not None)
        canvases = [self.canvases[r] for r in running]
        before = _costs(canvases)
        errors = Errors()
        with self.clock.part("forward"):
            current, statistics = self.predict(canvases)
        with self.clock.part("policy"):
            views = views_of(canvases, current, statistics, errors)
            commits = decide(canvases, current, views, errors)
            for n, commit in commits.items():
                if n not in errors:
                    self._apply(canvases[n], commit, views[n], current, n, statistics, errors)
        self.counters.cost(before, _costs(canvases))
        self.counters.time(self.clock.read())
        for n, (request_id, canvas) in enumerate(zip(running, canvases, strict=True)):
            results[request_id] = self._result(canvas, errors.get(n))
        return results

    def read_counters(self) -> dict[str, int]:
        """What has been done since the last call, for the server's metrics."""
        counts = self.counters.read()
        counts[PREFIX + "cache_rows"] = self.pool.rows
        counts[PREFIX + "cache_rows_used"] = self.pool.used
        for canvas in self.canvases.values():
            key = f"{PREFIX}active/{canvas.policy.name}"
            counts[key] = counts.get(key, 0) + 1
        return counts

    # ---- stages --------------------------------------------------------------------------------

    def predict(self, canvases: Sequence[Canvas]) -> tuple[DenoisingPass, RowStatistics]:
        """The step's own forward and the statistics of every writable position."""
        plans = [canvas.cache_plan() for canvas in canvases]
        sequences = tuple(map(_rows_of, canvases, plans))
        fresh = [canvas for canvas in canvases if canvas.carried is None]
        guides = tuple(canvas.guide for canvas in canvases)
        packed, unconditional = with_unconditional(
            sequences[: len(fresh)], guides[: len(fresh)], self.mask_token_id
        )
        layout = pack(packed, self.device)
        hidden, saved = self.model.embed(layout.tokens), None
        if fresh:
            plans = plans[: len(fresh)] + [None] * len(unconditional)
            context = CachedRows(self.pool, layout, plans) if any(plans) else None
            hidden, saved = self.model.run(hidden, layout, context, self.saved_memory)
            hidden = guided(hidden, layout, unconditional, guides)
        counts = np.array(layout.logit_lens[: len(fresh)], np.int64)
        table = ConstraintTable()
        log_probs = LogProbabilities(
            self.model,
            hidden,
            mask_token_id=self.mask_token_id,
            eos_token_id=self.eos_token_id,
            constraint_R=np.concatenate(
                [np.empty(0, np.int64)]
                + [
                    table.numbers(c.constraints.at(c.tokens, c.masked, s.wanted_positions))
                    for c, s in zip(fresh, sequences, strict=False)
                ]
            ),
            table=table.rules,
            budget_bytes=self.budget_bytes,
            memory=self.memory,
        )
        writes = RowWrites(
            temperature=np.repeat(np.array([c.params.temperature for c in fresh]), counts),
            uniform=np.concatenate(
                [np.empty(0)]
                + [c.uniforms(s.wanted_positions) for c, s in zip(fresh, sequences, strict=False)]
            ),
            top_logprobs=max(
                (c.params.logprobs * max(1, c.params.top_logprobs) for c in fresh), default=0
            ),
        )
        again = saved is not None or any(c.policy.needs().distributions for c in fresh)
        statistics = read_statistics(log_probs, writes, keep=again)
        for place, live in enumerate(layout.live_lens):
            owner = (
                fresh[place]
                if place < len(fresh)
                else fresh[list(unconditional)[place - len(fresh)]]
            )
            owner.account.forwards += 1
            owner.account.rows_forward += live
        current = DenoisingPass(
            model=self.model,
            sequences=sequences,
            layout=layout,
            log_probs=log_probs,
            saved=saved,
            next_steps=tuple(canvas.next_step() for canvas in canvases),
            device_memory=tuple(canvas.device_memory for canvas in canvases),
            guides=guides,
            unconditional=unconditional,
            pool=self.pool,
            table=table,
            row_budget=self.row_budget,
            clock=self.clock,
        )
        return current, statistics

    def _apply(
        self,
        canvas: Canvas,
        commit: Commit,
        view: View,
        current: DenoisingPass,
        n: int,
        statistics: RowStatistics,
        errors: Errors,
    ) -> None:
        """Write what one request's policy decided."""
        masked = view.masked_now
        rows, own = reading(canvas, current, n, statistics)
        try:
            likelihood = functools.partial(_likelihood, current.log_probs)
            canvas.apply(commit, view, rows, own, likelihood)
        except ValueError as error:
            errors[n] = str(error)
        except Exception as error:
            errors.blame(n, canvas, error)
        else:
            self.counters.step(canvas, view, masked)

    def _result(self, canvas: Canvas, error: str | None = None) -> StepResult:
        tokens = [] if error else canvas.emit()
        return StepResult(
            tokens=tokens,
            logprobs=canvas.emitted_logprobs(len(tokens)) if canvas.params.logprobs else None,
            done=canvas.done,
            report=canvas.report() if tokens or error or canvas.done else None,
            error=error,
        )


def _rows_of(canvas: Canvas, plan: CachePlan | None) -> SequenceRows:
    """The rows that one request's step computes."""
    needs = canvas.policy.needs()
    written, upcoming = canvas.written(), canvas.upcoming()
    if plan and plan.live_positions is not None:
        upcoming = np.intersect1d(upcoming, plan.live_positions)
    extra = [written[: len(written) * needs.revision], upcoming[: len(upcoming) * needs.next_block]]
    return SequenceRows(
        tokens=canvas.tokens,
        logit_positions=canvas.writable(),
        extra_positions=np.concatenate(extra),
        keep=needs.rows,
        live_positions=plan.live_positions if plan else None,
        frozen_rows=len(plan.slots) if plan and not plan.refresh else 0,
    )


def _costs(canvases: Sequence[Canvas]) -> dict[str, int]:
    return {name: sum(getattr(canvas.account, name) for canvas in canvases) for name in COSTS}


def _likelihood(log_probs: LogProbabilities, row: int, token: int) -> TokenLikelihood:
    """How likely a token is in one row of the step's forward."""
    ((_, logp_1V),) = log_probs.rows(np.array([row]))
    value = logp_1V[0, token]
    return TokenLikelihood(token, float(value), int((logp_1V[0] > value).sum()) + 1)
