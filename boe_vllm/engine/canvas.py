"""The canvas of one request: its tokens, what is masked, its blocks, and what it has cost.

LLaDA's block-wise decoding (ML-GSAI/LLaDA `generate.py`): masks are appended to the prompt, split
into blocks and written block by block from left to right; a block with `m` masks and `S` steps
writes `m // S` tokens a step and one more in each of the first `m % S` steps. Masks inside the
prompt are written with the first block.

Legend: `L` positions of prompt and canvas, `M` masked positions that may be written now.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from boe_vllm import randomness
from boe_vllm.arrays import IntArray
from boe_vllm.config import CanvasPlan, SamplerConfig
from boe_vllm.engine.cache import CachePlan, KeyValuePool, RequestCache
from boe_vllm.policies import Policy, load_policy
from boe_vllm.policies.base import Commit, View
from boe_vllm.prediction import RowStatistics


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RequestParams:
    """What a request asked for, resolved and validated."""

    config: SamplerConfig
    plan: CanvasPlan
    temperature: float
    """0 writes the argmax, otherwise samples from softmax(logits / temperature)."""
    seed: int
    top_logprobs: int = 0
    """Log-probabilities to report per token, beside its own."""
    logprobs: bool = False
    """Whether log-probabilities are reported at all."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprobs:
    """Log-probabilities of one committed token at its commit, nats."""

    token_ids: list[int]
    """The committed token, then the most likely ones."""
    logprobs: list[float]
    rank: int
    """Rank of the committed token, 1 is the most likely."""


@dataclasses.dataclass(slots=True)
class Account:
    """What a request has cost: its own passes and rows, whatever ran beside it."""

    denoising_steps: int = 0
    forwards: int = 0
    backwards: int = 0
    rows_forward: int = 0
    rows_backward: int = 0


class Canvas:
    """State of one request between denoising steps."""

    def __init__(
        self,
        prompt: list[int],
        params: RequestParams,
        *,
        mask_token_id: int,
        vocab_size: int,
        late_tokens: frozenset[int],
        pool: KeyValuePool | None = None,
    ) -> None:
        """Append the masks and open the first block.

        Args:
            prompt: token ids.
            params: the request's settings.
            mask_token_id: id of the mask.
            vocab_size: number of tokens.
            late_tokens: EOS and EoT, for `confidence_eos_eot_inf`.
            pool: room for frozen keys and values, if the request asks for a cache.

        Raises:
            ValueError: when the pool has no room left.
        """
        self.params = params
        self.config, self.plan = params.config, params.plan
        self.policy: Policy = load_policy(self.config.policy)(self.config.settings)
        self.vocab_size = vocab_size
        self.late_tokens = np.array(sorted(late_tokens))
        self.prompt_len = len(prompt)
        self.tokens: IntArray = np.full(
            self.prompt_len + self.plan.gen_length, mask_token_id, np.int64
        )
        self.tokens[: self.prompt_len] = prompt
        self.masked = self.tokens == mask_token_id
        self.mask_token_id = mask_token_id
        self.masked_at_start = int(self.masked.sum())
        self.memory: dict[str, Any] = {}
        self.account = Account()
        self.emitted = 0
        length = len(self.tokens)
        self.step_of = np.full(length, -1)
        self.entropy_of, self.confidence_of, self.score_of = np.full((3, length), np.nan)
        self.logprobs_of: dict[int, TokenLogprobs] = {}
        self.cache: RequestCache | None = None
        if self.config.frame.cache != "none":
            assert pool is not None
            frame = self.config.frame
            self.cache = RequestCache(frame.cache, frame.cache_refresh, pool, length)
        self.block = -1
        self._next_block()

    # ---- blocks and steps ----------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Nothing is masked any more."""
        return not self.masked.any()

    def writable(self) -> IntArray:
        """[M] positions of the current block that are masked, ascending."""
        return self.block_start + np.flatnonzero(self.masked[self.block_start : self.block_end])

    def quota(self) -> int:
        """Tokens due in this step."""
        masks = int(self.masked[self.block_start : self.block_end].sum())
        steps = self.block_steps
        due = self.block_masks // steps + (self.block_step < self.block_masks % steps)
        return min(masks, max(1, due))

    def _next_block(self) -> None:
        """Move on to the first block, from the current one, that has masks."""
        while not self.done:
            self.block += 1
            start = self.prompt_len + self.block * self.plan.block_length
            self.block_start = 0 if self.block == 0 else start
            self.block_end = min(start + self.plan.block_length, len(self.tokens))
            self.block_masks = int(self.masked[self.block_start : self.block_end].sum())
            own = np.arange(self.block_start, self.block_end)
            self.block_positions = own[self.masked[own] | (own >= self.prompt_len)]
            self.block_step = 0
            if self.block_masks:
                self.block_steps = self.plan.steps_for(self.block_masks)
                return

    def cache_plan(self) -> CachePlan | None:
        """What the coming pass stores or reads; None without a cache."""
        if self.cache is None:
            return None
        return self.cache.plan(
            block=self.block, block_step=self.block_step, block_positions=self.block_positions
        )

    def release(self) -> None:
        """Give back what the request holds outside its canvas."""
        if self.cache is not None:
            self.cache.release()

    # ---- a step --------------------------------------------------------------------------------

    def uniforms(self, positions: IntArray) -> np.ndarray:
        """[M] the random numbers behind this step's proposals."""
        return randomness.uniforms(
            self.params.seed,
            step=self.account.denoising_steps,
            positions=positions,
            stream=randomness.WRITE,
        )

    def view(self, positions: IntArray, rows: slice, statistics: RowStatistics) -> View:
        """What the policy sees; `rows` are this request's rows of the statistics."""
        proposal = statistics.proposal[rows]
        confidence = statistics.confidence[rows]
        if self.config.frame.confidence_eos_eot_inf:
            late = np.isin(proposal, self.late_tokens)
            confidence = np.where(late, -np.inf, confidence)
        return View(
            positions=positions,
            proposal=proposal,
            confidence=confidence,
            margin=statistics.margin[rows],
            entropy=statistics.entropy[rows],
            quota=self.quota(),
            masked_at_start=self.masked_at_start,
            masked_now=int(self.masked.sum()),
            step=self.account.denoising_steps,
            block_step=self.block_step,
            block_steps=self.block_steps,
            vocab_size=self.vocab_size,
            seed=self.params.seed,
            memory=self.memory,
        )

    def apply(self, commit: Commit, view: View, rows: slice, statistics: RowStatistics) -> None:
        """Write and remask what the policy decided, and note it."""
        chosen = commit.chosen
        positions = view.positions[chosen]
        tokens = view.proposal[chosen] if commit.tokens is None else commit.tokens
        if len(chosen) == 0 and len(commit.remask) == 0:
            raise ValueError(f"policy {self.policy.name!r} decided nothing in step {view.step}")
        self.tokens[commit.remask] = self.mask_token_id
        self.masked[commit.remask] = True
        self.tokens[positions] = tokens
        self.masked[positions] = False
        self.step_of[positions] = view.step
        self.entropy_of[positions] = view.entropy[chosen]
        self.confidence_of[positions] = statistics.confidence[rows][chosen]
        if commit.scores is not None:
            self.score_of[positions] = commit.scores[chosen]
        if self.params.logprobs:
            for index, position in zip(chosen, positions, strict=True):
                self.logprobs_of[int(position)] = self._logprobs(int(index), rows.start, statistics)
        self.account.denoising_steps += 1
        self.block_step += 1
        if not self.masked[self.block_start : self.block_end].any():
            self._next_block()

    def _logprobs(self, index: int, first_row: int, statistics: RowStatistics) -> TokenLogprobs:
        row = first_row + index
        tokens = [int(statistics.proposal[row])]
        values = [float(np.log(statistics.confidence[row]))]
        k = self.params.top_logprobs
        if statistics.top_tokens is not None and statistics.top_logprobs is not None:
            tokens += statistics.top_tokens[row, :k].tolist()
            values += statistics.top_logprobs[row, :k].tolist()
        return TokenLogprobs(token_ids=tokens, logprobs=values, rank=int(statistics.rank[row]))

    # ---- output --------------------------------------------------------------------------------

    def emit(self) -> list[int]:
        """Tokens by which the longest committed prefix of the canvas has grown."""
        start = self.prompt_len + self.emitted
        ahead = self.masked[start:]
        grown = int(ahead.argmax()) if ahead.any() else len(ahead)
        if self.masked[: self.prompt_len].any():  # infilling: what comes before is not written yet
            grown = 0
        self.emitted += grown
        return self.tokens[start : start + grown].tolist()

    def emitted_logprobs(self, count: int) -> list[TokenLogprobs]:
        """Log-probabilities of the last `count` emitted tokens."""
        end = self.prompt_len + self.emitted
        return [self.logprobs_of[position] for position in range(end - count, end)]

    def report(self) -> dict[str, Any]:
        """What the request has cost and, with `trace`, how each position was committed."""
        report: dict[str, Any] = {"policy": self.config.policy, **dataclasses.asdict(self.account)}
        if self.config.frame.trace:
            committed = np.flatnonzero(self.step_of >= 0)
            report["trace"] = {
                "position": (committed - self.prompt_len).tolist(),
                "token": self.tokens[committed].tolist(),
                "step": self.step_of[committed].tolist(),
                "entropy": _rounded(self.entropy_of[committed]),
                "confidence": _rounded(self.confidence_of[committed]),
                "score": _rounded(self.score_of[committed]),
            }
        return report


def _rounded(values: np.ndarray) -> list[float | None]:
    """Six decimals; None where there is no finite value (JSON has no NaN)."""
    return [round(float(v), 6) if np.isfinite(v) else None for v in values]
