"""One policy against others, item by item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from boe_vllm.lab.eval.cells import Cell
from boe_vllm.lab.eval.statistics import mcnemar
from boe_vllm.lab.eval.tables import Row, percent

Outcomes = Mapping[str, Sequence[bool]]


def compare(
    cells: Sequence[Cell],
    rows: Sequence[Row],
    outcomes: Outcomes,
    paired: str,
    against: Sequence[str],
) -> list[Row]:
    """The chosen variant beside each rival, on every task at every length and rate they share.

    Args:
        cells: of the run.
        rows: of the same cells, see `tables.summarise`.
        outcomes: key of a cell -> per item, whether the answer is right; of finished cells.
        paired: label of the chosen variant.
        against: labels of its rivals.
    """
    known: dict[tuple[str, int, int], dict[str, tuple[Row, Sequence[bool]]]] = {}
    for cell, row in zip(cells, rows, strict=True):
        if cell.key in outcomes:
            place = cell.task, cell.gen_length, cell.tokens_per_step
            known.setdefault(place, {})[cell.label] = row, outcomes[cell.key]
    compared = []
    for here in known.values():
        if paired not in here:
            continue
        row, valid = here[paired]
        for rival in against:
            if rival in here and rival != paired:
                other, theirs = here[rival]
                compared.append(_row(row, other, mcnemar(valid, theirs)))
    return compared


def _row(own: Row, other: Row, test: tuple[int, int, float]) -> Row:
    wins, losses, p = test
    return {
        "task": own["task"],
        "tokens/step": own["tokens_per_step"],
        "policy": own["policy"],
        "rival": other["policy"],
        "score %": percent(own["score"]),
        "its %": percent(other["score"]),
        "wins": wins,
        "losses": losses,
        "p": p,
        "rows ratio": own["rows"] / other["rows"],
        "passes ratio": own["passes"] / other["passes"],
    }
