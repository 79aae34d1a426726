"""Answers the queries of a step's policies, all queries of one kind in shared passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from boe_vllm.steering.change import prediction_change
from boe_vllm.steering.coupling.solve import conditional, coupling
from boe_vllm.steering.importance import token_importance
from boe_vllm.steering.likelihood import Likelihood, likelihood
from boe_vllm.steering.lookahead import lookahead
from boe_vllm.steering.queries import (
    Conditional,
    Coupling,
    Lookahead,
    PredictionChange,
    Query,
    TokenImportance,
)
from boe_vllm.steering.step import DenoisingPass, QueryResult

_SOLVERS: dict[
    type[Query], Callable[[DenoisingPass, Sequence[tuple[int, Any]]], list[QueryResult]]
] = {
    TokenImportance: token_importance,
    Coupling: coupling,
    Conditional: conditional,
    PredictionChange: prediction_change,
    Lookahead: lookahead,
    Likelihood: likelihood,
}


def answer(current: DenoisingPass, queries: Mapping[int, Query]) -> dict[int, QueryResult]:
    """QueryResult one query per sequence of the pass.

    Raises:
        TypeError: for an query that no solver is registered for.
    """
    answers: dict[int, QueryResult] = {}
    for kind in dict.fromkeys(map(type, queries.values())):
        if kind not in _SOLVERS:
            raise TypeError(
                f"no solver for query {kind.__name__}; expected one of {list(_SOLVERS)}"
            )
        members = [n for n, query in queries.items() if type(query) is kind]
        solved = _SOLVERS[kind](current, [(n, queries[n]) for n in members])
        answers.update(zip(members, solved, strict=True))
    return answers
