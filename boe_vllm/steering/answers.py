"""Answers the asks of a step's policies, all asks of one kind in shared passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from boe_vllm.steering.asks import (
    Ask,
    Conditional,
    Coupling,
    Lookahead,
    PredictionChange,
    TokenImportance,
)
from boe_vllm.steering.change import prediction_change
from boe_vllm.steering.coupling.solve import conditional, coupling
from boe_vllm.steering.importance import token_importance
from boe_vllm.steering.likelihood import Likelihood, likelihood
from boe_vllm.steering.lookahead import lookahead
from boe_vllm.steering.step import Answer, DenoisingPass

_SOLVERS: dict[type[Ask], Callable[[DenoisingPass, Sequence[tuple[int, Any]]], list[Answer]]] = {
    TokenImportance: token_importance,
    Coupling: coupling,
    Conditional: conditional,
    PredictionChange: prediction_change,
    Lookahead: lookahead,
    Likelihood: likelihood,
}


def answer(current: DenoisingPass, asks: Mapping[int, Ask]) -> dict[int, Answer]:
    """Answer one ask per sequence of the pass.

    Raises:
        TypeError: for an ask that no solver is registered for.
    """
    answers: dict[int, Answer] = {}
    for kind in dict.fromkeys(map(type, asks.values())):
        if kind not in _SOLVERS:
            raise TypeError(f"no solver for ask {kind.__name__}; expected one of {list(_SOLVERS)}")
        members = [n for n, ask in asks.items() if type(ask) is kind]
        solved = _SOLVERS[kind](current, [(n, asks[n]) for n in members])
        answers.update(zip(members, solved, strict=True))
    return answers
