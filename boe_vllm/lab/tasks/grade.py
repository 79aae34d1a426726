"""`boe-vllm grade FILE`: stored answers of some model, judged by both dialects.

A line of the file is a JSON object with `task` (a benchmark's name here), `generation` (what the
model wrote) and `ground_truth` (the answer, as text or as a number; null is one that nobody can
give), and perhaps `gen_length`.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from boe_vllm.lab.tasks import FILE_TASKS, Dialect, FileTask, Item

JUDGED = ("gsm8k", "math500")
"""Tasks whose answers can be judged by the right answer alone."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 2 for a file that does not fit, with a line that says why."""
    parser = argparse.ArgumentParser(
        prog="boe-vllm grade",
        description="Judge stored answers by every dialect that their task has.",
    )
    parser.add_argument("file", type=Path, help="JSONL, perhaps gzipped")
    args = parser.parse_args(argv)
    try:
        print(to_table(grade(read(args.file))))
    except (OSError, ValueError) as error:
        print(f"boe-vllm grade: {error}", file=sys.stderr)
        return 2
    return 0


def read(path: Path) -> Iterator[Mapping[str, Any]]:
    """The records of a file.

    Raises:
        ValueError: naming the line of a malformed one.
    """
    opened = gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open()
    with opened as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                known = record["task"] in JUDGED and isinstance(record["generation"], str)
                known = known and "ground_truth" in record
            except (json.JSONDecodeError, KeyError, TypeError):
                known = False
            if not known:
                raise ValueError(
                    f"{path}:{number}: expected an object with task ({' or '.join(JUDGED)}), "
                    f"generation (str) and ground_truth, got {line[:60]!r}; correct or remove it"
                )
            yield record


def grade(records: Iterator[Mapping[str, Any]]) -> dict[tuple[str, int | None], dict[str, Any]]:
    """By task and canvas length: how many answers there are, and are right by each dialect."""
    rules: dict[tuple[str, Dialect], FileTask] = {}
    counts: dict[tuple[str, int | None], dict[str, Any]] = {}
    for record in records:
        kind = FILE_TASKS[record["task"]]
        count = counts.setdefault((kind.name, record.get("gen_length")), {"answers": 0})
        count["answers"] += 1
        item = Item(task=kind.name, prompt="", answer=_text(record["ground_truth"]))
        for dialect in kind.dialects:
            if (kind.name, dialect) not in rules:
                rules[kind.name, dialect] = kind.rules(dialect)
                rules[kind.name, dialect].require()
            task = rules[kind.name, dialect]
            right = bool(item.answer) and task.score(item, record["generation"]).valid
            count[dialect] = count.get(dialect, 0) + right
    return counts


def _text(answer: Any) -> str:
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    return "" if answer is None else str(answer)


def to_table(counts: Mapping[tuple[str, int | None], Mapping[str, Any]]) -> str:
    """Markdown: per task and length the share of right answers by each dialect, in percent."""
    lines = ["| task | L | answers | strict % | d1 % |", "|---|---|---|---|---|"]
    for (task, length), count in counts.items():
        shares = [f"{100 * count[d] / count['answers']:.2f}" for d in ("strict", "d1")]
        lines.append(
            f"| {task} | {length or '-'} | {count['answers']} | {shares[0]} | {shares[1]} |"
        )
    return "\n".join(lines)
