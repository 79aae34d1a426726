"""What requests cost, how each of their positions was committed, and what engine steps did, and
how long it took.

Counters are whole numbers by key, since they travel from the worker to the server among vLLM's own
statistics: seconds as microseconds, entropies as hundredths of a nat.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from boe_vllm.base.arrays import BoolArray, FloatArray, IntArray
from boe_vllm.sampling.log_probs import TokenLikelihood
from boe_vllm.sampling.statistics import RowStatistics
from boe_vllm.steering.step import QueryResult

PREFIX = "boe/"
MICRO, CENTI = 1_000_000, 100


@dataclasses.dataclass(slots=True)
class Account:
    """What a request has cost: its own passes and rows, whatever ran beside it."""

    denoising_steps: int = 0
    forwards: int = 0
    backwards: int = 0
    rows_forward: int = 0
    rows_backward: int = 0

    def charge(self, result: QueryResult[Any]) -> None:
        """Add what the answer to a query has cost."""
        self.forwards += result.forwards
        self.backwards += result.backwards
        self.rows_forward += result.rows_forward
        self.rows_backward += result.rows_backward


COSTS = ("forwards", "backwards", "rows_forward", "rows_backward")


def total_costs(accounts: Iterable[Account]) -> dict[str, int]:
    """Passes and rows of several requests together."""
    accounts = list(accounts)
    return {name: sum(getattr(account, name) for account in accounts) for name in COSTS}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprobs:
    """Log-probabilities of one committed token at its commit, nats."""

    token_ids: list[int]
    """The committed token, then the most likely ones."""
    logprobs: list[float]
    rank: int
    """Rank of the committed token, 1 is the most likely."""


class Logprobs:
    """Log-probabilities of the tokens of a request that asks for them, at their commits."""

    def __init__(self, top: int) -> None:
        """With so many of the most likely tokens beside each."""
        self.top = top
        self._noted: dict[int, TokenLogprobs] = {}

    def note(
        self,
        positions: IntArray,
        statistics: RowStatistics,
        rows: IntArray,
        index: IntArray,
        others: Mapping[int, TokenLikelihood],
    ) -> None:
        """Positions are committed.

        Args:
            positions: which.
            statistics: of the step.
            rows: of them, one for each position.
            index: of each position in the view.
            others: the token that is written where it is not its row's proposal, by index.
        """
        for position, row, n in zip(positions.tolist(), rows.tolist(), index.tolist(), strict=True):
            self._noted[position] = _token_logprobs(statistics, row, self.top, others.get(n))

    def of(self, positions: range, tokens: IntArray, given: BoolArray) -> list[TokenLogprobs]:
        """Those of some committed positions; what the request itself has put there is certain.

        Args:
            positions: of prompt and canvas.
            tokens: of all of them.
            given: of all of them, whether they came with the request.
        """
        return [
            TokenLogprobs(token_ids=[int(tokens[n])], logprobs=[0.0], rank=1)
            if given[n]
            else self._noted[n]
            for n in positions
        ]


def _token_logprobs(
    statistics: RowStatistics, row: int, top: int, other: TokenLikelihood | None
) -> TokenLogprobs:
    """Of one row, with its `top` most likely tokens; `other` is the token that is written, if it is
    not the row's proposal."""
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

    def note_given(self, positions: IntArray, *, step: int) -> None:
        """Positions hold the only tokens that they can."""
        certain = np.ones(len(positions))
        self.note(positions, step=step, entropy=0 * certain, confidence=certain, scores=None)

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


def infilled_runs(tokens: IntArray, given: BoolArray, masked: BoolArray) -> list[dict[str, Any]]:
    """What was written into a prompt, one entry for each run of masks.

    Args:
        tokens: of prompt and canvas.
        given: of the prompt's positions, those that came with a token.
        masked: of the prompt's positions, those that are still to be written.
    """
    places = np.flatnonzero(~given)
    runs = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
    return [
        {"position": int(run[0]), "tokens": tokens[run].tolist()}
        for run in runs
        if not masked[run].any()
    ]


class Clock:
    """Seconds of engine steps by part since the last reading, as a process sees them: each moment
    counts for one part only, since an inner part interrupts the outer one.

    On a device that works asynchronously, a part lasts until the host has its numbers.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside for `name`."""
        self._pass()
        self._open.append(name)
        try:
            yield
        finally:
            self._pass()
            self._open.pop()

    def read(self) -> dict[str, float]:
        """The seconds so far, which start again from 0."""
        seconds, self.seconds = self.seconds, {}
        return seconds

    def _pass(self) -> None:
        now = time.perf_counter()
        if self._open:
            name = self._open[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self._since = now


class Counters:
    """What engine steps have done since the last reading, for the server's metrics."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def step(self, policy: str, *, committed: int, left: FloatArray) -> None:
        """One request has made a denoising step.

        Args:
            policy: its name.
            committed: masked positions before the step less those after it.
            left: entropies of the block's positions that the step leaves masked, nats.
        """
        self.counts[f"denoising_steps/{policy}"] += 1
        if committed > 0:  # else the step took more back than it wrote
            self.counts["committed_tokens"] += committed
        self.counts[f"tokens_per_step/{max(committed, 0)}"] += 1
        if len(left):
            self.counts[f"remaining_entropy/{round(float(left.mean()) * CENTI)}"] += 1

    def cost(self, before: Mapping[str, int], after: Mapping[str, int]) -> None:
        """Passes and rows of all requests, as sums before and after a step."""
        for name in COSTS:
            self.counts[name] += after[name] - before[name]

    def time(self, seconds: Mapping[str, float]) -> None:
        """Seconds by part."""
        for name, value in seconds.items():
            self.counts[f"seconds/{name}"] += round(value * MICRO)

    def read(self) -> dict[str, int]:
        """The counts so far, which start again from 0."""
        counts, self.counts = self.counts, Counter()
        return {PREFIX + key: value for key, value in counts.items()}


def _rounded(values: np.ndarray) -> list[float | None]:
    """Six decimals; None where there is no finite value (JSON has no NaN)."""
    return [round(float(v), 6) if np.isfinite(v) else None for v in values]
