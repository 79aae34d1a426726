"""What the machine is, and which attention it gets."""

from __future__ import annotations

import dataclasses
import platform
from typing import Any

import torch

import boe_vllm
from boe_vllm.attention import explain_auto
from boe_vllm.lab.bench.ceilings import Ceilings, measured_ceilings
from boe_vllm.lab.bench.machine import machine_name
from boe_vllm.lab.gpu.report import Report

HEAD_SIZE = 128
"""LLaDA-8B's."""


def check_facts(report: Report, device: torch.device) -> None:
    """The card, the versions and the attention."""
    auto = {}
    for dtype in (torch.bfloat16, torch.float32):
        impl, why = explain_auto(device.type, dtype, HEAD_SIZE)
        auto[str(dtype).removeprefix("torch.")] = {"impl": impl, "why": why[:300]}
    report.line(
        "facts",
        device=machine_name(device),
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        boe_vllm=boe_vllm.__version__,
        xformers=xformers_state(),
        attention_auto=auto,
    )


def check_ceilings(report: Report, device: torch.device, *, small: bool) -> Ceilings:
    """What the machine can do, which the predictions go by."""
    ceilings = measured_ceilings(device, small=small)
    report.line("ceilings", **dataclasses.asdict(ceilings))
    return ceilings


def xformers_state() -> dict[str, Any]:
    """Whether xformers is there and its library of kernels loads, or why it does not."""
    try:
        import xformers  # after `explain_auto`, which loads the library that xformers needs
        from xformers import _cpp_lib
    except Exception as error:  # a broken installation raises whatever its imports do
        return {"loaded": False, "why": f"{type(error).__name__}: {error}"[:300]}
    failure = getattr(_cpp_lib, "_cpp_library_load_exception", None)
    found: dict[str, Any] = {"version": xformers.__version__, "loaded": failure is None}
    return found if failure is None else found | {"why": str(failure)[:300]}
