"""The canvas of one request: its tokens, what is masked, and what it has cost.

Masks are appended to the prompt; masks inside the prompt are written too (infilling). The canvas
says what the coming step computes, takes a policy's commit, and emits the longest committed prefix.

Legend: `L` positions of prompt and canvas, `M` masked positions that may be written now.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from boe_vllm.base.arrays import BoolArray, IntArray
from boe_vllm.decoding.accounting import Account, Logprobs, TokenLogprobs, Trace, infilled_runs
from boe_vllm.decoding.blocks import Blocks
from boe_vllm.decoding.cache import RequestCache
from boe_vllm.decoding.frontier import remasked_with
from boe_vllm.decoding.request_constraints import constraints_of
from boe_vllm.models.cache import CachePlan, KeyValuePool
from boe_vllm.models.special import SpecialTokens
from boe_vllm.policies.base import Commit, View, finishing
from boe_vllm.policies.choices import ChoicesPolicy
from boe_vllm.request.resolved import ResolvedRequest
from boe_vllm.sampling.frontier import FrontierGrammar
from boe_vllm.sampling.log_probs import TokenLikelihood
from boe_vllm.sampling.prefix import PrefixMatchers
from boe_vllm.sampling.statistics import RowStatistics
from boe_vllm.steering.guidance import Guidance
from boe_vllm.steering.step import NextStep


class Canvas:
    """State of one request between denoising steps."""

    def __init__(
        self,
        prompt: list[int],
        params: ResolvedRequest,
        *,
        special: SpecialTokens,
        vocab_size: int,
        pool: KeyValuePool | None = None,
        shift: int = 0,
        matchers: PrefixMatchers | None = None,
    ) -> None:
        """Append the masks and open the first block.

        Args:
            prompt: token ids.
            params: what the request asked for.
            special: ids of the mask and of the ends of text.
            vocab_size: number of tokens.
            pool: room for frozen keys and values, if the request asks for a cache.
            shift: rows by which a position's prediction lies before it.
            matchers: the parser of grammars that are read from left to right, where there is one.

        Raises:
            ValueError: when the pool has no room left, or for a grammar that nobody can read.
        """
        self.params, self.special, self.vocab_size, self.shift = params, special, vocab_size, shift
        self.config, self.plan = params.config, params.plan
        frame = self.config.frame
        self.policy = params.policy(special.eos)
        self.prompt_len = len(prompt)
        self.tokens, self.masked = self._laid_out(prompt)
        self.given = ~self.masked
        rules = params, self.prompt_len, special, matchers
        self.constraints = constraints_of(*rules) if params.constrained else None
        self.late_tokens = np.array(sorted(special.late) if frame.late else [], np.int64)
        self.account = Account()
        self.trace = Trace(len(self.tokens)) if frame.trace else None
        self.logprobs = Logprobs(params.top_logprobs) if params.logprobs else None
        guided = frame.cfg_scale > 0
        self.guide = Guidance(scale=frame.cfg_scale, given=self.given.copy()) if guided else None
        self._write_certain()
        self.masked_at_start, self.emitted = int(self.masked.sum()), 0
        self.memory, self.device_memory = dict[str, Any](), dict[str, Any]()
        self.cache: RequestCache | None = None
        if frame.cache != "none":
            assert pool is not None
            room = pool, len(self.tokens)
            self.cache = RequestCache(frame.cache, frame.cache_refresh, *room, shift)
        self.blocks = Blocks(
            self.plan,
            frame.schedule,
            self.policy,
            prompt_len=self.prompt_len,
            given=self.given,
            masked=self.masked,
        )
        self.carried: RowStatistics | None = None
        """The coming step's prediction, if the last step's look-ahead has made it already."""
        self.settled = True
        """Nothing that this block has written can be remasked any more."""

    def _laid_out(self, prompt: list[int]) -> tuple[IntArray, BoolArray]:
        tokens = np.full(len(prompt) + self.plan.gen_length, self.special.mask, np.int64)
        text = self.config.given_text and self.config.given_text.template(self.special.mask)
        given = [*prompt, *(text or [])]
        tokens[: len(given)] = given
        masked = tokens == self.special.mask
        if not self.config.frame.infill:  # then one in the prompt is a token like any other
            masked[: len(prompt)] = False
        return tokens, masked

    @property
    def visible(self) -> int:
        """Positions that the model sees: those up to the current block's end, of a canvas that
        grows."""
        return self.blocks.end if self.config.frame.canvas == "growing" else len(self.tokens)

    @property
    def frontier(self) -> FrontierGrammar | None:
        """The request's grammar, if it can only be read from left to right."""
        return None if self.constraints is None else self.constraints.frontier

    @property
    def done(self) -> bool:
        """Nothing is masked any more."""
        return not self.masked.any()

    # ---- what the coming step computes ---------------------------------------------------------

    def writable(self) -> IntArray:
        """[M] positions of the current block that are masked, ascending."""
        return self.blocks.writable(self.masked)

    def cache_plan(self, ahead: int = 0) -> CachePlan | None:
        """What the coming pass, or one `ahead` of it, stores or reads; None without a cache."""
        if self.cache is None:
            return None
        return self.cache.plan(
            block=self.blocks.index,
            block_step=self.blocks.step + ahead,
            block_positions=self.blocks.positions,
            length=self.visible,
        )

    def draw(self, ahead: int = 0) -> int:
        """Which random numbers draw the tokens of the coming step, or of one `ahead` of it."""
        return 0 if self.policy.needs().same_draws else self.account.denoising_steps + ahead

    def next_step(self) -> NextStep:
        """How the step after the coming one would be computed, if it stays in this block."""
        return NextStep(
            temperature=self.params.temperature,
            seed=self.params.seed,
            step=self.draw(ahead=1),
            constraints=self.constraints,
            top_logprobs=self.params.logprobs_per_row,
            cache=self.cache_plan(ahead=1),
        )

    def release(self) -> None:
        """Give back what the request holds outside its canvas."""
        if self.cache is not None:
            self.cache.release()

    # ---- a commit ------------------------------------------------------------------------------

    def apply(
        self,
        commit: Commit,
        view: View,
        rows: slice,
        statistics: RowStatistics,
        likelihoods: Mapping[int, TokenLikelihood] = MappingProxyType({}),
    ) -> None:
        """Write and remask what the policy decided, and note it.

        Args:
            commit: the decision.
            view: what it was made on.
            rows: of the statistics that are this request's.
            statistics: of the step's forward, or carried over.
            likelihoods: if the request asked for log-probabilities, those of written tokens that
                are not their rows' proposals, by index into the view's positions.

        Raises:
            ValueError: for a decision that no rule may make.
        """
        if self.blocks.last_step and self.frontier is None:
            commit = finishing(commit, view)
        chosen = commit.chosen
        positions = view.positions[chosen]
        tokens = view.proposal[chosen] if commit.tokens is None else commit.tokens
        if self.constraints is not None:
            stand = self.constraints.standing(self.tokens, self.masked, positions, tokens)
            chosen, positions, tokens = chosen[stand], positions[stand], tokens[stand]
        if len(chosen) == 0 and len(commit.remask) == 0 and not commit.idle:
            raise ValueError(f"policy {self.policy.name!r} decided nothing in step {view.step}")
        self.tokens[positions] = tokens
        self.masked[positions] = False
        if self.trace is not None:
            self.trace.note(
                positions,
                step=view.step,
                entropy=statistics.entropy[rows][chosen],
                confidence=statistics.confidence[rows][chosen],
                scores=None if commit.scores is None else commit.scores[chosen],
            )
        if self.logprobs is not None:
            others = {n: likelihoods[n] for n in chosen[tokens != view.proposal[chosen]].tolist()}
            self.logprobs.note(positions, statistics, rows.start + chosen, chosen, others)
        self._remask(commit.remask)
        done = self.blocks.complete(self.masked)
        if done or not self.policy.config.rewrites:
            self._write_certain()
        self.account.denoising_steps += 1
        self.blocks.step += 1
        self.settled = commit.settled
        self._carry(commit.carry)
        if done or self.blocks.complete(self.masked):
            self.carried, self.settled = None, True
            self.blocks.advance(self.masked)

    def _write_certain(self) -> None:
        """Write what a grammar leaves no choice about, which is from now on as good as given."""
        if self.constraints is None:
            return
        certain = self.constraints.certain(self.tokens, self.masked)
        positions = np.array(list(certain), np.int64)
        self.tokens[positions], self.masked[positions] = list(certain.values()), False
        self.given[positions] = True
        if self.trace is not None:
            self.trace.note_given(positions, step=self.account.denoising_steps)

    def _remask(self, positions: IntArray) -> None:
        sent = (positions >= self.prompt_len) & (positions < self.prompt_len + self.emitted)
        if sent.any() or not np.isin(positions, self.blocks.positions).all():
            raise ValueError(
                f"policy {self.policy.name!r} remasked positions that may not change any more: "
                f"expected some of {self.blocks.positions.tolist()} that are not sent, got "
                f"{positions.tolist()}"
            )
        if self.frontier is not None:
            positions = remasked_with(positions, self)
        self.tokens[positions] = self.special.mask
        self.masked[positions] = True
        if self.trace is not None:
            self.trace.forget(positions)

    def _carry(self, prediction: RowStatistics | None) -> None:
        """Keep the coming step's prediction, unless its forward is needed all the same."""
        plan = self.cache_plan()
        refresh = plan is not None and plan.refresh
        # A write may have changed the constraints that the prediction was made by, and no
        # look-ahead predicts what is written already.
        constraints = self.constraints
        stale = refresh or (constraints is not None and constraints.depends_on_tokens)
        stale = stale or self.policy.needs().revision
        self.carried = None if stale else prediction
        if self.carried is not None and len(self.carried.proposal) != len(self.writable()):
            raise ValueError(
                f"policy {self.policy.name!r} carried a prediction of another state: expected one "
                f"of {len(self.writable())} masks, got {len(self.carried.proposal)}"
            )

    # ---- output --------------------------------------------------------------------------------

    def emit(self) -> list[int]:
        """Tokens by which the longest committed prefix of the canvas has grown."""
        start = self.prompt_len + self.emitted
        ahead = self.masked[start:]
        grown = int(ahead.argmax()) if ahead.any() else len(ahead)
        if self.masked[: self.prompt_len].any():  # infilling: what comes before is not written yet
            grown = 0
        if not self.settled:  # what this block has written may still be remasked
            grown = max(0, min(grown, self.blocks.start - start))
        self.emitted += grown
        return self.tokens[start : start + grown].tolist()

    def emitted_logprobs(self, count: int) -> list[TokenLogprobs] | None:
        """Log-probabilities of the last `count` emitted tokens, if the request asks for any."""
        if self.logprobs is None:
            return None
        end = self.prompt_len + self.emitted
        return self.logprobs.of(range(end - count, end), self.tokens, self.given)

    def report(self) -> dict[str, Any]:
        """What the request has cost and, with `trace`, how each position was committed."""
        report: dict[str, Any] = {"policy": self.config.policy, **dataclasses.asdict(self.account)}
        if self.trace is not None:
            report["trace"] = self.trace.report(self.tokens, self.prompt_len)
        if not self.given[: self.prompt_len].all():
            given, masked = (at[: self.prompt_len] for at in (self.given, self.masked))
            report["infill"] = infilled_runs(self.tokens, given, masked)
        if isinstance(self.policy, ChoicesPolicy):
            report |= self.policy.report(self.memory)
        return report
