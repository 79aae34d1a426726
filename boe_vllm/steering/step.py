"""A denoising step's own pass as steering finds it, and the queries that a policy may ask of it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Generic, Protocol, Self, TypeVar

import numpy as np
import torch

from boe_vllm.base.arrays import IntArray
from boe_vllm.models.cache import CachePlan, KeyValuePool
from boe_vllm.models.contract import DenoisingNetwork
from boe_vllm.models.rows import RowLayout, SequenceRows
from boe_vllm.models.saved import SavedPass
from boe_vllm.sampling.canvas_constraints import CanvasConstraints
from boe_vllm.sampling.constraints import ConstraintTable
from boe_vllm.sampling.log_probs import LogProbabilities
from boe_vllm.steering.guidance import Guidance, Place

T = TypeVar("T")

DEFAULT_ROW_BUDGET = 8192
"""Most rows of one packed look-ahead pass, unless one state alone has more."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class QueryResult(Generic[T]):
    """The result of one query, and what it cost its request beyond the step's own forward."""

    value: T
    forwards: int = 0
    backwards: int = 0
    rows_forward: int = 0
    rows_backward: int = 0


class Query(Generic[T]):
    """Work of the denoiser that a policy wants before it decides; its result is a `T`.

    A policy's step yields the query and is sent the result. Each kind of query is a frozen
    dataclass with its solver.
    """

    __slots__ = ()

    @classmethod
    def solve(
        cls, current: DenoisingPass, queries: Sequence[tuple[int, Self]]
    ) -> list[QueryResult[T]]:
        """Solve queries of this kind in shared passes, one result for each.

        Args:
            current: the step's own pass.
            queries: pairs of a sequence of the pass and its query.
        """
        raise NotImplementedError(f"{cls.__name__}: expected a classmethod 'solve', found none")


class PartClock(Protocol):
    """Measures where a step's time goes."""

    def part(self, name: str) -> AbstractContextManager[None]:
        """Count the time inside for `name`."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NextStep:
    """How a sequence's next step would be computed and would propose tokens."""

    temperature: float
    """Of its proposals; 0 takes the argmax."""
    seed: int
    """Seed of the request."""
    step: int
    """Number of the next step in the request's random numbers."""
    constraints: CanvasConstraints | None
    """What the request lets be written, whatever its tokens are by then."""
    top_logprobs: int = 0
    """Most likely tokens that the request reports for each position."""
    cache: CachePlan | None = None
    """What it would read from or store in the request's cache."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DenoisingPass:
    """A forward over the live rows of all sequences, with what it left behind.

    Two index spaces meet here. A *sequence* is one request of the step, by its number in the batch.
    A *place* is a sequence of the layout: first the requests whose forward ran, then the
    unconditional copies of the guided among them. Requests whose prediction was carried over from
    the last step's look-ahead are the last sequences and have no place; `place` says so.
    """

    model: DenoisingNetwork
    sequences: tuple[SequenceRows, ...]
    """Of each request; those of the carried were not computed."""
    layout: RowLayout
    """Of the places."""
    log_probs: LogProbabilities
    """Of the sequences that have a place, guided where they are; the copies have no rows here."""
    saved: SavedPass | None
    next_steps: tuple[NextStep, ...] = ()
    """For each sequence."""
    device_memory: tuple[dict[str, Any], ...] = ()
    """For each sequence, what solvers keep on the device from one step to the next."""
    guides: tuple[Guidance | None, ...] = ()
    """For each sequence, its classifier-free guidance; empty if none is guided."""
    unconditional: Mapping[int, Place] = dataclasses.field(default_factory=dict)
    """Guided sequence that has a place -> place of its unconditional copy."""
    pool: KeyValuePool | None = None
    """Where a further pass finds the stored keys and values of its sequences."""
    table: ConstraintTable | None = None
    """The pass's constraints by number, as `log_probs` knows them, which may still grow; None if no
    sequence has any."""
    row_budget: int = DEFAULT_ROW_BUDGET
    """Most rows of one look-ahead pass."""
    clock: PartClock | None = None
    """Counts the time of the step's parts, if somebody wants to know."""

    @property
    def device(self) -> torch.device:
        """Where the pass ran."""
        return self.layout.device

    def timed(self, part: str) -> AbstractContextManager[None]:
        """Counts the time inside for a part of the step."""
        return contextlib.nullcontext() if self.clock is None else self.clock.part(part)

    def place(self, sequence: int) -> Place:
        """Where the rows of a sequence lie in the layout.

        Raises:
            ValueError: for a sequence without rows, whose prediction was carried over.
        """
        computed = len(self.layout.live_lens) - len(self.unconditional)
        if not 0 <= sequence < computed:
            raise ValueError(
                f"query: expected a step whose forward ran (sequences 0 to {computed - 1} of this "
                f"pass), got sequence {sequence}, whose prediction was carried over and has no "
                f"rows; leave Commit.carry None before a step that asks for this"
            )
        return Place(sequence)

    def guide(self, sequence: int) -> Guidance | None:
        """How a sequence is guided."""
        return self.guides[sequence] if self.guides else None

    def passes(self, sequence: int) -> int:
        """Places that stand for this sequence in every pass: two if it is guided."""
        return 1 if self.guide(sequence) is None else 2

    def logit_rows(self, sequence: int, index: IntArray) -> IntArray:
        """Packed logit rows of a sequence's masked positions given by index."""
        return self.layout.logit_starts[self.place(sequence)] + index

    def read_rows(self, place: Place, index: IntArray) -> IntArray:
        """Rows of a place, counted from its first, at which masked positions given by index are
        read: their own, or those of the positions before them (`models.rows`)."""
        return self.layout.read_rows[place][index]

    def read_saved_rows(self, place: Place, index: IntArray) -> IntArray:
        """Packed saved rows of the same."""
        return self.saved_rows(place, self.read_rows(place, index))

    def saved_rows(self, place: Place, rows: IntArray) -> IntArray:
        """Packed saved rows of a place by their number there: first come the masked positions'
        own, by index, then the others at which these are read."""
        return self.layout.saved_starts[place] + rows

    def key_rows(self, place: Place, rows: IntArray) -> IntArray:
        """Rows of keys and values of the same: a place's keys begin with its saved rows."""
        return self.layout.attention.kv_starts[place] + rows

    def constraint_numbers(self, sequence: int, tokens: IntArray, positions: IntArray) -> IntArray:
        """[N] numbers, in `table`, of what may be written at some positions of a sequence.

        Args:
            sequence: of the pass.
            tokens: [L] token ids of the sequence, as they are or as they are supposed.
            positions: [N] masked positions.
        """
        constraints = self.next_steps[sequence].constraints
        if self.table is None or constraints is None:
            return np.zeros(len(positions), np.int64)
        masked = tokens == self.log_probs.mask_token_id
        return self.table.numbers(constraints.at(tokens, masked, positions), len(positions))


def solve_together(
    current: DenoisingPass, queries: Mapping[int, Query[Any]]
) -> dict[int, QueryResult[Any]]:
    """Solve one query for each of some sequences, all queries of one kind in shared passes."""
    results: dict[int, QueryResult[Any]] = {}
    kinds: list[type[Query[Any]]] = list(dict.fromkeys(type(q) for q in queries.values()))
    for kind in kinds:
        members = [(s, query) for s, query in queries.items() if type(query) is kind]
        solved = kind.solve(current, members)
        results.update(zip((s for s, _ in members), solved, strict=True))
    return results
