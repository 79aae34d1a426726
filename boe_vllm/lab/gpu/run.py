"""All checks, one after the other."""

from __future__ import annotations

import torch

from boe_vllm.lab.bench.ceilings import H200
from boe_vllm.lab.gpu.attention import check_attention
from boe_vllm.lab.gpu.facts import check_ceilings, check_facts
from boe_vllm.lab.gpu.report import Report
from boe_vllm.lab.gpu.rows import check_experts, check_functions, check_products
from boe_vllm.lab.gpu.steps import check_steps
from boe_vllm.lab.gpu.tokens import check_tokens


def run(device_name: str, *, small: bool, budget: float) -> int:
    """Print every check's lines; 0 if all are ok, else 1.

    Args:
        device_name: "cuda" or "cpu".
        small: sizes that a CPU does in seconds.
        budget: seconds after which no check begins.
    """
    report = Report(budget)
    if device_name == "cuda" and not torch.cuda.is_available():
        report.line("facts", ok=False, error="torch sees no CUDA device; use --device cpu --small")
        return 1
    device = torch.device("cuda:0" if device_name == "cuda" else "cpu")
    ceilings = H200  # should they not be measured, the predictions are those of another card
    with report.guard("facts"):
        check_facts(report, device)
    with report.guard("ceilings"):
        ceilings = check_ceilings(report, device, small=small)
    for check in (check_attention, check_products, check_functions, check_experts, check_tokens):
        with report.guard(check.__name__):
            check(report, device, small=small)
    with report.guard("steps"):
        check_steps(report, device, ceilings, small=small)
    report.line("all", ok=report.passed, seconds=report.seconds)
    return 0 if report.passed else 1
