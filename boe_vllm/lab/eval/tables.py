"""What a run found: one row per cell, and the paper's tables, as Markdown and CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

from boe_vllm.lab.eval import costs
from boe_vllm.lab.eval.cell_file import FinishedCell
from boe_vllm.lab.eval.cells import Cell
from boe_vllm.lab.eval.presets import own_rate
from boe_vllm.lab.eval.statistics import mean, wilson
from boe_vllm.lab.tasks import stories

Row = dict[str, Any]
Records = Mapping[tuple[str, int], Mapping[str, Any]]


def summarise(
    cells: Sequence[Cell],
    records: Records,
    judged: Mapping[str, bool],
    finished: Mapping[str, FinishedCell] | None = None,
) -> list[Row]:
    """One row per cell; shares in [0, 1], costs per item, time in seconds of the engine.

    Args:
        cells: in the order of the table.
        records: of finished items.
        judged: whether answers of a task can be right or wrong.
        finished: cells by key that an earlier run has finished; of those there are no records.
    """
    by_cell: dict[str, list[Mapping[str, Any]]] = {cell.key: [] for cell in cells}
    for record in records.values():
        by_cell[record["cell"]].append(record)
    seconds = costs.engine_seconds(records.values())
    finished = finished or {}
    return [
        _finished_row(cell, finished[cell.key])
        if cell.key in finished
        else _row(cell, by_cell[cell.key], seconds.get(cell.key, 0.0), judged[cell.task])
        for cell in cells
    ]


def _finished_row(cell: Cell, own: FinishedCell) -> Row:
    """A cell of another run: what its file does not say is left out."""
    low, high = wilson(sum(own.valid), len(own.valid))
    return _identity(cell, len(own.valid)) | {
        "score": sum(own.valid) / len(own.valid),
        "low": low,
        "high": high,
        "exact": None,
        "cell_accuracy": None,
        "steps": own.steps,
        "forwards": own.forwards,
        "backwards": own.backwards,
        "passes": own.forwards + own.backwards,
        "rows": own.rows,
        "tokens": None,
        "seconds": own.seconds,
        "tokens_per_second": None,
        **_settings(cell),
    }


def _row(cell: Cell, own: list[Mapping[str, Any]], seconds: float, judged: bool) -> Row:
    right = sum(record["valid"] for record in own)
    low, high = wilson(right, len(own))
    accuracy = [r["cell_accuracy"] for r in own if r["cell_accuracy"] is not None]
    tokens = sum(record["tokens"] for record in own)

    def per_item(name: str) -> float | None:
        return mean([record[name] for record in own])

    return _identity(cell, len(own)) | {
        "score": right / len(own) if own and judged else None,
        "low": low if judged else None,
        "high": high if judged else None,
        "exact": per_item("exact") if judged else None,
        "cell_accuracy": mean(accuracy),
        "steps": per_item("denoising_steps"),
        "forwards": per_item("forwards"),
        "backwards": per_item("backwards"),
        "passes": mean([r["forwards"] + r["backwards"] for r in own]),
        "rows": mean([r["rows_forward"] + r["rows_backward"] for r in own]),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else None,
        **_settings(cell),
    }


def _identity(cell: Cell, n: int) -> Row:
    return {
        "task": cell.task,
        "policy": cell.label,
        "gen_length": cell.gen_length,
        "tokens_per_step": cell.tokens_per_step,
        "n": n,
    }


def _settings(cell: Cell) -> Row:
    settings = {k: v for k, v in cell.fields.items() if k not in ("policy", "tokens_per_step")}
    return {
        "policy_name": cell.fields["policy"],
        "settings": json.dumps(settings, sort_keys=True),
        "own_rate": own_rate(cell.fields),
    }


def to_csv(rows: Sequence[Row]) -> str:
    """Rows as CSV: numbers unrounded, nothing where there is no number."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table with one column per key; text to the left, numbers to the right."""
    columns = list(rows[0])
    left = [all(isinstance(row[column], str) for row in rows) for column in columns]
    lines = [columns, [":--" if flag else "--:" for flag in left]]
    lines += [[_cell(row[column]) for column in columns] for row in rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value).replace("|", "\\|")


def told_row(label: str, rate: int | None, texts: Sequence[Sequence[str]]) -> Row:
    """One line of what the source of the stories says of texts; shares with Wilson's interval."""
    found = stories.figures(texts)
    possible = round(found["possible"] * len(texts))  # type: ignore[operator]
    low, high = wilson(possible, len(texts))
    share = f"{percent(possible / len(texts))} % ({percent(low)} to {percent(high)})"
    shown = {k: str(v) if isinstance(v, stories.Mean) else v for k, v in found.items()}
    return {"policy": label, "tokens/step": rate, **shown, "possible": share}


def percent(value: float | None) -> str:
    """A share, in percent with one decimal."""
    return "-" if value is None else f"{100 * value:.1f}"


def overview(rows: Sequence[Row]) -> str:
    """All cells, for people; without columns that no cell has."""
    lines: list[Row] = [
        {
            "task": row["task"],
            "policy": row["policy"],
            "L": row["gen_length"],
            "tokens/step": "own" if row["own_rate"] else row["tokens_per_step"],
            "n": row["n"],
            "score %": percent(row["score"]),
            "95 % interval": f"{percent(row['low'])} to {percent(row['high'])}",
            "exact %": percent(row["exact"]),
            "cells %": percent(row["cell_accuracy"]),
            "steps": row["steps"],
            "forwards": row["forwards"],
            "backwards": row["backwards"],
            "passes": row["passes"],
            "rows": row["rows"],
            "engine s": row["seconds"],
            "tokens/s": row["tokens_per_second"],
        }
        for row in rows
    ]
    shown = [name for name in lines[0] if any(line[name] not in (None, "-") for line in lines)]
    return to_markdown([{name: line[name] for name in shown} for line in lines])


def methods_by_task(rows: Sequence[Row]) -> str:
    """Tables 2 and 3: a method per row, a task and canvas length per column."""
    return "\n".join(_methods_at(rows, rate) for rate in _values(rows, "tokens_per_step"))


def _methods_at(rows: Sequence[Row], rate: int) -> str:
    lines = []
    for label in _values(rows, "policy"):
        line: dict[str, Any] = {"method": label}
        for row in rows:
            if row["policy"] == label and row["tokens_per_step"] == rate:
                text = f"{percent(row['score'])} ({percent(row['low'])}-{percent(row['high'])})"
                line[f"{row['task']} {row['gen_length']}"] = text
        lines.append(line)
    return f"{rate} tokens per step, score in % (95 % interval):\n\n{to_markdown(lines)}"


def ablations(rows: Sequence[Row]) -> str:
    """Table 5: score and time of each variant, per task, with the time over the first variant's."""
    parts = []
    for task in _values(rows, "task"):
        own = [row for row in rows if row["task"] == task]
        first = own[0]["seconds"]
        parts.append(
            f"{task}:\n\n"
            + to_markdown(
                [
                    {
                        "method": row["policy"],
                        "L": row["gen_length"],
                        "tokens/step": row["tokens_per_step"],
                        "score %": percent(row["score"]),
                        "95 % interval": f"{percent(row['low'])} to {percent(row['high'])}",
                        "engine s": row["seconds"],
                        "time ratio": row["seconds"] / first if first else None,
                    }
                    for row in own
                ]
            )
        )
    return "\n".join(parts)


def curves(rows: Sequence[Row]) -> str:
    """Figure 4: score against network function evaluations (forwards), per task and policy.

    A forward over few rows counts as one, so the rows of all passes stand beside it.
    """
    ordered = sorted(rows, key=lambda row: (row["task"], row["policy"], row["forwards"] or 0.0))
    return to_markdown(
        [
            {
                "task": row["task"],
                "policy": row["policy"],
                "NFE": row["forwards"],
                "backwards": row["backwards"],
                "rows": row["rows"],
                "score %": percent(row["score"]),
                "95 % interval": f"{percent(row['low'])} to {percent(row['high'])}",
            }
            for row in ordered
        ]
    )


def _values(rows: Sequence[Row], name: str) -> list[Any]:
    return list(dict.fromkeys(row[name] for row in rows))
