"""Everything of the core that a GPU computes, checked on a machine that has one; no vLLM needed.

    python scripts/gpu_check.py > gpu.jsonl

Prints one JSON line for each check, with `ok`: facts and ceilings; attention against the float64
reference; whether a row's numbers depend on the rows beside it; the bundled checkpoint's tokens
against the CPU's; steps at LLaDA-8B's widths beside their prediction. A check that fails stops no
other. Exits with 0 if all are ok, else with 1. `boe-vllm bench predict --check gpu.jsonl` compares
the steps with the cost model.

Beside torch, numpy, safetensors and transformers it needs the wheels pydantic, pydantic-core,
annotated-types and typing-inspection; attention by xformers is checked too where xformers==0.0.35
and, for a torch built for CUDA 13, nvidia-cuda-runtime-cu12 are installed.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options; reading them needs nothing but Python."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes for trials on a CPU")
    parser.add_argument(
        "--budget", type=float, default=420.0, help="seconds after which no check begins"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """0 if every check is ok."""
    args = parse(arguments)
    sys.path.insert(0, str(ROOT))  # a bare machine has the sources and no installation
    try:
        from boe_vllm.lab.gpu.run import run
    except ImportError as error:
        missing = f"{error}; --help names the wheels that are needed"
        print(json.dumps({"check": "imports", "ok": False, "error": missing}))
        return 1
    return run(args.device, small=args.small, budget=args.budget)


if __name__ == "__main__":
    sys.exit(main())
