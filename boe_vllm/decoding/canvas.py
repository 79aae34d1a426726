"""The canvas of one request: its tokens, what is masked, its blocks, and what it has cost.

LLaDA's block-wise decoding (ML-GSAI/LLaDA `generate.py`): masks are appended to the prompt, split
into blocks and written block by block from left to right; a block with `m` masks and `S` steps
writes `m // S` tokens a step and one more in each of the first `m % S` steps. Masks inside the
prompt are written with the first block.

Legend: `L` positions of prompt and canvas, `M` masked positions that may be written now.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from boe_vllm.base.arrays import IntArray
from boe_vllm.decoding.accounting import (
    Account,
    TokenLikelihood,
    TokenLogprobs,
    Trace,
    given_logprobs,
    token_logprobs,
)
from boe_vllm.decoding.blocks import Blocks
from boe_vllm.models.cache import CachePlan, KeyValuePool, RequestCache
from boe_vllm.policies import Policy, load_policy
from boe_vllm.policies.base import Commit, View, finishing
from boe_vllm.policies.choices import ChoicesPolicy
from boe_vllm.request.config import SamplerConfig
from boe_vllm.request.resolved import ResolvedRequest
from boe_vllm.sampling import randomness
from boe_vllm.sampling.canvas_constraints import CanvasConstraints
from boe_vllm.sampling.constraints import Constraint
from boe_vllm.sampling.statistics import RowStatistics
from boe_vllm.steering.guidance import Guidance
from boe_vllm.steering.step import NextStep


class Canvas(Blocks):
    """State of one request between denoising steps."""

    def __init__(
        self,
        prompt: list[int],
        params: ResolvedRequest,
        *,
        mask_token_id: int,
        eos_token_id: int,
        vocab_size: int,
        late_tokens: frozenset[int],
        pool: KeyValuePool | None = None,
    ) -> None:
        """Append the masks and open the first block.

        Args:
            prompt: token ids.
            params: the request's settings.
            mask_token_id: id of the mask.
            eos_token_id: id of EOS.
            vocab_size: number of tokens.
            late_tokens: EOS and EoT, for `confidence_eos_eot_inf`.
            pool: room for frozen keys and values, if the request queries for a cache.

        Raises:
            ValueError: when the pool has no room left.
        """
        self.params = params
        self.config, self.plan = params.config, params.plan
        given_text = self.config.given_text
        self.policy = policy_of(self.config, eos_token_id, params.token_constraints.rule)
        self.vocab_size = vocab_size
        self.late_tokens = np.array(sorted(late_tokens))
        self.prompt_len = len(prompt)
        self.tokens: IntArray = np.full(
            self.prompt_len + self.plan.gen_length, mask_token_id, np.int64
        )
        self.tokens[: self.prompt_len] = prompt
        template = given_text.template(mask_token_id) or []
        self.tokens[self.prompt_len : self.prompt_len + len(template)] = template
        self.masked = self.tokens == mask_token_id
        self.given = ~self.masked
        never = eos_token_id if self.config.frame.logits_eos_inf else None
        self.constraints = CanvasConstraints(params.token_constraints, self.prompt_len, never=never)
        self.mask_token_id = mask_token_id
        self.masked_at_start = int(self.masked.sum())
        self.memory: dict[str, Any] = {}
        self.device_memory: dict[str, Any] = {}
        scale = self.config.frame.cfg_scale
        self.guide = Guidance(scale=scale, given=self.given) if scale > 0 else None
        self.account = Account()
        self.emitted = 0
        length = len(self.tokens)
        self.trace = Trace(length)
        self.logprobs_of: dict[int, TokenLogprobs] = {}
        self.cache: RequestCache | None = None
        if self.config.frame.cache != "none":
            assert pool is not None
            frame = self.config.frame
            self.cache = RequestCache(frame.cache, frame.cache_refresh, pool, length)
        self._next_block()

    # ---- passes ----------------------------------------------------------------------------------

    def cache_plan(self, ahead: int = 0) -> CachePlan | None:
        """What the coming pass, or one `ahead` of it, stores or reads; None without a cache."""
        if self.cache is None:
            return None
        return self.cache.plan(
            block=self.block,
            block_step=self.block_step + ahead,
            block_positions=self.block_positions,
        )

    def release(self) -> None:
        """Give back what the request holds outside its canvas."""
        if self.cache is not None:
            self.cache.release()

    # ---- a step --------------------------------------------------------------------------------

    def uniforms(self, positions: IntArray) -> np.ndarray:
        """[M] the random numbers behind the proposals of this step."""
        return randomness.uniforms(
            self.params.seed,
            step=self.account.denoising_steps,
            positions=positions,
            stream=randomness.WRITE,
        )

    def next_step(self) -> NextStep:
        """How the step after the coming one would be computed, if it stays in this block."""
        return NextStep(
            temperature=self.params.temperature,
            seed=self.params.seed,
            step=self.account.denoising_steps + 1,
            constraints=self.constraints,
            top_logprobs=self.params.logprobs * max(1, self.params.top_logprobs),
            cache=self.cache_plan(ahead=1),
        )

    def apply(
        self,
        commit: Commit,
        view: View,
        rows: slice,
        statistics: RowStatistics,
        likelihood: Callable[[int, int], TokenLikelihood] | None = None,
    ) -> None:
        """Write and remask what the policy decided, and note it.

        Args:
            commit: the decision.
            view: what it was made on.
            rows: of the statistics that are this request's.
            statistics: of the step's forward, or carried over.
            likelihood: of (row, token), for a token that is not its row's proposal.

        Raises:
            ValueError: for a decision that no rule may make.
        """
        if self.block_step + 1 >= self.step_limit:
            commit = finishing(commit, view)
        chosen = commit.chosen
        positions = view.positions[chosen]
        tokens = view.proposal[chosen] if commit.tokens is None else commit.tokens
        if self.constraints.any:
            stand = self.constraints.standing(self.tokens, self.masked, positions, tokens)
            chosen, positions, tokens = chosen[stand], positions[stand], tokens[stand]
        if len(chosen) == 0 and len(commit.remask) == 0 and not commit.idle:
            raise ValueError(f"policy {self.policy.name!r} decided nothing in step {view.step}")
        self.tokens[positions] = tokens
        self.masked[positions] = False
        self.trace.note(
            positions,
            step=view.step,
            entropy=view.entropy[chosen],
            confidence=statistics.confidence[rows][chosen],
            scores=None if commit.scores is None else commit.scores[chosen],
        )
        if self.params.logprobs:
            for index, position, token in zip(chosen, positions, tokens, strict=True):
                row, other = rows.start + int(index), None
                if token != view.proposal[index]:
                    assert likelihood is not None
                    other = likelihood(row, int(token))
                self.logprobs_of[int(position)] = token_logprobs(
                    statistics, row, self.params.top_logprobs, other
                )
        self._remask(commit.remask)
        self.account.denoising_steps += 1
        self.block_step += 1
        self.settled = commit.settled
        self._carry(commit.carry)
        if not self.masked[self.block_start : self.block_end].any():
            self._next_block()

    def _remask(self, positions: IntArray) -> None:
        sent = (positions >= self.prompt_len) & (positions < self.prompt_len + self.emitted)
        if sent.any() or not np.isin(positions, self.block_positions).all():
            raise ValueError(
                f"policy {self.policy.name!r} remasked positions that may not change any more: "
                f"expected some of {self.block_positions.tolist()} that are not sent, got "
                f"{positions.tolist()}"
            )
        self.tokens[positions] = self.mask_token_id
        self.masked[positions] = True
        self.trace.forget(positions)

    def _carry(self, prediction: RowStatistics | None) -> None:
        """Keep the coming step's prediction, unless its forward has to refresh the cache."""
        plan = self.cache_plan()
        refresh = plan is not None and plan.refresh
        # A write may have changed the rules that the prediction was made by.
        self.carried = None if refresh or self.constraints.depends_on_tokens else prediction
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
            grown = max(0, min(grown, self.block_start - start))
        self.emitted += grown
        return self.tokens[start : start + grown].tolist()

    def emitted_logprobs(self, count: int) -> list[TokenLogprobs]:
        """Log-probabilities of the last `count` emitted tokens."""
        end = self.prompt_len + self.emitted
        return [
            given_logprobs(int(self.tokens[position]))
            if self.given[position]
            else self.logprobs_of[position]
            for position in range(end - count, end)
        ]

    def report(self) -> dict[str, Any]:
        """What the request has cost and, with `trace`, how each position was committed."""
        report: dict[str, Any] = {"policy": self.config.policy, **dataclasses.asdict(self.account)}
        if self.config.frame.trace:
            report["trace"] = self.trace.report(self.tokens, self.prompt_len)
        if not self.given[: self.prompt_len].all():
            report["infill"] = self._infill()
        if isinstance(self.policy, ChoicesPolicy):
            report |= self.policy.report(self.memory)
        return report

    def _infill(self) -> list[dict[str, Any]]:
        """What was written into the prompt, one entry for each run of masks."""
        places = np.flatnonzero(~self.given[: self.prompt_len])
        runs = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
        return [
            {"position": int(run[0]), "tokens": self.tokens[run].tolist()}
            for run in runs
            if not self.masked[run].any()
        ]


def policy_of(config: SamplerConfig, eos_token_id: int, rule: Constraint) -> Policy:
    """What decodes a request; the rule's filters are those of a draw among given answers."""
    answers = config.given_text.answers()
    if answers is not None:
        return ChoicesPolicy(answers, eos_token_id, rule)
    return load_policy(config.policy)(config.settings)
