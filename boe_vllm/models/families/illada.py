"""iLLaDA-8B-Base and -Instruct (`modeling_illada.py` of their repositories)."""

from __future__ import annotations

from typing import Any, ClassVar

from boe_vllm.models.families.llama import LlamaShapedConfig


class ILLaDAConfig(LlamaShapedConfig):
    """Llama's network with an all-visible mask. Neither config nor tokenizer name the mask."""

    model_type: ClassVar[str] = "illada"
    architecture: ClassVar[str] = "ILLaDAForCausalLM"
    unsupported: ClassVar[dict[str, Any]] = {"attention_bias": False}
    published_ids: ClassVar[dict[int, dict[str, int]]] = {155136: {"mask_token_id": 5}}
