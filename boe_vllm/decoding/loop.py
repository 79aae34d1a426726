"""The denoising loop: one step of every running request in shared, packed passes.

    canvases -> pack -> forward -> read -> decide -> commit -> results

`pack` is `batch.pack_step`; `forward` runs the network over the packed rows; `read` turns logit
rows into statistics; `decide` (`policy_step`) asks the policies, whose queries are answered in
shared passes; `commit` writes what they decided on the canvases.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from boe_vllm.decoding.accounting import PREFIX, Clock, Counters, TokenLogprobs, total_costs
from boe_vllm.decoding.batch import StepBatch, pack_step
from boe_vllm.decoding.canvas import Canvas
from boe_vllm.decoding.policy_step import Errors, decide, unproposed, views_of
from boe_vllm.decoding.snapshots import Snapshots
from boe_vllm.models.cache import CachedRows, KeyValuePool
from boe_vllm.models.contract import DenoisingNetwork
from boe_vllm.models.functional import Scratch
from boe_vllm.models.special import SpecialTokens
from boe_vllm.policies.base import Commit, View
from boe_vllm.request.resolved import ResolvedRequest
from boe_vllm.sampling.log_probs import (
    DEFAULT_BUDGET_BYTES,
    LogProbabilities,
    TokenLikelihood,
    VocabularyMemory,
)
from boe_vllm.sampling.prefix import PrefixMatchers
from boe_vllm.sampling.statistics import RowStatistics, read_statistics
from boe_vllm.steering.guidance import guided
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
    snapshot: dict[str, Any] | None = None
    """The canvas, if the request wants it seen; see `decoding.snapshots`."""


class DenoisingLoop:
    """Holds the canvases of the running requests and steps them together."""

    def __init__(
        self,
        model: DenoisingNetwork,
        *,
        special: SpecialTokens,
        device: torch.device,
        budget_bytes: int = DEFAULT_BUDGET_BYTES,
        cache_rows: int = 0,
        row_budget: int = DEFAULT_ROW_BUDGET,
        score_grid: float | None = None,
        canvas_rate: float = 20.0,
        matchers: PrefixMatchers | None = None,
    ) -> None:
        """Wrap a loaded model.

        Args:
            model: the network.
            special: ids of the mask and of the ends of text.
            device: where the model lives.
            budget_bytes: largest temporary of rows x vocabulary.
            cache_rows: rows of keys and values that requests with a cache may hold together.
            row_budget: most rows of one packed look-ahead pass, unless one state alone has more.
            score_grid: policies see numbers rounded to multiples of this; None for none.
            canvas_rate: most snapshots of a canvas in a second.
            matchers: the parser of grammars that are read from left to right, where there is one.
        """
        self.matchers = matchers
        self.snapshots = Snapshots(canvas_rate)
        self.model, self.special, self.device = model, special, device
        self.budget_bytes, self.row_budget, self.score_grid = budget_bytes, row_budget, score_grid
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
            special=self.special,
            vocab_size=self.model.vocab_size,
            pool=self.pool,
            shift=self.model.shift,
            matchers=self.matchers,
        )

    def remove(self, request_id: str) -> None:
        """Forget a request; unknown ids are ignored, since vLLM reports a finish only once."""
        canvas = self.canvases.pop(request_id, None)
        if canvas is not None:
            canvas.release()
            if canvas.config.frame.stream_canvas:
                self.snapshots.forget(request_id)

    @torch.no_grad()
    def step(self, request_ids: Sequence[str]) -> dict[str, StepResult]:
        """One denoising step of the given requests."""
        results = {r: _result(self.canvases[r]) for r in request_ids if self.canvases[r].done}
        running = [r for r in request_ids if r not in results]
        if not running:
            return results
        # Those whose prediction the last look-ahead has made already have no rows: they come last.
        running.sort(key=lambda r: self.canvases[r].carried is not None)
        canvases = [self.canvases[r] for r in running]
        before = total_costs(canvas.account for canvas in canvases)
        errors = Errors()
        with self.clock.part("forward"):
            batch, current, statistics = self.predict(canvases)
        with self.clock.part("policy"):
            views = views_of(batch, statistics, errors)
            commits = decide(batch, current, views, errors)
            likelihoods = unproposed(batch, commits, views, current.log_probs)
            for n, commit in commits.items():
                if n not in errors:
                    self._commit(batch, n, commit, views[n], statistics, likelihoods[n], errors)
        self.counters.cost(before, total_costs(canvas.account for canvas in canvases))
        self.counters.time(self.clock.read())
        for n, (request_id, canvas) in enumerate(zip(running, canvases, strict=True)):
            snapshot = None
            if canvas.config.frame.stream_canvas:
                snapshot = self.snapshots.take(request_id, canvas, views.get(n), commits.get(n))
            results[request_id] = _result(canvas, errors.get(n), snapshot)
        return results

    def predict(self, canvases: Sequence[Canvas]) -> tuple[StepBatch, DenoisingPass, RowStatistics]:
        """Pack, forward and read: the step's own pass and the statistics of its logit rows."""
        batch = pack_step(canvases, mask_token_id=self.special.mask, device=self.device)
        current = self.forward(batch)
        return (
            batch,
            current,
            read_statistics(current.log_probs, batch.writes, keep=batch.reads_again),
        )

    def forward(self, batch: StepBatch) -> DenoisingPass:
        """Run the network over a packed step and charge each canvas its rows."""
        model, layout = self.model, batch.layout
        hidden, saved = model.embed(layout.tokens), None
        if batch.computed:
            context = None
            if any(batch.cache_plans):
                context = CachedRows(self.pool, layout, batch.cache_plans)
            hidden, saved = model.run(hidden, layout, context, self.saved_memory)
            if batch.unconditional:
                hidden = guided(hidden, layout, batch.unconditional, batch.guides)
        owners = [*range(batch.computed), *batch.unconditional]
        for owner, live in zip(owners, layout.live_lens, strict=True):
            account = batch.canvases[owner].account
            account.forwards += 1
            account.rows_forward += live
        return DenoisingPass(
            model=model,
            sequences=batch.sequences,
            layout=layout,
            log_probs=LogProbabilities(
                model,
                hidden,
                mask_token_id=self.special.mask,
                constraint_R=batch.constraint_R,
                table=batch.table,
                score_grid=self.score_grid,
                budget_bytes=self.budget_bytes,
                memory=self.memory,
            ),
            saved=saved,
            next_steps=tuple(canvas.next_step() for canvas in batch.canvases),
            device_memory=tuple(canvas.device_memory for canvas in batch.canvases),
            guides=batch.guides,
            unconditional=batch.unconditional,
            pool=self.pool,
            table=batch.table,
            row_budget=self.row_budget,
            clock=self.clock,
        )

    def read_counters(self) -> dict[str, int]:
        """What has been done since the last call, for the server's metrics."""
        counts = self.counters.read()
        counts[PREFIX + "cache_rows"] = self.pool.rows
        counts[PREFIX + "cache_rows_used"] = self.pool.used
        for canvas in self.canvases.values():
            key = f"{PREFIX}active/{canvas.policy.name}"
            counts[key] = counts.get(key, 0) + 1
        return counts

    def _commit(
        self,
        batch: StepBatch,
        n: int,
        commit: Commit,
        view: View,
        statistics: RowStatistics,
        likelihoods: Mapping[int, TokenLikelihood],
        errors: Errors,
    ) -> None:
        """Write what one request's policy decided."""
        canvas = batch.canvases[n]
        rows, own = batch.rows_of(n, statistics)
        try:
            canvas.apply(commit, view, rows, own, likelihoods)
        except ValueError as error:
            errors[n] = str(error)
        except Exception as error:
            errors.blame(n, canvas, error)
        else:
            self.counters.step(
                canvas.policy.name,
                committed=view.masked_now - int(canvas.masked.sum()),
                left=own.entropy[rows][: len(view.positions)][canvas.masked[view.positions]],
            )


def _result(
    canvas: Canvas, error: str | None = None, snapshot: dict[str, Any] | None = None
) -> StepResult:
    tokens = [] if error else canvas.emit()
    return StepResult(
        tokens=tokens,
        logprobs=canvas.emitted_logprobs(len(tokens)),
        done=canvas.done,
        report=canvas.report() if tokens or error or canvas.done else None,
        error=error,
        snapshot=snapshot,
    )
