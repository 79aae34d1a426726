"""The command line of `boe-vllm eval`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from boe_vllm import TINY, TINY_TEXT
from boe_vllm.lab.eval.presets import CONTEST, Preset, preset_named
from boe_vllm.lab.eval.settings import Settings
from boe_vllm.lab.eval.variants import Variant, parse, parse_fields
from boe_vllm.lab.tasks import FILE_TASKS, TASKS, Dialect

DEFAULT_POLICIES = "confidence,boe"


def parser() -> argparse.ArgumentParser:
    """All options."""
    made = argparse.ArgumentParser(
        prog="boe-vllm eval",
        description="Score policies on tasks with one engine; a run that was killed continues.",
        epilog=f"Tasks: {', '.join(TASKS)}; from files in --data: {', '.join(FILE_TASKS)}.",
    )
    _add_what(made)
    _add_presets(made)
    _add_files_and_ways(made)
    return made


def _add_what(made: argparse.ArgumentParser) -> None:
    what = made.add_argument_group("what is run")
    what.add_argument(
        "--model", default=TINY, help="path or name; tiny and tiny-text are the bundled ones"
    )
    what.add_argument("--tasks", metavar="A,B,...", help="see below")
    what.add_argument(
        "--policies",
        metavar="A,B,...",
        help=f"each with settings if wanted, boe:rho=0.5:gate=none (default {DEFAULT_POLICIES})",
    )
    what.add_argument("--gen-length", metavar="N,...", help="canvas (default: the task's own)")
    what.add_argument("--tokens-per-step", metavar="N,...", help="default 1")
    what.add_argument("--block-length", type=int, metavar="N")
    what.add_argument("--limit", type=int, metavar="N", help="items per task")
    what.add_argument("--seed", type=int, default=0)
    what.add_argument("--temperature", type=float)
    what.add_argument("--chat", action="store_true", help="use the model's chat template")
    what.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a request field of every cell, such as confidence_eos_eot_inf=true; repeatable",
    )


def _add_presets(made: argparse.ArgumentParser) -> None:
    preset = made.add_mutually_exclusive_group()
    preset.add_argument("--table", choices=["2", "4", "5"], help="of the paper")
    preset.add_argument("--figure", choices=["4"], help="of the paper")
    preset.add_argument(
        "--contest",
        action="store_true",
        help="every policy on every bundled task at 1, 2, 4 and 8 tokens a step, boe paired",
    )
    pairs = made.add_argument_group("what is compared item by item")
    pairs.add_argument("--paired", metavar="A", help="a policy of --policies")
    pairs.add_argument("--against", metavar="B,...", help="its rivals (default: all others)")


def _add_files_and_ways(made: argparse.ArgumentParser) -> None:
    files = made.add_argument_group("files")
    files.add_argument("--out", type=Path, metavar="DIR", help="every item; needed without --cells")
    files.add_argument(
        "--cells",
        type=Path,
        metavar="FILE",
        help="finished cells, one line each: those that it has are not run again, others are added",
    )
    files.add_argument("--no-run", action="store_true", help="sum up what is there, run nothing")
    files.add_argument("--data", type=Path, metavar="DIR", help="folder of the benchmark files")
    files.add_argument(
        "--grader",
        choices=get_args(Dialect),
        default="strict",
        help="whose rules judge answers to benchmarks (default strict)",
    )
    files.add_argument("--frequencies", type=Path, metavar="FILE", help="token table, for pc")
    files.add_argument("--scorer", metavar="PATH", help="causal language model, for --table 4")
    files.add_argument("--trace", action="store_true", help="record how each token was committed")
    how = made.add_argument_group("how it is run")
    how.add_argument(
        "--one-by-one",
        action="store_true",
        help="one cell after the other: their times are measured, not shared out",
    )
    how.add_argument(
        "--whole-canvas", action="store_true", help="end no canvas at EOS or a stop string"
    )
    how.add_argument(
        "--in-process", action="store_true", help="decode in this process, without vLLM"
    )
    how.add_argument(
        "--engine-args", default="{}", metavar="JSON", help="vLLM's, such as tensor_parallel_size"
    )


def read(args: argparse.Namespace) -> Settings:
    """The settings of a run, presets filled in.

    Raises:
        ValueError: naming the option, what was expected and what came.
    """
    table = _table(args)
    preset = preset_named(table) if table else None
    bundled = args.model in (TINY, TINY_TEXT)
    _check(args, preset, table)
    lengths = _integers("--gen-length", args.gen_length)
    if lengths is None and preset is not None and not bundled:
        lengths = preset.gen_lengths
    rates = _integers("--tokens-per-step", args.tokens_per_step)
    variants = _variants(args.policies, preset)
    paired, against = _pairs(args, preset, [variant.label for variant in variants])
    return Settings(
        model=args.model,
        tasks=_tasks(args.tasks, preset, args.model),
        variants=variants,
        gen_lengths=lengths,
        tokens_per_step=rates or (preset.tokens_per_step if preset else (1,)),
        block_length=args.block_length,
        limit=args.limit,
        seed=args.seed,
        temperature=_first(args.temperature, preset.temperature if preset else 0.0),
        chat=args.chat,
        fields=parse_fields(args.set, "--set"),
        trace=args.trace,
        data=args.data,
        grader=args.grader,
        frequencies=args.frequencies,
        engine_args=_mapping("--engine-args", args.engine_args),
        table=table,
        scorer=args.scorer,
        one_by_one=args.one_by_one or bool(preset and preset.one_by_one),
        whole_canvas=args.whole_canvas or bool(preset and preset.whole_canvas),
        paired=paired,
        against=against,
    )


def _table(args: argparse.Namespace) -> str | None:
    if args.contest:
        return CONTEST
    if args.table:
        return f"table {args.table}"
    return f"figure {args.figure}" if args.figure else None


def _check(args: argparse.Namespace, preset: Preset | None, table: str | None) -> None:
    """What can be said about the arguments one by one."""
    if args.out is None and args.cells is None:
        raise ValueError("--out: expected a folder, or --cells FILE, got neither; name one")
    if args.tasks is None and preset is None:
        raise ValueError(
            "--tasks: expected task names, got none; name some, or --table, --figure or --contest"
        )
    if args.model[:1] in ("/", ".", "~") and not Path(args.model).expanduser().is_dir():
        raise ValueError(
            f"--model: expected a folder, a name, or tiny; got no folder {args.model}; correct it"
        )
    if table == "table 4" and args.scorer is None and args.model != TINY_TEXT:
        raise ValueError(
            "--scorer: expected the path of a causal language model for --table 4, got none; "
            "name one, such as the folder of gpt2-large"
        )
    for option, value, least in (
        ("--limit", args.limit, 1),
        ("--block-length", args.block_length, 1),
        ("--temperature", args.temperature, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"{option}: expected at least {least}, got {value}; change it")


def _pairs(
    args: argparse.Namespace, preset: Preset | None, labels: list[str]
) -> tuple[str | None, tuple[str, ...]]:
    """The policy that is compared item by item, and its rivals; a preset's if they are run."""
    if args.paired is None and args.against is not None:
        raise ValueError("--against: expected --paired beside it, got none; name the policy")
    paired = args.paired or (preset.paired if preset and preset.paired in labels else None)
    if paired is None:
        return None, ()
    if args.against is not None:
        against = _names("--against", args.against)
    elif args.paired is None and preset is not None:
        against = tuple(label for label in preset.against if label in labels)
    else:
        against = tuple(label for label in labels if label != paired)
    for option, label in [("--paired", paired), *(("--against", label) for label in against)]:
        if label not in labels:
            raise ValueError(
                f"{option}: expected one of the policies that are run ({', '.join(labels)}), got "
                f"{label!r}; add it to --policies"
            )
    return paired, against


def _tasks(text: str | None, preset: Preset | None, model: str) -> tuple[str, ...]:
    if text is None:
        assert preset is not None
        bundled = {TINY: preset.bundled, TINY_TEXT: preset.of_text}
        return bundled.get(model) or preset.tasks
    return _names("--tasks", text)


def _variants(text: str | None, preset: Preset | None) -> tuple[Variant, ...]:
    if text is None and preset is not None:
        return preset.variants
    names = _names("--policies", text or DEFAULT_POLICIES)
    return tuple(parse(name) for name in names)


def _names(option: str, text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if not name or names.count(name) > 1:
            raise ValueError(f"{option}: expected different names A,B,..., got {text!r}")
    return names


def _integers(option: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1 or len(set(numbers)) < len(numbers):
        raise ValueError(
            f"{option}: expected different positive numbers N,..., got {text!r}; write 128,256"
        )
    return numbers


def _mapping(option: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(
            f"{option}: expected a JSON object, got {text!r}; write '{{\"max_num_seqs\": 64}}'"
        )
    return value


def _first(value: float | None, default: float) -> float:
    return default if value is None else value


def command_line(argv: Sequence[str]) -> str:
    """The command as it may be typed again."""
    import shlex

    return shlex.join(["boe-vllm", "eval", *argv])
