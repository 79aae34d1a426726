"""The command: check everything, decode what is left, write the tables."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from boe_vllm import TINY
from boe_vllm.lab.eval import arguments
from boe_vllm.lab.eval.answers import Backend
from boe_vllm.lab.eval.cell_file import CellFile
from boe_vllm.lab.eval.settings import Settings
from boe_vllm.lab.eval.sweep import Sweep
from boe_vllm.lab.tasks import TASKS, Task

FREQUENCY_ITEMS = 200  # per task, of the bundled checkpoint's table


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 2 for arguments that do not fit, with a line that says why."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = arguments.parser().parse_args(argv)
    try:
        settings = arguments.read(args)
        with tempfile.TemporaryDirectory(prefix="boe-vllm-") as folder:
            settings = _with_frequencies(settings, Path(folder))
            out = args.out or Path(folder) / "run"
            evaluate(settings, args, out, arguments.command_line(argv))
    except ValueError as error:
        print(f"boe-vllm eval: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("boe-vllm eval: stopped; the same command continues", file=sys.stderr)
        return 130
    return 0


def evaluate(settings: Settings, args: argparse.Namespace, out: Path, command: str) -> None:
    """One run, from wherever an earlier one stopped.

    Args:
        settings: what is run.
        args: how: `cells`, `no_run` and `in_process` of the command line.
        out: folder of the run.
        command: the command line, to be shown.

    Raises:
        ValueError: for anything wrong with the arguments or the files, before anything is decoded.
    """
    sweep = Sweep(settings, CellFile(args.cells))
    with contextlib.closing(sweep.open(out)) as ledger:
        jobs = [] if args.no_run else sweep.jobs(ledger)
        if jobs:
            sweep.decode(jobs, ledger, _backend(settings, sweep.tasks, args.in_process))
        print(sweep.write(ledger, command))


def _backend(settings: Settings, tasks: dict[str, Task], in_process: bool) -> Backend:
    """What decodes; imported only now: vLLM takes seconds, and a wrong argument is told before."""
    if in_process:
        from boe_vllm.lab.eval.in_process import InProcess

        return InProcess(settings, tasks)
    from boe_vllm.lab.eval.engine import Engine

    return Engine(settings, tasks)


def _with_frequencies(settings: Settings, folder: Path) -> Settings:
    """For `pc` on the bundled checkpoint, a table counted from the tasks' training items."""
    wanted = any(variant.fields["policy"] == "pc" for variant in settings.variants)
    if not wanted or settings.frequencies is not None or settings.model != TINY:
        return settings
    from tokenizers import Tokenizer

    from boe_vllm.policies import frequencies

    tokenizer = Tokenizer.from_file(str(Path(settings.model_path) / "tokenizer.json"))
    texts = (
        item.prompt + item.answer
        for task in TASKS.values()
        for item in task.items(FREQUENCY_ITEMS, split="train")
    )
    path = folder / "frequencies.json"
    path.write_text(json.dumps(frequencies.count(tokenizer, texts)), encoding="utf-8")
    return dataclasses.replace(settings, frequencies=path)
