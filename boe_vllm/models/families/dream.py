"""Dream-v0-7B, Dream-Coder-7B and DiffuCoder-7B: Qwen2's network, predictions shifted by one.

NVlabs/Fast-dLLM `dream/model/modeling_dream.py`; its `generation_utils.py` shifts,
`logits = cat([logits[:, :1], logits[:, :-1]], 1)`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from transformers import Qwen2Tokenizer

from boe_vllm.models.families.llama import LlamaShapedConfig


class DreamTokenizer(Qwen2Tokenizer):
    """By this name the checkpoints ask for a copy of Qwen2's tokenizer that lies in their own
    repositories, whose code is not run."""


class DreamConfig(LlamaShapedConfig):
    """Biases on q, k and v; the row before a position predicts it."""

    model_type: ClassVar[str] = "Dream"
    architecture: ClassVar[str] = "DreamModel"
    qkv_bias: ClassVar[bool] = True
    shift: ClassVar[Literal[0, 1]] = 1
    # The network has its biases whatever this field says.
    unsupported: ClassVar[dict[str, Any]] = {}
    end_of_turn: ClassVar[str | None] = "<|im_end|>"
    own_tokenizer: ClassVar[Any] = DreamTokenizer
    published_ids: ClassVar[dict[int, dict[str, int]]] = {
        152064: {"mask_token_id": 151666, "eos_token_id": 151643, "eot_token_id": 151645}
    }
