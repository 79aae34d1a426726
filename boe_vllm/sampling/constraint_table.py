"""The constraints of one pass by number.

A pass packs rows of many requests, so each row names its constraint by number: 0 for none, `n` for
the `n`-th of the pass's table.

Legend: `R` packed logit rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from boe_vllm.base.arrays import IntArray
from boe_vllm.base.transfer import Arrival, Transfer
from boe_vllm.sampling.constraints import Constraint

ConstrainedRows: TypeAlias = tuple[Constraint, Arrival]
"""A constraint with the rows that it holds for."""


class ConstraintTable:
    """The constraints of one pass by number, each once: 0 stands for none."""

    def __init__(self, constraints: Sequence[Constraint] = ()) -> None:
        """A table that holds some constraints already, numbered from 1 in their order."""
        self.constraints = list(constraints)  # which keeps them alive, and their ids their own
        self._numbers = {id(constraint): n for n, constraint in enumerate(constraints, 1)}

    def numbers(self, constraints: Sequence[Constraint] | None, count: int) -> IntArray:
        """[count] the numbers of some rows' constraints; all 0 for None."""
        if constraints is None:
            return np.zeros(count, np.int64)
        return np.array([self._number(constraint) for constraint in constraints], np.int64)

    def edits(self, constraint_R: IntArray, transfer: Transfer) -> list[ConstrainedRows]:
        """The constraints of some rows that change their logits."""
        return self._rows(constraint_R, transfer, lambda constraint: constraint.edits)

    def filters(self, constraint_R: IntArray, transfer: Transfer) -> list[ConstrainedRows]:
        """The constraints of some rows that restrict their draws."""
        return self._rows(constraint_R, transfer, lambda constraint: constraint.filters)

    def discounts(self, constraint_R: IntArray, transfer: Transfer) -> list[ConstrainedRows]:
        """The constraints of some rows that leave tokens out of their confidences."""
        return self._rows(constraint_R, transfer, lambda constraint: constraint.discounts)

    def _rows(
        self,
        constraint_R: IntArray,
        transfer: Transfer,
        wanted: Callable[[Constraint], bool],
    ) -> list[ConstrainedRows]:
        if not constraint_R.any():
            return []
        return [
            (constraint, transfer.add(np.flatnonzero(constraint_R == number)))
            for number in np.unique(constraint_R[constraint_R > 0]).tolist()
            if wanted(constraint := self.constraints[number - 1])
        ]

    def _number(self, constraint: Constraint) -> int:
        if id(constraint) not in self._numbers:
            self.constraints.append(constraint)
            self._numbers[id(constraint)] = len(self.constraints)
        return self._numbers[id(constraint)]
