"""What works without any extra, vLLM among them: every room below the plugin, and it alone.

    python scripts/check_core.py

`scripts/check_wheel.sh` runs it where only the core's requirements are installed; a test calls
`import_rooms` with the others hidden. The package itself has to be imported in 0.3 s of processor
time, the limit that matters to a command line.
"""

import importlib
import pkgutil
import subprocess
import sys

CORE = (
    *("base", "attention", "models", "sampling", "steering", "policies", "request", "decoding"),
    # Of the rooms above: what names its extras when it is used, not when it is imported.
    *(
        "cli",
        "vllm_plugin.plugin",
        "vllm_plugin.hooks",
        "lab.tasks.sudoku",
        "lab.eval",
        "lab.bench",
    ),
)
HEAVY = ("torch", "vllm", "numpy", "transformers", "pydantic", "prometheus_client")
COLD = (
    "import time; begin = time.process_time(); import boe_vllm; print(time.process_time() - begin)"
)
LIMIT = 0.3


def import_rooms() -> list[str]:
    """Import the package, which brings nothing heavy, then every module of the core.

    Returns:
        The modules' names.
    """
    import boe_vllm  # noqa: F401

    assert not [name for name in HEAVY if sys.modules.get(name)]
    names = [module for room in CORE for module in _modules_of(f"boe_vllm.{room}")]
    assert not sys.modules.get("vllm")
    return names


def _modules_of(name: str) -> list[str]:
    """Import a module and, if it is one of the core's rooms, everything in it."""
    module = importlib.import_module(name)
    if name.count(".") > 1 or not hasattr(module, "__path__"):
        return [name]
    below = pkgutil.walk_packages(module.__path__, f"{name}.")
    return [name, *(importlib.import_module(found.name).__name__ for found in below)]


def cold_import() -> float:
    """Seconds of processor time that the import takes in a fresh interpreter, the best of three."""
    command = [sys.executable, "-c", COLD]
    return min(float(subprocess.check_output(command, text=True)) for _ in range(3))


def main() -> int:
    """0 if all is well."""
    modules = import_rooms()
    seconds = cold_import()
    print(
        f"core: {len(modules)} modules; the package is imported in {seconds:.3f} s "
        f"(limit {LIMIT} s)"
    )
    return 0 if seconds < LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
