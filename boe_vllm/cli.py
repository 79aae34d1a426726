"""`boe-vllm COMMAND`: hands the rest of the command line to the command's own module."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

# Command -> module with a `main(argv)`, imported only when the command is used.
COMMANDS = {
    "bench": "boe_vllm.lab.bench",
    "eval": "boe_vllm.lab.eval",
    "grade": "boe_vllm.lab.tasks.grade",
    "plot": "boe_vllm.lab.pictures.plot",
    "watch": "boe_vllm.lab.pictures.watch",
    "fields": "boe_vllm.request.reference_text",
    "count-frequencies": "boe_vllm.policies.frequencies",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    usage = f"usage: boe-vllm {{{','.join(COMMANDS)}}} ..."
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage)
        return 0 if arguments else 2
    command, *rest = arguments
    if command not in COMMANDS:
        print(
            f"{usage}\nboe-vllm: expected one of {sorted(COMMANDS)}, got {command!r}",
            file=sys.stderr,
        )
        return 2
    return importlib.import_module(COMMANDS[command]).main(rest) or 0
