"""Log-probabilities of a pass's logit rows, made tile by tile from its final hidden states.

The vocabulary is large (126,464 for LLaDA-8B), so logits exist only for the rows that were asked
for and never as a whole: no tensor of rows x V grows beyond a budget of bytes. The work on them is
memory-bound: on a CPU rows are taken a few at a time, so that they stay in its cache, and large
results lie in memory that is used again at the next step.

Legend: `R` logit rows, `r` rows of one tile, `N` any of the logit rows, `V` vocabulary, `D` width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from boe_vllm.base.arrays import IntArray
from boe_vllm.base.transfer import Arrival, Transfer
from boe_vllm.models import fused, plain
from boe_vllm.models.functional import Scratch, accurate
from boe_vllm.sampling.constraints import NEVER, ConstrainedRows, ConstraintTable

Tensor = torch.Tensor

DEFAULT_BUDGET_BYTES = 256 * 2**20
_CACHED_BYTES = 2**21
"""Rows x V that are worked on at a time on a CPU."""


@dataclasses.dataclass(frozen=True, slots=True)
class Summary:
    """What one look at the logits of some rows tells, on the device."""

    argmax: Tensor
    """[r] most likely token."""
    best: Tensor
    """[r] its log-probability, nats."""
    second: Tensor
    """[r] second largest log-probability, nats."""
    entropy: Tensor
    """[r] nats."""


class VocabularyMemory:
    """Memory that steps reuse for their rows x V: log-probabilities, and a gradient of them."""

    def __init__(self) -> None:
        self.log_probs, self.gradient = Scratch(), Scratch()


class VocabularyModel(Protocol):
    """The part of the network that knows the vocabulary."""

    vocab_size: int

    def logits(self, hidden_RD: Tensor, scratch: Scratch | None = None) -> Tensor:
        """[R, V] logits of normalised hidden states, in `scratch` if it is given."""
        ...


class TokenLikelihood(NamedTuple):
    """How likely one token is in one row."""

    token: int
    logprob: float
    """Nats."""
    rank: int
    """1 for the most likely token."""


class LogProbabilities:
    """Log-probabilities [R, V] of a pass, nats: kept if they fit the budget, else recomputed."""

    def __init__(
        self,
        model: VocabularyModel,
        hidden_RD: Tensor,
        *,
        mask_token_id: int,
        constraint_R: IntArray,
        table: ConstraintTable | None = None,
        score_grid: float | None = None,
        budget_bytes: int = DEFAULT_BUDGET_BYTES,
        memory: VocabularyMemory | None = None,
    ) -> None:
        """Read a pass's logit rows.

        Args:
            model: knows the vocabulary.
            hidden_RD: [R, D] final normalised hidden states.
            mask_token_id: never proposed.
            constraint_R: [R] each row's constraint: 0 for none, n for the n-th of the table.
            table: the pass's constraints, which may still grow; None if nothing is constrained.
            score_grid: statistics are rounded to multiples of this; None leaves them as they are.
            budget_bytes: largest temporary.
            memory: for one pass at a time; its own by default.
        """
        self.memory = memory or VocabularyMemory()
        self.model = model
        self.hidden_RD = hidden_RD
        self.mask_token_id = mask_token_id
        self.constraint_R = constraint_R
        self.table = table
        self.score_grid = score_grid
        item = 8 if hidden_RD.dtype == torch.float64 else 4
        # A tile and its probabilities exist at the same time, hence a quarter for each tile.
        self.tile_rows = max(1, budget_bytes // (4 * item * model.vocab_size))
        self.budget_bytes = budget_bytes
        self.keeps = len(hidden_RD) * model.vocab_size * item <= budget_bytes // 2
        self._saved_rows: Tensor | None = None

    def of(self, hidden_RD: Tensor, constraint_R: IntArray) -> LogProbabilities:
        """The same table for the hidden states of another pass."""
        return LogProbabilities(
            self.model,
            hidden_RD,
            mask_token_id=self.mask_token_id,
            constraint_R=constraint_R,
            table=self.table,
            score_grid=self.score_grid,
            budget_bytes=self.budget_bytes,
        )

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.hidden_RD.device

    def spans(self, count: int) -> list[slice]:
        """Tiles of that many rows."""
        starts = range(0, count, self.tile_rows)
        return [slice(start, min(start + self.tile_rows, count)) for start in starts]

    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """All rows as (rows, [r, V]) tiles."""
        for rows, tile, _ in self.summaries():
            yield rows, tile

    def summaries(
        self, keep: bool = False, transfer: Transfer | None = None
    ) -> Iterator[tuple[slice, Tensor, Summary]]:
        """All rows as (rows, [r, V], summary) tiles.

        Args:
            keep: retain the tiles for `rows`, if they fit.
            transfer: takes what the constraints need to the device.
        """
        keep = keep and self.keeps
        scratch = self.memory.log_probs if len(self.hidden_RD) <= self.tile_rows else None
        spans, kept = self.spans(len(self.hidden_RD)), []
        transfer = transfer or Transfer(self.device)
        edits = [self._edits(self.constraint_R[rows], transfer) for rows in spans]
        for rows, edit in zip(spans, edits, strict=True):
            tile, summary = self._compute(self.hidden_RD[rows], edit, scratch)
            if keep:
                kept.append(tile)
            yield rows, tile, summary
        if keep and kept:
            self._saved_rows = torch.cat(kept) if len(kept) > 1 else kept[0]

    def rows(
        self, index_N: IntArray, transfer: Transfer | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        """The given rows as (places within `index_N`, [r, V]) tiles, to be read only.

        Args:
            index_N: which of the logit rows.
            transfer: takes their numbers to the device.
        """
        transfer = transfer or Transfer(self.device)
        spans = self.spans(len(index_N))
        chosen = [_as_index(index_N[places], transfer) for places in spans]
        edits = []
        if self._saved_rows is None:
            numbers = self.constraint_R[index_N]
            edits = [self._edits(numbers[places], transfer) for places in spans]
        for n, places in enumerate(spans):
            arrival = chosen[n]
            index = arrival.tensor if isinstance(arrival, Arrival) else arrival
            if self._saved_rows is not None:
                yield places, self._saved_rows[index]
            else:
                yield places, self._compute(self.hidden_RD[index], edits[n])[0]

    def likelihoods(self, index_N: IntArray, tokens_N: IntArray) -> list[TokenLikelihood]:
        """How likely some tokens are, each in a row of its own; one read for all."""
        transfer = Transfer(self.device)
        tokens, found = transfer.add(tokens_N), []
        for places, logp_rV in self.rows(index_N, transfer):
            value = logp_rV.gather(-1, tokens.tensor[places][:, None])
            rank = (logp_rV > value).sum(-1, keepdim=True) + 1
            found.append(torch.cat([value.double(), rank.double()], dim=1))
        host = torch.cat(found).cpu().tolist() if found else []
        return [
            TokenLikelihood(token, value, int(rank))
            for token, (value, rank) in zip(tokens_N.tolist(), host, strict=True)
        ]

    def _edits(self, constraint_N: IntArray, transfer: Transfer) -> list[ConstrainedRows]:
        return [] if self.table is None else self.table.edits(constraint_N, transfer)

    def _compute(
        self, hidden_rD: Tensor, edits: Sequence[ConstrainedRows], scratch: Scratch | None = None
    ) -> tuple[Tensor, Summary]:
        logits = accurate(self.model.logits(hidden_rD, scratch))
        logits[:, self.mask_token_id] = NEVER
        for constraint, rows in edits:
            constraint.edit(logits, rows.tensor)
        return logits, normalise_(logits)


def normalise_(logits_rV: Tensor) -> Summary:
    """Turn logits into log-probabilities, in place, and summarise them on the way."""
    if logits_rV.is_cuda:
        return Summary(*fused.normalise_(logits_rV))
    parts = [plain.normalise_(logits_rV[rows]) for rows in _in_cache(logits_rV)]
    return Summary(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def entropy_gradient(logp_rV: Tensor, scratch: Scratch | None = None) -> Tensor:
    """Gradient of each row's entropy with respect to its logits: `-p (ln p + H)`, [r, V].

    With `scratch` it lies in that memory.
    """
    gradient = (scratch or Scratch()).like(logp_rV, logp_rV.shape[1])
    if logp_rV.is_cuda:
        fused.entropy_gradient_(logp_rV, gradient)
        return gradient
    for rows in _in_cache(logp_rV):
        plain.entropy_gradient_(logp_rV[rows], gradient[rows])
    return gradient


def _in_cache(x_rV: Tensor) -> Iterator[slice]:
    """The rows, as many at a time as stay in a CPU's cache."""
    rows = max(len(x_rV), 1)
    step = max(1, _CACHED_BYTES // (x_rV.shape[1] * x_rV.element_size()))
    for start in range(0, rows, step):
        yield slice(start, start + step)


def _as_index(index_N: IntArray, transfer: Transfer) -> slice | Arrival:
    """The rows as a range where they are one, which reads them without a copy."""
    if len(index_N) and (np.diff(index_N) == 1).all():
        return slice(int(index_N[0]), int(index_N[-1]) + 1)
    return transfer.add(index_N)
