"""`boe-vllm fields [POLICY]`: every field that can be set, for a terminal or as a document.

boe-vllm fields                                  everything
boe-vllm fields eb                               one policy
boe-vllm fields --markdown > docs/reference.md   the document, of the bundled policies
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from boe_vllm.request.reference import (
    Field,
    PolicyEntry,
    Section,
    policy_entries,
    policy_entry,
    sections,
)

HEAD = """# Reference

This page is generated; do not edit it:

    boe-vllm fields --markdown > docs/reference.md

`boe-vllm fields` prints the same in a terminal, and `boe-vllm fields POLICY` prints one policy.

A request sets its fields in `SamplingParams.extra_args`, over HTTP in `vllm_xargs`, and in a
notebook as arguments of `Denoiser.generate`. The server's own sampler config takes the same
fields as defaults (`--sampler-config`, or `sampler_config` of `LLM`). A field that is unknown, out
of bounds or inconsistent with another one is refused with an error that names it.

A "-" in the column of defaults means that nothing is set; the meaning says what happens then.
"""
WIDEST = 100


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 2 for a policy that does not exist."""
    parser = argparse.ArgumentParser(
        prog="boe-vllm fields",
        description="Print the fields that a server or a request may set, with their defaults.",
    )
    parser.add_argument("policy", nargs="?", metavar="POLICY", help="only this policy's fields")
    parser.add_argument("--markdown", action="store_true", help="as docs/reference.md")
    args = parser.parse_args(argv)
    if args.policy is not None:
        try:
            entry = policy_entry(args.policy)
        except ValueError as error:
            print(f"boe-vllm fields: {error}", file=sys.stderr)
            return 2
        print(markdown_of_policy(entry) if args.markdown else "\n".join(_lines_of_policy(entry)))
        return 0
    print(markdown() if args.markdown else "\n".join(_lines()))
    return 0


# ---- for a terminal ------------------------------------------------------------------------------


def _lines() -> Iterator[str]:
    for section in sections():
        yield from (section.title.upper(), *_wrapped(section.text.replace("`", "")), "")
        yield from _lines_of_fields(section.fields)
    yield from ("POLICIES", "")
    for entry in policy_entries():
        yield from _lines_of_policy(entry)


def _lines_of_policy(entry: PolicyEntry) -> Iterator[str]:
    yield from _wrapped(f"{entry.name}: {entry.summary}")
    if entry.source != entry.summary:
        yield from _wrapped(f"source: {entry.source}", "  ")
    if entry.passes != "-":
        yield from _wrapped(f"passes in a step: {entry.passes}", "  ")
    yield ""
    yield from _lines_of_fields(entry.fields)
    for name, fields in entry.presets.items():
        yield from _wrapped(f"preset {name}: {_assignments(fields)}", "  ")
    if entry.presets:
        yield ""


def _lines_of_fields(fields: Sequence[Field]) -> Iterator[str]:
    for field in fields:
        unit = f" [{field.unit}]" if field.unit else ""
        default = "not set" if field.default == "-" else f"default {field.default}"
        yield f"  {field.name}: {field.kind.replace('`', '')}{unit}; {default}"
        yield from _wrapped(field.meaning, "      ")
        yield ""


def _wrapped(text: str, indent: str = "") -> list[str]:
    width = min(WIDEST, shutil.get_terminal_size().columns)
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent)


# ---- as a document -------------------------------------------------------------------------------


def markdown() -> str:
    """The whole document."""
    entries = policy_entries(bundled=True)
    parts = [HEAD, *map(_markdown_of_section, sections()), "## Policies\n", _overview(entries)]
    return "\n".join([*parts, *map(markdown_of_policy, entries)]).rstrip("\n")


def markdown_of_policy(entry: PolicyEntry) -> str:
    """One policy with its fields and presets."""
    parts = [f"### `{entry.name}`\n", f"{entry.summary}.\n"]
    parts.append(_table(entry.fields) if entry.fields else "It has no fields of its own.\n")
    if entry.presets:
        rows = [
            f"| `{name}` | {_assignments(fields, '`') or 'the defaults'} |"
            for name, fields in entry.presets.items()
        ]
        parts.append("\n".join(["| preset | sets |", "|---|---|", *rows, ""]))
    return "\n".join(parts)


def _markdown_of_section(section: Section) -> str:
    return "\n".join([f"## {section.title}\n", f"{section.text}\n", _table(section.fields)])


def _overview(entries: Sequence[PolicyEntry]) -> str:
    """All policies in one table."""
    rows = [
        f"| [`{entry.name}`](#{entry.name}) | {_cell(entry.summary)} | {_cell(entry.source)} | "
        f"{_cell(entry.passes)} |"
        for entry in entries
    ]
    head = ["| policy | what it does | source | passes in a step |", "|---|---|---|---|"]
    return "\n".join([*head, *rows, ""])


def _table(fields: Sequence[Field]) -> str:
    lines = ["| field | type | unit | default | meaning |", "|---|---|---|---|---|"]
    for field in fields:
        default = field.default if field.default == "-" else f"`{field.default}`"
        cells = (f"`{field.name}`", field.kind, field.unit, default, field.meaning)
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return "\n".join([*lines, ""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _assignments(fields: Mapping[str, Any], quote: str = "") -> str:
    return ", ".join(
        f"{quote}{name}={value if isinstance(value, str) else json.dumps(value)}{quote}"
        for name, value in fields.items()
    )
