"""Which modules a request passes, from admission to its last token: those whose functions run.

    python scripts/modules_passed.py [POLICY]

A real engine on the bundled checkpoint, in this process, serves one request that sets nothing, as
its second: what only a first one does, such as late imports, does not count. The policy
(`confidence` by default) is the server's.
"""

from __future__ import annotations

import os
import sys
import threading
from types import FrameType
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_CI_ENV", "1")

from vllm import LLM, SamplingParams

import boe_vllm

MARK = f"{os.sep}boe_vllm{os.sep}"


def main() -> None:
    """Serve the request and print the modules, one a line, and their number."""
    llm = LLM(boe_vllm.tiny_model_path(), sampler=sys.argv[1] if sys.argv[1:] else "confidence")
    passed: set[str] = set()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        path = frame.f_code.co_filename
        if event == "call" and frame.f_code.co_name != "<module>" and MARK in path:
            passed.add(path.rsplit(MARK, 1)[1].removesuffix(".py").replace(os.sep, "."))

    plain = SamplingParams(temperature=0, max_tokens=16)
    llm.generate(["A:12+34="], plain, use_tqdm=False)
    sys.setprofile(note)
    threading.setprofile(note)
    llm.generate(["A:12+34="], plain, use_tqdm=False)
    sys.setprofile(None)
    threading.setprofile(None)
    print("\n".join(sorted(passed)))
    print(len(passed), "modules")


if __name__ == "__main__":
    main()
