"""Remove torchvision, torchaudio and torchcodec where they cannot be imported beside this torch.

vLLM depends on them for images, audio and video, none of which this project uses; but transformers
imports them whenever they are installed, and a build that does not match torch then breaks every
import of vLLM. Run by `make setup` with the environment's own Python; safe to run again.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

EXTRAS = ("torchvision", "torchaudio", "torchcodec")


def installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def import_error(name: str) -> str | None:
    """The last line that a fresh interpreter prints when it cannot import `name`, else None."""
    run = subprocess.run([sys.executable, "-c", f"import {name}"], capture_output=True, text=True)
    if run.returncode == 0:
        return None
    lines = run.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit status {run.returncode}"


def main() -> int:
    for name in EXTRAS:
        if not installed(name):
            continue
        error = import_error(name)
        if error is None:
            continue
        subprocess.run(
            [sys.executable, "-m", "pip", "uninstall", "--yes", "--quiet", name], check=True
        )
        print(f"removed {name}: it does not import beside this torch ({error})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
