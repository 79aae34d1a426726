"""vLLM's CUDA worker with our model runner in it.

Nothing of vLLM's CPU worker is imported here: it replaces functions of `torch.cuda` for the whole
process.
"""

from __future__ import annotations

from typing import Any

from vllm.utils.gc_utils import freeze_gc_heap
from vllm.utils.torch_utils import set_random_seed
from vllm.v1.worker.gpu_worker import Worker
from vllm.v1.worker.worker_base import CompilationTimes

from boe_vllm.vllm_plugin.runner import DiffusionModelRunner, check_runner


class DiffusionGPUWorker(Worker):
    """CUDA worker: device, process group, memory checks and seed are vLLM's, the runner is ours."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.use_v2_model_runner = False

    def init_device(self) -> None:
        super().init_device()
        check_runner(self.model_runner)

    def _make_model_runner(self) -> DiffusionModelRunner:
        return DiffusionModelRunner(self.vllm_config, self.device)

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Run the largest steps once, so that too little memory shows now and not under load."""
        self.model_runner.warming_up_model()
        set_random_seed(self.model_config.seed, self.parallel_config.data_parallel_index)
        freeze_gc_heap()
        return CompilationTimes(language_model=0.0, encoder=0.0)

    def execute_dummy_batch(self) -> None:
        """Nothing: data-parallel engines of a dense model need not run in step."""
