"""LLaDA-MoE-7B-A1B (inclusionAI/dInfer `tools/configuration_lladamoe.py`)."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from boe_vllm.models.families.llama import LlamaShapedConfig
from boe_vllm.models.shape import ExpertsShape


class LLaDAMoEConfig(LlamaShapedConfig):
    """Norms on the heads of q and k; routed MLPs in every block. Its published `model_type` is
    "llada"; "llada_moe" is what its configuration file registers."""

    model_type: ClassVar[str] = "llada_moe"
    architecture: ClassVar[str] = "LLaDAMoEModelLM"
    default_theta: ClassVar[float] = 50000.0
    head_norm: ClassVar[bool] = True
    unsupported: ClassVar[dict[str, Any]] = {
        "attention_bias": False,
        "qk_layernorm": True,
        "shared_expert_intermediate_size": None,
        "moe_router_score_function": "softmax",
        "router_num_group": None,
        "router_topk_group": None,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": False,
    }
    end_of_turn: ClassVar[str | None] = "<|role_end|>"
    published_ids: ClassVar[dict[int, dict[str, int]]] = {157184: {"mask_token_id": 156895}}

    rms_norm_eps: float = 1e-5
    num_experts: int = 64
    num_experts_per_tok: int = 8
    expert_intermediate_size: int = 1024
    moe_layer_freq: int | list[int] | None = None
    moe_router_enable_expert_bias: bool = False

    def experts(self) -> ExpertsShape:
        """As the config says, in every block."""
        return ExpertsShape(
            count=self.num_experts,
            chosen=self.num_experts_per_tok,
            inner=self.expert_intermediate_size,
            biased=self.moe_router_enable_expert_bias,
        )

    def check_supported(self) -> None:
        """Raise ValueError if the network would not compute what this config describes."""
        super().check_supported()
        frequency = self.moe_layer_freq
        if frequency is not None and set(np.atleast_1d(frequency).tolist()) != {1}:
            raise ValueError(
                f"moe_layer_freq: expected 1 for every layer, got {frequency!r}; dense layers "
                f"among routed ones are not supported"
            )
