"""From hidden states to what policies see: statistics of the logit rows, tile by tile.

The order of operations from hidden states to the token that is proposed:

1. Logits, one product with the vocabulary; the conditional and the unconditional hidden states of a
   guided sequence have been combined before (`steering.guidance`).
2. The mask token is ruled out.
3. `allowed_token_ids`, then `logit_bias`, then banned tokens (`bad_words`, `min_tokens`,
   `logits_eos_inf`) edit the logits (`sampling.constraints`).
4. Softmax: entropy, confidence and margin of every row are taken here, without temperature.
5. At temperature 0 the argmax is proposed. Above it, `softmax(logits / temperature)` is filtered by
   `min_p`, `top_k` and `top_p`, and one random number per row draws by inversion.
6. Where the request asks for it, confidences of late tokens become -inf (`confidence_eos_eot_inf`,
   in the view that a policy gets).

The vocabulary is large (126,464 for LLaDA-8B), so logits exist only for the rows that were asked
for and never as a whole: no tensor of rows x V grows beyond a budget of bytes.

Legend: `R` logit rows, `r` rows of one tile, `V` vocabulary, `D` width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from boe_vllm.base.arrays import BoolArray, FloatArray, IntArray
from boe_vllm.models.functional import Scratch, accurate
from boe_vllm.sampling.constraints import NEVER, Constraint, ConstraintTable
from boe_vllm.sampling.distributions import Summary, VocabularyMemory, normalise_

Tensor = torch.Tensor

DEFAULT_BUDGET_BYTES = 256 * 2**20


class VocabularyModel(Protocol):
    """The part of the network that knows the vocabulary."""

    vocab_size: int

    def logits(self, hidden_RD: Tensor, scratch: Scratch | None = None) -> Tensor:
        """[R, V] logits of normalised hidden states, in `scratch` if it is given."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RowWrites:
    """How each logit row's token is to be proposed (host arrays)."""

    temperature: FloatArray
    """[R] 0 takes the argmax, otherwise a sample from softmax(logits / temperature)."""
    uniform: FloatArray
    """[R] the random number in (0, 1) behind the sample."""
    top_logprobs: int = 0
    """Most likely tokens to report per row."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RowStatistics:
    """Statistics of the logit rows on the host; entropies in nats."""

    proposal: IntArray
    """[R] token that would be written; never the mask token."""
    confidence: FloatArray
    """[R] untempered probability of the proposal."""
    margin: FloatArray
    """[R] largest less second largest probability."""
    entropy: FloatArray
    """[R] entropy."""
    finite: BoolArray
    """[R] whether the logits were finite."""
    rank: IntArray
    """[R] rank of the proposal among all tokens, 1 is the most likely; 0 if not asked for."""
    top_tokens: IntArray | None
    """[R, k] most likely tokens, if asked for."""
    top_logprobs: FloatArray | None
    """[R, k] their log-probabilities, nats."""

    def part(self, rows: slice) -> RowStatistics:
        """The statistics of some of the rows."""
        values: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        cut: dict[str, Any] = {n: None if v is None else v[rows] for n, v in values.items()}
        return RowStatistics(**cut)


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
        eos_token_id: int,
        constraint_R: BoolArray | IntArray,
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
            eos_token_id: of EOS.
            constraint_R: [R] each row's constraint: 0 for none, n for the n-th of the table.
            table: the pass's constraints, which may still grow; None for one that bans EOS.
            score_grid: statistics are rounded to multiples of this; None leaves them as they are.
            budget_bytes: largest temporary.
            memory: for one pass at a time; its own by default.
        """
        self.memory = memory or VocabularyMemory()
        self.model = model
        self.hidden_RD = hidden_RD
        self.mask_token_id = mask_token_id
        self.eos_token_id = eos_token_id
        self.constraint_R = constraint_R.astype(np.int64)
        self.table = table or ConstraintTable(
            [Constraint(banned_token_ids=np.array([eos_token_id]))]
        )
        self.score_grid = score_grid
        item = 8 if hidden_RD.dtype == torch.float64 else 4
        # A tile and its probabilities exist at the same time, hence a quarter for each tile.
        self.tile_rows = max(1, budget_bytes // (4 * item * model.vocab_size))
        self.budget_bytes = budget_bytes
        self.keeps = len(hidden_RD) * model.vocab_size * item <= budget_bytes // 2
        self._saved_rows: Tensor | None = None

    def of(self, hidden_RD: Tensor, constraint_R: BoolArray | IntArray) -> LogProbabilities:
        """The same table for the hidden states of another pass."""
        return LogProbabilities(
            self.model,
            hidden_RD,
            mask_token_id=self.mask_token_id,
            eos_token_id=self.eos_token_id,
            constraint_R=constraint_R,
            table=self.table,
            score_grid=self.score_grid,
            budget_bytes=self.budget_bytes,
        )

    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """All rows as (rows, [r, V]) tiles."""
        for rows, tile, _ in self.summaries():
            yield rows, tile

    def summaries(self, keep: bool = False) -> Iterator[tuple[slice, Tensor, Summary]]:
        """All rows as (rows, [r, V], summary) tiles; `keep` retains them for `rows` if they fit."""
        keep = keep and self.keeps
        scratch = self.memory.log_probs if len(self.hidden_RD) <= self.tile_rows else None
        kept = []
        for start in range(0, len(self.hidden_RD), self.tile_rows):
            rows = slice(start, min(start + self.tile_rows, len(self.hidden_RD)))
            tile, summary = self._compute(self.hidden_RD[rows], self.constraint_R[rows], scratch)
            if keep:
                kept.append(tile)
            yield rows, tile, summary
        if keep and kept:
            self._saved_rows = torch.cat(kept) if len(kept) > 1 else kept[0]

    def rows(self, index_N: IntArray) -> Iterator[tuple[slice, Tensor]]:
        """The given rows as (places within `index_N`, [r, V]) tiles, to be read only."""
        for start in range(0, len(index_N), self.tile_rows):
            places = slice(start, min(start + self.tile_rows, len(index_N)))
            chosen = _as_index(index_N[places], self.hidden_RD.device)
            if self._saved_rows is not None:
                yield places, self._saved_rows[chosen]
            else:
                hidden_rD, constraint_r = self.hidden_RD[chosen], self.constraint_R[index_N[places]]
                yield places, self._compute(hidden_rD, constraint_r)[0]

    def filter(self, p_rV: Tensor, rows_r: IntArray) -> Tensor:
        """[r, V] tempered probabilities of some rows, 0 where a row's sample may not be."""
        numbers = self.constraint_R[rows_r]
        if numbers.any():
            for constraint, rows in self.table.rows(numbers, p_rV.device):
                if constraint.filters:
                    p_rV[rows] = constraint.filter(p_rV[rows])
        return p_rV

    def likelihood(self, row: int, token: int) -> TokenLikelihood:
        """How likely a token is in one row."""
        ((_, logp_1V),) = self.rows(np.array([row]))
        value = logp_1V[0, token]
        return TokenLikelihood(token, float(value), int((logp_1V[0] > value).sum()) + 1)

    def _compute(
        self, hidden_rD: Tensor, constraint_r: IntArray, scratch: Scratch | None = None
    ) -> tuple[Tensor, Summary]:
        logits = accurate(self.model.logits(hidden_rD, scratch))
        logits[:, self.mask_token_id] = NEVER
        if constraint_r.any():
            for constraint, rows in self.table.rows(constraint_r, logits.device):
                if constraint.edits:
                    constraint.edit(logits, rows)
        return logits, normalise_(logits)


def read_statistics(
    log_probs: LogProbabilities, writes: RowWrites, *, keep: bool = False
) -> RowStatistics:
    """Statistics of all logit rows, with one transfer to the host.

    Args:
        log_probs: of the pass.
        writes: how tokens are proposed.
        keep: retain the log-probabilities for a later pass over some rows.
    """
    columns, tops = [], []
    k = writes.top_logprobs
    for rows, logp, found in log_probs.summaries(keep):
        proposal = _propose(logp, found.argmax, writes, rows, log_probs)
        chosen = logp.gather(-1, proposal[:, None])
        rank = (logp > chosen).sum(-1) + 1 if k else torch.zeros_like(proposal)
        columns.append(
            torch.stack(
                [
                    proposal.double(),
                    chosen[:, 0].double().exp(),
                    found.best.double().exp() - found.second.double().exp(),
                    found.entropy.double(),
                    torch.isfinite(found.entropy).double(),
                    rank.double(),
                ]
            )
        )
        if k:
            values, tokens = logp.topk(k, dim=-1)
            tops.append(torch.stack([tokens.double(), values.double()]))
    table = torch.cat(columns, dim=1).cpu().numpy() if columns else np.zeros((6, 0))
    top = torch.cat(tops, dim=1).cpu().numpy() if tops else None
    confidence, margin, entropy = on_grid(table[1:4], log_probs.score_grid)
    return RowStatistics(
        proposal=table[0].astype(np.int64),
        confidence=confidence,
        margin=margin,
        entropy=entropy,
        finite=table[4] > 0,
        rank=table[5].astype(np.int64),
        top_tokens=None if top is None else top[0].astype(np.int64),
        top_logprobs=None if top is None else top[1],
    )


def on_grid(values: FloatArray, grid: float | None) -> FloatArray:
    """The values as multiples of `grid`, so that rounding noise below it decides nothing."""
    return values if grid is None else np.round(values / grid) * grid


def _propose(
    logp_rV: Tensor,
    argmax_r: Tensor,
    writes: RowWrites,
    tile: slice,
    log_probs: LogProbabilities,
) -> Tensor:
    """[r] argmax, or a sample by inversion of the tempered distribution where temperature > 0.

    One random number per row is enough, and the same number gives the same token in any batch.
    """
    temperature_r, uniform_r = writes.temperature[tile], writes.uniform[tile]
    sampled = np.flatnonzero(temperature_r > 0)
    if len(sampled) == 0:
        return argmax_r
    device = logp_rV.device
    rows = torch.from_numpy(sampled).to(device)
    temperature = torch.from_numpy(temperature_r[sampled]).to(device)
    uniform = torch.from_numpy(uniform_r[sampled]).to(device)
    p = torch.softmax(logp_rV[rows].double() / temperature[:, None], -1)
    weights = log_probs.filter(p, tile.start + sampled).cumsum(-1)
    tokens = torch.searchsorted(weights, (uniform * weights[:, -1])[:, None], right=True)[:, 0]
    proposal = argmax_r.clone()
    proposal[rows] = tokens.clamp_(max=logp_rV.shape[-1] - 1)
    return proposal


def _as_index(index_N: IntArray, device: torch.device) -> slice | Tensor:
    """The rows as a range where they are one, which reads them without a copy."""
    if len(index_N) and (np.diff(index_N) == 1).all():
        return slice(int(index_N[0]), int(index_N[-1]) + 1)
    return torch.from_numpy(index_N).to(device)
