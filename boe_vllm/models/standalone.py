"""A LLaDA network outside an engine, for tests and benchmarks: one process, random weights."""

from __future__ import annotations

import functools
import socket
from types import SimpleNamespace

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    ensure_model_parallel_initialized,
    init_distributed_environment,
    model_parallel_is_initialized,
)

from boe_vllm.models.decoder import LLaDAForDiffusion
from boe_vllm.models.llada import LLaDAConfig


@functools.cache
def _vllm_config() -> VllmConfig:
    return VllmConfig()


def _ensure_process_group(device: torch.device) -> None:
    """vLLM's parallel layers want a process group, even of one."""
    if model_parallel_is_initialized():
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    init_distributed_environment(
        world_size=1,
        rank=0,
        distributed_init_method=f"tcp://127.0.0.1:{port}",
        local_rank=0,
        backend="nccl" if device.type == "cuda" else "gloo",
    )
    ensure_model_parallel_initialized(1, 1)


def build(
    config: LLaDAConfig,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    scale: float | None = None,
) -> LLaDAForDiffusion:
    """A network with seeded normal weights.

    Args:
        config: sizes.
        dtype: of all weights.
        device: where it lives.
        seed: of the weights.
        scale: standard deviation of the matrices; default 1/sqrt of their input width.
    """
    device = torch.device(device)
    with set_current_vllm_config(_vllm_config()), torch.device(device):
        _ensure_process_group(device)
        wanted = SimpleNamespace(model_config=SimpleNamespace(hf_config=config))
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = LLaDAForDiffusion(vllm_config=wanted)  # type: ignore[arg-type]
        finally:
            torch.set_default_dtype(before)
    generator = torch.Generator(device=device).manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            std = scale or parameter.shape[1] ** -0.5
            parameter.data.normal_(0.0, std, generator=generator)
    return model.to(dtype).eval()
