"""Tasks whose items are read from a file: JSONL, a JSON list, or CSV.

A record becomes an item in the task's own `make_item`; whatever is wrong with a record is reported
with the file and the line. Files are read where they are and never copied.
"""

from __future__ import annotations

import csv
import json
import random
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from boe_vllm.lab.tasks.base import Item, Task

Record = Mapping[str, Any]
Dialect = Literal["strict", "d1"]
"""Whose rules read and judge an answer: ours, by value, or those of the d1 family's tables."""


@cache
def read_prompt(name: str) -> str:
    """A template of `boe_vllm/lab/tasks/prompts`."""
    return (Path(__file__).parent / "prompts" / f"{name}.txt").read_text(encoding="utf-8")


def fill(name: str, **values: str) -> str:
    """A template with its `{fields}` replaced. Every other brace is left alone."""
    text = read_prompt(name)
    # From the right: the fields stand after the examples, which may hold braces of their own.
    for field, value in values.items():
        before, found, after = text.rpartition("{" + field + "}")
        assert found, f"prompt {name!r} has no field {field!r}"
        text = before + value + after
    return text


class FileTask(Task):
    """Items of one file."""

    file_name: ClassVar[str]
    """Name of the file inside a data folder."""
    fields: ClassVar[dict[str, type]]
    """Fields that every record must have, with their types."""

    dialects: ClassVar[tuple[Dialect, ...]] = ("strict",)
    """Rules by which answers can be judged."""
    dialect: Dialect
    """Those by which they are."""

    def __init__(self, path: str | Path, *, dialect: Dialect = "strict") -> None:
        """Args:
        path: the file, or the folder that holds it under `file_name`.
        dialect: whose rules read and judge an answer.

        Raises:
            ValueError: when there is no such file or no such rules.
        """
        self._speak(dialect)
        path = Path(path)
        self.path = path / self.file_name if path.is_dir() else path
        if not self.path.is_file():
            raise ValueError(
                f"task {self.name!r}: expected a file {self.file_name}, got no file {self.path}; "
                f"name the folder that holds {self.file_name}"
            )

    def _speak(self, dialect: Dialect) -> None:
        if dialect not in self.dialects:
            raise ValueError(
                f"grader: expected one of {', '.join(self.dialects)} for task {self.name!r}, got "
                f"{dialect!r}; choose one of them"
            )
        self.dialect = dialect

    @classmethod
    def rules(cls, dialect: Dialect = "strict") -> Self:
        """The task without its file: it reads and judges answers, and has no items.

        Raises:
            ValueError: for rules that the task does not have.
        """
        task = cls.__new__(cls)
        task._speak(dialect)
        return task

    def parse(self, text: str) -> str:
        """The answer by the rules of the task's dialect."""
        return self.parse_d1(text) if self.dialect == "d1" else self.parse_strict(before_end(text))

    def parse_strict(self, text: str) -> str:
        """The answer in what comes before EOS; all of it by default."""
        return text

    def parse_d1(self, text: str) -> str:
        """The answer as d1's grader reads it."""
        raise NotImplementedError(f"{self.name} has no rules of d1")

    @abstractmethod
    def make_item(self, record: Record) -> Item:
        """The item of one record, which has all `fields`; a ValueError says what is wrong."""

    def shown(self, item: Item) -> bool:
        """Whether the prompt's own examples give the item away."""
        return False

    def all_items(self) -> list[Item]:
        """Every item of the file, in its order.

        Raises:
            ValueError: naming the file and the line of a malformed record.
        """
        items = []
        for place, record in read_records(self.path):
            try:
                self._check(record)
                items.append(self.make_item(record))
            except ValueError as error:
                raise ValueError(f"{place}: {error}; correct or remove it") from None
        if not items:
            raise ValueError(f"{self.path}: expected items of {self.name!r}, got none")
        return items

    def items(self, n: int | None = None, *, seed: int = 0, split: str = "test") -> list[Item]:
        """The items that the prompt's examples do not show, or `n` of them drawn by `seed`.

        A file has one split; a file with fewer than `n` items gives them all, in its order.
        """
        if n is not None and n < 0:
            raise ValueError(f"n must be at least 0, got {n}")
        items = [item for item in self.all_items() if not self.shown(item)]
        if n is None or n >= len(items):
            return items
        chosen = random.Random(f"{self.name}/{seed}").sample(range(len(items)), n)
        return [items[index] for index in sorted(chosen)]

    def _check(self, record: Any) -> None:
        wanted = ", ".join(f"{name} ({kind.__name__})" for name, kind in self.fields.items())
        if not isinstance(record, Mapping):
            raise ValueError(f"expected an object with {wanted}, got {_short(record)}")
        for name, kind in self.fields.items():
            if not isinstance(record.get(name), kind):
                raise ValueError(
                    f"expected {wanted}, got {name}={_short(record[name])}"
                    if name in record
                    else f"expected {wanted}, got no {name!r}"
                )


def before_end(text: str) -> str:
    """All of a text before EOS."""
    return text.split("<|endoftext|>", 1)[0].split("<|eot_id|>", 1)[0]


def read_records(path: Path) -> Iterator[tuple[str, Any]]:
    """The records of a file with their places, `FILE:LINE`; of a JSON list, `FILE, item N`.

    Raises:
        ValueError: for a file that is no UTF-8 text, or malformed JSON, by line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text ({error}); convert it") from None
    if path.suffix == ".csv":
        lines = text.splitlines()
        reader = csv.DictReader(lines)
        for record in reader:
            yield f"{path}:{reader.line_num}", record
    elif path.suffix == ".json":
        records = _load(text, f"{path}", offset=0)
        if not isinstance(records, list):
            raise ValueError(f"{path}: expected a JSON list, got {_short(records)}")
        for number, record in enumerate(records, 1):
            yield f"{path}, item {number}", record
    else:
        # Not splitlines(): JSON strings may hold U+2028, which that would split at.
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"{path}:{number}", _load(line, f"{path}", offset=number - 1)


def _load(text: str, path: str, *, offset: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}:{error.lineno + offset}: expected JSON, got {_short(error.doc)} "
            f"({error.msg} at column {error.colno}); correct or remove it"
        ) from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
