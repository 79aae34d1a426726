"""What one request has cost, and how each of its positions was committed."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from boe_vllm.base.arrays import FloatArray, IntArray
from boe_vllm.sampling.statistics import RowStatistics


@dataclasses.dataclass(slots=True)
class Account:
    """What a request has cost: its own passes and rows, whatever ran beside it."""

    denoising_steps: int = 0
    forwards: int = 0
    backwards: int = 0
    rows_forward: int = 0
    rows_backward: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprobs:
    """Log-probabilities of one committed token at its commit, nats."""

    token_ids: list[int]
    """The committed token, then the most likely ones."""
    logprobs: list[float]
    rank: int
    """Rank of the committed token, 1 is the most likely."""


class TokenLikelihood(NamedTuple):
    """How likely one token is in one row."""

    token: int
    logprob: float
    rank: int


def given_logprobs(token: int) -> TokenLogprobs:
    """Of a token that the request itself put on the canvas: certain."""
    return TokenLogprobs(token_ids=[token], logprobs=[0.0], rank=1)


def token_logprobs(
    statistics: RowStatistics, row: int, top: int, other: TokenLikelihood | None = None
) -> TokenLogprobs:
    """The log-probabilities of one row, with its `top` most likely tokens.

    Args:
        statistics: of the step.
        row: of them.
        top: how many.
        other: the token that is written, if it is not the row's proposal.
    """
    if other is None:
        with np.errstate(divide="ignore"):  # a probability may underflow
            value = float(np.log(statistics.confidence[row]))
        other = TokenLikelihood(int(statistics.proposal[row]), value, int(statistics.rank[row]))
    tokens, values = [other.token], [other.logprob]
    if statistics.top_tokens is not None and statistics.top_logprobs is not None:
        tokens += statistics.top_tokens[row, :top].tolist()
        values += statistics.top_logprobs[row, :top].tolist()
    return TokenLogprobs(token_ids=tokens, logprobs=values, rank=other.rank)


class Trace:
    """The step at which each position was last committed, with its statistics then."""

    def __init__(self, length: int) -> None:
        """Of `length` positions, none committed yet."""
        self.step = np.full(length, -1)
        self.entropy, self.confidence, self.score = np.full((3, length), np.nan)

    def note(
        self,
        positions: IntArray,
        *,
        step: int,
        entropy: FloatArray,
        confidence: FloatArray,
        scores: FloatArray | None,
    ) -> None:
        """Positions are committed."""
        self.step[positions] = step
        self.entropy[positions] = entropy
        self.confidence[positions] = confidence
        self.score[positions] = np.nan if scores is None else scores

    def forget(self, positions: IntArray) -> None:
        """Positions are masked again."""
        self.step[positions] = -1
        for noted in (self.entropy, self.confidence, self.score):
            noted[positions] = np.nan

    def report(self, tokens: IntArray, prompt_len: int) -> dict[str, Any]:
        """Plain values for every committed position, counted from the start of the canvas."""
        committed = np.flatnonzero(self.step >= 0)
        return {
            "position": (committed - prompt_len).tolist(),
            "token": tokens[committed].tolist(),
            "step": self.step[committed].tolist(),
            "entropy": _rounded(self.entropy[committed]),
            "confidence": _rounded(self.confidence[committed]),
            "score": _rounded(self.score[committed]),
        }


def _rounded(values: np.ndarray) -> list[float | None]:
    """Six decimals; None where there is no finite value (JSON has no NaN)."""
    return [round(float(v), 6) if np.isfinite(v) else None for v in values]
