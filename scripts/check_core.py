"""What works without any extra, vLLM among them: every module from `base` up to `decoding`.

    python scripts/check_core.py

`scripts/check_wheel.sh` runs it where only the core's requirements are installed; a test calls
`import_rooms` with the others hidden. The package itself has to be imported in 0.3 s of processor
time, the limit that matters to a command line.
"""

import importlib
import importlib.util
import pkgutil
import subprocess
import sys

ROOMS = (
    "base",
    "attention",
    "models",
    "sampling",
    "steering",
    "policies",
    "request",
    "decoding",
)
"""Rooms all of whose modules work without vLLM."""
NEEDS = {"boe_vllm.models.kernels": "triton", "boe_vllm.request.regex_compiler": "outlines_core"}
"""Modules that work where something is installed that comes with PyTorch for CUDA, or with vLLM;
nothing else imports them elsewhere."""
LIGHT = ("cli", "lab.eval", "lab.bench", "lab.tasks.sudoku")
LAZY = ("vllm_plugin.plugin", "vllm_plugin.hooks")
"""Modules of other rooms that do: they import vLLM only when they are used."""
HEAVY = ("torch", "vllm", "numpy", "transformers", "pydantic", "prometheus_client")
COLD = (
    "import time; begin = time.process_time(); import boe_vllm; print(time.process_time() - begin)"
)
LIMIT = 0.3


def core_modules() -> list[str]:
    """Full names of all modules of the rooms, and of the others that are named here."""
    names = [f"boe_vllm.{name}" for name in (*LIGHT, *LAZY)]
    for room in ROOMS:
        package = importlib.import_module(f"boe_vllm.{room}")
        names.append(package.__name__)
        found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        names += [module.name for module in found]
    lacking = tuple(name for name, needed in NEEDS.items() if not installed(needed))
    return [name for name in names if not name.startswith(lacking)]


def installed(name: str) -> bool:
    """Whether a package can be imported."""
    if sys.modules.get(name, True) is None:  # hidden by a test
        return False
    return importlib.util.find_spec(name) is not None


def import_rooms() -> None:
    """Import the package, which brings nothing heavy, then the core's rooms and every policy."""
    import boe_vllm  # noqa: F401

    assert not [name for name in HEAVY if sys.modules.get(name)]
    for name in core_modules():
        importlib.import_module(name)
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
    print(f"core: {len(core_modules())} modules import without vLLM")
    print(f"the package is imported in {seconds:.3f} s of processor time (limit {LIMIT} s)")
    return 0 if seconds < LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
