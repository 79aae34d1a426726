"""Active-query attention for packed sequences: see `api`."""

from boe_vllm.attention.api import (
    AttentionLayout,
    attention_backward,
    attention_forward,
    explain_auto,
)

__all__ = ["AttentionLayout", "attention_backward", "attention_forward", "explain_auto"]
