"""The output directory: one JSONL line per finished item, appended at once, and what run it is of.

A run that was killed leaves whole lines and perhaps half a line at the end; the half is cut off and
the run goes on with what is missing. A finished run's file is in the order of its cells.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

RUN, ITEMS, LOCK = "run.json", "items.jsonl", ".lock"
Record = dict[str, Any]


class Ledger:
    """Records of a run, by cell and index of the item."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Open the folder of a run, or start one.

        Args:
            folder: of the run; made if there is none.
            identity: what the results depend on.

        Raises:
            ValueError: for a folder of something else, of another run, or in use.
        """
        self.folder = folder
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--out: expected a folder, got the file {folder}; name another")
        run = folder / RUN
        if folder.is_dir() and not run.exists() and any(f.name != LOCK for f in folder.iterdir()):
            raise ValueError(
                f"--out: expected an empty folder or one of an earlier run, got {folder}, which "
                f"has files and no {RUN}; name another"
            )
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = (folder / LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise ValueError(
                f"--out: expected a folder that nobody writes to, got {folder}, which another run "
                f"is using; wait for it or name another"
            ) from None
        if run.exists():
            _check(run, identity)
        else:
            _replace(run, json.dumps(identity, indent=2, ensure_ascii=False) + "\n")
        self.records = self._read()
        self._file: IO[str] = (folder / ITEMS).open("a", encoding="utf-8")

    def append(self, record: Record) -> None:
        """Write one finished item; it survives the death of this process from here on."""
        self._file.write(_line(record))
        self._file.flush()
        self.records[record["cell"], record["index"]] = record

    def finish(self, order: Iterable[tuple[str, int]]) -> None:
        """Bring the file into the order of the given keys, whatever order the items came in."""
        ordered = {key: self.records[key] for key in order}
        assert len(ordered) == len(self.records), "records of cells that the run does not have"
        self.records = ordered
        self._file.close()
        _replace(self.folder / ITEMS, "".join(map(_line, ordered.values())))
        self._file = (self.folder / ITEMS).open("a", encoding="utf-8")

    def close(self) -> None:
        """Let others use the folder."""
        self._file.close()
        self._lock.close()

    def _read(self) -> dict[tuple[str, int], Record]:
        path = self.folder / ITEMS
        records: dict[tuple[str, int], Record] = {}
        if not path.exists():
            return records
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with path.open("r+b") as file:
                file.truncate(whole)
        for number, line in enumerate(content[:whole].decode("utf-8").split("\n")[:-1], 1):
            try:
                record = json.loads(line)
                key = record["cell"], record["index"]
            except (json.JSONDecodeError, KeyError, TypeError):
                raise ValueError(
                    f"{path}:{number}: expected a record of a finished item, got {line[:60]!r}; "
                    f"remove the line, and the item is done again"
                ) from None
            if key in records:
                raise ValueError(
                    f"{path}:{number}: expected each item once, got {key} again; remove the line"
                )
            records[key] = record
        return records


def _check(run: Path, identity: Mapping[str, Any]) -> None:
    try:
        earlier = json.loads(run.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{run}: expected JSON ({error}); name another --out") from None
    wanted = json.loads(json.dumps(identity))
    for name in {**earlier, **wanted}:
        if earlier.get(name) != wanted.get(name):
            raise ValueError(
                f"--out: expected a folder of the same run, got {run.parent}, whose {name} is "
                f"{_short(earlier.get(name))} and not {_short(wanted.get(name))}; name another "
                f"--out, or repeat the run's own arguments"
            )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else text[:197] + "..."


def _line(record: Record) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def _replace(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    part = path.with_name(path.name + ".part")
    with contextlib.closing(part.open("w", encoding="utf-8")) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
