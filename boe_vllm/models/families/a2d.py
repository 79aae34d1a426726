"""Tiny-A2D (ZHZisZZ/dllm `dllm/pipelines/a2d`): transformers' own classes with an all-visible mask.

Qwen3-0.6B-diffusion-mdlm, Qwen2.5-Coder-0.5B-diffusion-mdlm and their like. The mask is the
tokenizer's.
"""

from __future__ import annotations

from typing import Any, ClassVar

from boe_vllm.models.families.llama import LlamaShapedConfig


class A2DQwen3Config(LlamaShapedConfig):
    """Qwen3: an RMSNorm on every head of q and k."""

    model_type: ClassVar[str] = "a2d-qwen3"
    architecture: ClassVar[str] = "A2DQwen3LMHeadModel"
    head_norm: ClassVar[bool] = True
    end_of_turn: ClassVar[str | None] = "<|im_end|>"
    head_dim: int | None = 128


class A2DQwen2Config(LlamaShapedConfig):
    """Qwen2: biases on q, k and v, whatever `attention_bias` says."""

    model_type: ClassVar[str] = "a2d-qwen2"
    architecture: ClassVar[str] = "A2DQwen2LMHeadModel"
    qkv_bias: ClassVar[bool] = True
    unsupported: ClassVar[dict[str, Any]] = {}
    end_of_turn: ClassVar[str | None] = "<|im_end|>"


class A2DLlamaConfig(LlamaShapedConfig):
    """Llama."""

    model_type: ClassVar[str] = "a2d-llama"
    architecture: ClassVar[str] = "A2DLlamaLMHeadModel"
    end_of_turn: ClassVar[str | None] = "<|eot_id|>"
