"""What some positions become once others are written: a link of the chain rule over a set.

The written and the queried rows are run again, all other rows keep their keys and values: a partial
pass of a few rows instead of the next step's forward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from boe_vllm.base.arrays import FloatArray, IntArray
from boe_vllm.base.transfer import Transfer
from boe_vllm.sampling.statistics import RowStatistics, RowWrites, read_statistics
from boe_vllm.steering.step import DenoisingPass, Query, QueryResult
from boe_vllm.steering.supposed import Supposition, run_suppositions, suppose


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Conditioned:
    """Predictions of the queried positions under a supposition."""

    proposal: IntArray
    """[q] tokens."""
    confidence: FloatArray
    """[q] untempered probability of the proposal."""
    entropy: FloatArray
    """[q] nats."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Conditional(Query[Conditioned]):
    """The predictions of some masked positions once others are written, all else frozen.

    What may be written there is what the request's constraints say of the supposed tokens. Costs
    one forward of `w + q` rows, and of those at which the queried ones are read, where these are
    others.
    """

    written: IntArray
    """[w] indices into `View.positions` that are supposed written."""
    tokens: IntArray
    """[w] what is written there."""
    queried: IntArray
    """[q] indices whose predictions are wanted; they stay masked."""
    temperature: float
    """How new proposals are drawn, as in the step itself."""
    uniform: FloatArray
    """[q] the random numbers behind them; NaN at temperature 0."""

    @classmethod
    def solve(
        cls, current: DenoisingPass, queries: Sequence[tuple[int, Conditional]]
    ) -> list[QueryResult[Conditioned]]:
        """Run the rows of all queries in one partial pass."""
        supposed = [_supposition(current, s, query) for s, query in queries]
        statistics = _predict(current, queries, supposed)
        results, start = [], 0
        for (s, query), states in zip(queries, supposed, strict=True):
            own = slice(start, start + len(query.queried))
            start = own.stop
            passes = current.passes(s)
            results.append(
                QueryResult(
                    value=Conditioned(
                        proposal=statistics.proposal[own],
                        confidence=statistics.confidence[own],
                        entropy=statistics.entropy[own],
                    ),
                    forwards=passes,
                    rows_forward=passes * states.size,
                )
            )
        return results


def _supposition(current: DenoisingPass, s: int, query: Conditional) -> Supposition:
    """The one state of a query."""
    return suppose(
        current,
        s,
        own=np.concatenate([query.written, query.queried]),
        written=np.arange(len(query.written))[None, :],
        tokens=query.tokens[None, :],
        read=query.queried,
    )


def _predict(
    current: DenoisingPass,
    queries: Sequence[tuple[int, Conditional]],
    supposed: Sequence[Supposition],
) -> RowStatistics:
    """Statistics of the queried positions, query by query."""
    numbers = [_supposed_constraints(current, s, query) for s, query in queries]
    hidden = run_suppositions(current, supposed, Transfer(current.device))
    counts = [len(query.queried) for _, query in queries]
    return read_statistics(
        current.log_probs.of(hidden, np.concatenate(numbers)),
        RowWrites(
            temperature=np.repeat([query.temperature for _, query in queries], counts),
            uniform=np.concatenate([query.uniform for _, query in queries]),
        ),
    )


def _supposed_constraints(current: DenoisingPass, s: int, query: Conditional) -> IntArray:
    """[q] numbers of what may be written at the queried positions of the supposed state."""
    positions = current.sequences[s].logit_positions
    tokens = current.sequences[s].tokens.copy()
    tokens[positions[query.written]] = query.tokens
    return current.constraint_numbers(s, tokens, positions[query.queried])
