"""`python -m boe_vllm.lab.bench BENCHMARK [options]`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

BENCHMARKS = (
    "throughput",
    "steering",
    "attention",
    "scaling",
    "memory",
    "overhead",
    "fidelity",
    "remask",
    "predict",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark and return the exit status.

    A benchmark is a module of this package with `add_arguments(parser)`, which sets its defaults
    and adds its own options, and `run(args)`, which prints and returns an exit status or None. One
    that sets `COMMON_OPTIONS` to False has only its own options.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    usage = f"usage: boe-vllm bench {{{','.join(BENCHMARKS)}}} [options]"
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"{usage}\n'boe-vllm bench BENCHMARK --help' lists a benchmark's options.")
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in BENCHMARKS:
        print(
            f"{usage}\nboe-vllm bench: expected one of {sorted(BENCHMARKS)}, got {name!r}",
            file=sys.stderr,
        )
        return 2
    # Imported only now: torch and vLLM take seconds.
    from boe_vllm.lab.bench import common

    module = importlib.import_module(f"boe_vllm.lab.bench.{name}")
    parser = argparse.ArgumentParser(
        prog=f"boe-vllm bench {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shares = getattr(module, "COMMON_OPTIONS", True)
    if shares:
        common.add_arguments(parser)
    module.add_arguments(parser)
    try:
        args = parser.parse_args(rest)
        if shares:
            args = common.checked(args)
        return module.run(args) or 0
    except common.UsageError as error:
        parser.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
