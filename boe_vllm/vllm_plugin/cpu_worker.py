"""vLLM's CPU worker with our model runner in it."""

from __future__ import annotations

from typing import Any

from vllm import envs
from vllm.v1.worker import cpu_worker
from vllm.v1.worker.worker_base import CompilationTimes

from boe_vllm.base.process_memory import keep_freed_memory
from boe_vllm.vllm_plugin.runner import DiffusionModelRunner, check_runner


class DiffusionCPUWorker(cpu_worker.CPUWorker):
    """CPU worker: threads, process group and seed are vLLM's, the runner is ours."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.use_v2_model_runner = False

    def init_device(self) -> None:
        keep_freed_memory()
        # vLLM makes its runner in the last line of this long method, by this global name.
        original = cpu_worker.CPUModelRunner
        cpu_worker.CPUModelRunner = DiffusionModelRunner
        try:
            super().init_device()
        finally:
            cpu_worker.CPUModelRunner = original
        check_runner(self.model_runner)

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Run the largest steps once, which vLLM leaves out where nothing is compiled."""
        if not envs.VLLM_CPU_CI_ENV:  # vLLM's own switch for quick starts
            self.model_runner.warming_up_model()
        return super().compile_or_warm_up_model()

    def _should_warm_up_model(self) -> bool:
        """Not again."""
        return False
