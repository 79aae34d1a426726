"""Verification of drafts: each is predicted again at its masked position, the drafts before it
written, in one partial pass over two views of the drafted positions (Flash-dLLM, arXiv 2609.26796;
VILA-Lab/Flash-dLLM `generate_with_Flash_dLLM`).

Every drafted position has a row that holds its draft and one that holds the mask. The masked row of
the n-th draft attends to the drafts before it and to the masked rows from its own on; so does the
row of the draft before it, which also is what its own position holds there. No row of a position is
thus seen at the same time as the other one, and a prediction never sees its own draft directly. It
does so at second hand, through the masked rows behind it, whose states in the layers below have
seen the draft: that is the price of one pass, which the authors pay as well. The row of the last
draft would be seen by none, so that it is left out.

What is written for good in the same step is run again with the two views, and sees the masks. All
other rows keep the keys and values of the step's own pass.

Legend: `S` drafts, `w` positions written for good, `Q` packed rows of the pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from boe_vllm.base.arrays import BoolArray, FloatArray, IntArray
from boe_vllm.base.transfer import Transfer
from boe_vllm.sampling.statistics import on_grid
from boe_vllm.steering.guidance import PairMember, combined, members_of
from boe_vllm.steering.hypothetical import PartialRows, run_partial
from boe_vllm.steering.replaced import KeySet, replace_keys
from boe_vllm.steering.step import DenoisingPass, Query, QueryResult

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Verified:
    """What the masked view says of the drafts, given those before each."""

    probability: FloatArray
    """[S] of the draft."""
    agrees: BoolArray
    """[S] no token is likelier than the draft."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Verification(Query[Verified]):
    """How likely drafts are at their masked positions, each with the drafts before it written.

    Costs one forward of `w + 2 S - 1` rows, and of those at which the drafts are predicted, where
    these are others.
    """

    written: IntArray
    """[w] indices into `View.positions` that are written for good."""
    written_tokens: IntArray
    """[w] what is written there."""
    drafted: IntArray
    """[S] indices, in the order of verification; at least one."""
    drafts: IntArray
    """[S] what is drafted there."""

    @classmethod
    def solve(
        cls, current: DenoisingPass, queries: Sequence[tuple[int, Verification]]
    ) -> list[QueryResult[Verified]]:
        """Run both views of all queries in one partial pass."""
        members = members_of(current, queries)
        views = [_TwoViews(current, member) for member in members]
        hidden = _run(current, views, members, len(queries))
        numbers = [_constraints(current, s, query) for s, query in queries]
        found = current.log_probs.of(hidden, np.concatenate(numbers)).likelihoods(
            np.arange(len(hidden)), np.concatenate([query.drafts for _, query in queries])
        )
        logs = on_grid(np.array([one.logprob for one in found]), current.log_probs.score_grid)
        first = np.array([one.rank == 1 for one in found])
        results, start = [], 0
        for (s, query), own in zip(queries, views, strict=False):
            part = slice(start, start + len(query.drafts))
            start, passes = part.stop, current.passes(s)
            results.append(
                QueryResult(
                    value=Verified(probability=np.exp(logs[part]), agrees=first[part]),
                    forwards=passes,
                    rows_forward=passes * len(own.rows),
                )
            )
        return results


class _TwoViews:
    """The rows of one sequence, or of its unconditional copy: set by set, then the readers.

    A reader is the row at which a draft is predicted where that is not its own: it holds what the
    position holds once the drafts before are written, and no other row sees it.
    """

    def __init__(self, current: DenoisingPass, member: PairMember[Verification]) -> None:
        query, place = member.query, member.place
        w, many = len(query.written), len(query.drafted)
        order = np.arange(many)
        self.masked = w + 2 * order
        """[S] places of the masked rows among `rows`; each draft's row follows its masked one."""
        self.rows = np.empty(w + 2 * many - 1, np.int64)
        """[Q] by their number at the place."""
        self.tokens = np.full(len(self.rows), current.log_probs.mask_token_id)
        """[Q] what they hold."""
        self.rows[:w], self.tokens[:w] = query.written, query.written_tokens
        self.rows[self.masked] = query.drafted
        drafted = self.masked[:-1] + 1
        self.rows[drafted], self.tokens[drafted] = query.drafted[:-1], query.drafts[:-1]
        self.columns = np.concatenate([query.written, query.drafted])
        self.written = np.arange(w)
        self.sets = [self._set(n, 2 if n else w + 1) for n in range(many)]
        self.read = self.masked.copy()
        self._add_readers(current, member)
        layout = current.layout.attention
        self.span = {"kv_start": layout.kv_starts[place], "kv_len": layout.kv_seqlens[place]}

    def _set(self, n: int, queries: int) -> tuple[int, IntArray, IntArray]:
        """Rows that attend to the keys with `n` drafts written, and which rows these keys are."""
        own = np.concatenate([self.written, self.masked[:n] + 1, self.masked[n:]])
        return queries, self.columns, own

    def _add_readers(self, current: DenoisingPass, member: PairMember[Verification]) -> None:
        query, place = member.query, member.place
        read_rows = current.read_rows(place, query.drafted)
        if (read_rows == query.drafted).all():
            return
        tokens = current.sequences[member.source].tokens.copy()
        guide = current.guide(member.source)
        if guide is not None and not member.own:
            given = guide.given[: len(tokens)]
            tokens = np.where(given, current.log_probs.mask_token_id, tokens)
        positions = current.layout.row_positions[place]
        tokens[positions[query.written]] = query.written_tokens
        for n, (own, row) in enumerate(zip(query.drafted, read_rows, strict=True)):
            if row != own:
                number = self.read[n] = len(self.rows)
                self.rows = np.append(self.rows, row)
                self.tokens = np.append(self.tokens, tokens[positions[row]])
                _, columns, keys = self._set(n, 1)
                kept = columns != row
                columns, keys = np.append(columns[kept], row), np.append(keys[kept], number)
                self.sets.append((1, columns, keys))
            tokens[positions[own]] = query.drafts[n]

    def key_sets(self, first: int) -> Iterator[KeySet]:
        """Where the rows are packed from `first` on."""
        for queries, columns, rows in self.sets:
            yield KeySet(queries=queries, columns=columns, rows=first + rows, **self.span)


def _run(
    current: DenoisingPass,
    views: Sequence[_TwoViews],
    members: Sequence[PairMember[Verification]],
    queries: int,
) -> Tensor:
    """[sum S, D] final states at which the drafts are predicted, query by query, guided where
    their sequences are."""
    assert current.saved is not None
    transfer, keys = Transfer(current.device), current.saved.layers[0].keys_SGP
    starts = np.cumsum([0, *(len(own.rows) for own in views)])
    sets = [
        one for own, start in zip(views, starts, strict=False) for one in own.key_sets(int(start))
    ]
    saved = [
        current.saved_rows(member.place, own.rows)
        for member, own in zip(members, views, strict=True)
    ]
    rows = PartialRows(
        saved=transfer.add(np.concatenate(saved)),
        groups=[],
        calls=replace_keys(
            sets, key_rows=len(keys), row_elements=keys[0].numel(), transfer=transfer
        ),
    )
    tokens = transfer.add(np.concatenate([own.tokens for own in views]))
    read = [start + own.read for start, own in zip(starts, views, strict=False)]
    wanted = transfer.add(np.concatenate(read))
    hidden = run_partial(current, rows, current.model.embed(tokens.tensor))
    assert hidden is not None
    found = list(hidden[wanted.tensor].split([len(own) for own in read]))
    for copy, member in enumerate(members[queries:], queries):
        guide = current.guide(member.source)
        assert guide is not None
        found[member.number] = combined(found[member.number], found[copy], guide)
    return torch.cat(found[:queries])


def _constraints(current: DenoisingPass, s: int, query: Verification) -> IntArray:
    """[S] numbers of what may stand at each draft's position once those before it are written."""
    positions = current.sequences[s].logit_positions
    tokens = current.sequences[s].tokens.copy()
    tokens[positions[query.written]] = query.written_tokens
    numbers = []
    for place, draft in zip(positions[query.drafted], query.drafts, strict=True):
        numbers.append(current.constraint_numbers(s, tokens, place[None]))
        tokens[place] = draft
    return np.concatenate(numbers)
