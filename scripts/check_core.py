"""What works without any extra, vLLM among them: settings, policies, tasks, kernels' interfaces.

    python scripts/check_core.py

`scripts/check_wheel.sh` runs it where only the core's requirements are installed; a test calls
`import_rooms` with the others hidden. The package itself has to be imported in 0.3 s of processor
time, the limit that matters to a command line.
"""

import importlib
import subprocess
import sys

ROOMS = (
    *("config", "content", "limits", "options", "randomness", "rows", "rules", "frequencies"),
    *("attention", "attention.api", "policies", "policies.boe", "tasks", "tasks.sudoku"),
    *("prediction", "steering.asks", "plugin", "hooks", "cli", "eval", "bench"),
)
HEAVY = ("torch", "vllm", "numpy", "transformers", "pydantic", "prometheus_client")
COLD = (
    "import time; begin = time.process_time(); import boe_vllm; print(time.process_time() - begin)"
)
LIMIT = 0.3


def import_rooms() -> None:
    """Import the package, which brings nothing heavy, then the core's rooms and every policy."""
    import boe_vllm  # noqa: F401

    assert not [name for name in HEAVY if sys.modules.get(name)]
    for room in ROOMS:
        importlib.import_module(f"boe_vllm.{room}")
    from boe_vllm.policies import POLICY_NAMES, load_policy

    for name in POLICY_NAMES:
        load_policy(name)
    assert not sys.modules.get("vllm")


def cold_import() -> float:
    """Seconds of processor time that the import takes in a fresh interpreter, the best of three."""
    command = [sys.executable, "-c", COLD]
    return min(float(subprocess.check_output(command, text=True)) for _ in range(3))


def main() -> int:
    """0 if all is well."""
    import_rooms()
    seconds = cold_import()
    print(f"core: {len(ROOMS)} rooms; the package is imported in {seconds:.3f} s (limit {LIMIT} s)")
    return 0 if seconds < LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
