"""Active-query attention for packed sequences: see `api`."""

from boe_vllm.attention.api import (
    AttentionLayout,
    active_query_attention,
    attention_backward,
    attention_forward,
    attention_forward_with_lse,
    choose_impl,
)

__all__ = [
    "AttentionLayout",
    "active_query_attention",
    "attention_backward",
    "attention_forward",
    "attention_forward_with_lse",
    "choose_impl",
]
