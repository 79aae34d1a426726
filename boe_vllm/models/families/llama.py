"""What the configurations of all Llama-shaped families share: fields, names and checks.

A family is a subclass in a file of its own, which says its architecture, its switches, its special
ids, and what of its `config.json` is not implemented.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from transformers import PretrainedConfig

from boe_vllm.models.families import check_token_ids, refuse_variants, route
from boe_vllm.models.names import TensorNames
from boe_vllm.models.shape import DecoderShape, ExpertsShape, RopeStretch

NAMES = TensorNames(
    family="Llama",
    embedding="model.embed_tokens",
    final_norm="model.norm",
    head="lm_head",
    block="model.layers.{n}.",
    within={
        "attention_norm": "input_layernorm",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "attention_out": "self_attn.o_proj",
        "q_norm": "self_attn.q_norm",
        "k_norm": "self_attn.k_norm",
        "mlp_norm": "post_attention_layernorm",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
        "router": "mlp.gate",
        "expert_bias": "mlp.gate.expert_bias",
    },
    experts="mlp.experts.{e}.",
)
"""Those of transformers' Llama, Qwen2 and Qwen3, and of the published LLaDA-MoE."""

_STRETCH = {
    "factor": "factor",
    "low_freq_factor": "low",
    "high_freq_factor": "high",
    "original_max_position_embeddings": "context",
}

SUPPORTED_VARIANT: dict[str, Any] = {
    "hidden_act": "silu",
    "mlp_bias": False,
    "layer_norm_eps": None,
    "use_sliding_window": False,
    "use_mrope": False,
    "clip_qkv": None,
}
"""Fields that choose a variant of the network, and the one value that ours implements."""


class LlamaShapedConfig(PretrainedConfig):
    """A Llama-shaped checkpoint's `config.json`.

    Raises:
        ValueError: for a variant that the network does not implement, or sizes that do not divide.
    """

    architecture: ClassVar[str]
    names: ClassVar[TensorNames] = NAMES
    qkv_bias: ClassVar[bool] = False
    head_norm: ClassVar[bool] = False
    shift: ClassVar[Literal[0, 1]] = 0
    unsupported: ClassVar[Mapping[str, Any]] = {"attention_bias": False}
    """Further fields as in `SUPPORTED_VARIANT`."""
    end_of_turn: ClassVar[str | None] = None
    """Text of the token that ends a turn of a chat."""
    own_tokenizer: ClassVar[Any] = None
    """Tokenizer of the family, where transformers knows none by the name that checkpoints give."""
    published_ids: ClassVar[Mapping[int, Mapping[str, int]]] = {}
    """Size of a vocabulary -> special ids that its published checkpoints do not name themselves."""

    hidden_size: int = 4096
    """Width of the residual stream."""
    num_hidden_layers: int = 32
    """Number of blocks."""
    num_attention_heads: int = 32
    """Query heads."""
    num_key_value_heads: int | None = None
    """Key/value heads; default: as many as query heads."""
    head_dim: int | None = None
    """Width of a head; default: what the heads leave of `hidden_size`."""
    intermediate_size: int = 11008
    """Inner width of the MLP."""
    vocab_size: int = 32000
    """Tokens in the vocabulary."""
    max_position_embeddings: int = 4096
    """Longest prompt plus canvas, in tokens."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square in every norm."""
    rope_parameters: dict[str, Any] | None = None
    """Base of the rotary embedding, as `rope_theta`."""
    tie_word_embeddings: bool = False
    """Whether the output matrix is the embedding matrix."""
    layer_types: list[str] | None = None
    """Kind of attention of each block."""
    mask_token_id: int | None = None
    """The token that stands for "not written yet"."""
    eos_token_id: int | list[int] | None = None
    """End of text; of several, the first."""
    pad_token_id: int | None = None
    """Padding."""
    eot_token_id: int | None = None
    """End of turn."""
    initializer_range: float = 0.02
    """Standard deviation of newly made weights."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if isinstance(self.eos_token_id, list):
            self.eos_token_id = self.eos_token_id[0] if self.eos_token_id else None
        self.check_supported()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers calls it."""
        return route(cls, super().from_dict, config_dict, kwargs)

    def experts(self) -> ExpertsShape | None:
        """Routed MLPs in the place of dense ones."""
        return None

    def shape(self) -> DecoderShape:
        """The network's sizes and switches."""
        assert self.num_key_value_heads and self.head_dim and self.rope_parameters
        return DecoderShape(
            vocab_size=self.vocab_size,
            embedding_rows=self.vocab_size,
            width=self.hidden_size,
            layers=self.num_hidden_layers,
            heads=self.num_attention_heads,
            kv_heads=self.num_key_value_heads,
            head_size=self.head_dim,
            inner=self.intermediate_size,
            eps=self.rms_norm_eps,
            rope_theta=float(self.rope_parameters["rope_theta"]),
            rope_stretch=self.rope_stretch(),
            qkv_bias=self.qkv_bias,
            head_norm=self.head_norm,
            tied=self.tie_word_embeddings,
            experts=self.experts(),
            shift=self.shift,
        )

    def rope_stretch(self) -> RopeStretch | None:
        """How the rotary embedding is scaled."""
        rope = self.rope_parameters or {}
        if rope.get("rope_type", "default") == "default":
            return None
        return RopeStretch(**{ours: float(rope[name]) for name, ours in _STRETCH.items()})

    def _check_rope(self) -> None:
        rope = dict(self.rope_parameters or {})
        kind, known = rope.pop("rope_type", "default"), {"rope_theta"}
        known |= set(_STRETCH) if kind == "llama3" else set()
        partial = rope.pop("partial_rotary_factor", 1.0) != 1.0
        if partial or kind not in ("default", "llama3") or known != {"rope_theta", *rope}:
            raise ValueError(
                f"rope_parameters: expected rope_theta alone, or with the scaling of 'llama3', got "
                f"{self.rope_parameters}; other rotary embeddings are not supported"
            )

    def check_supported(self) -> None:
        """Raise ValueError if the network would not compute what this config describes."""
        refuse_variants(self, {**SUPPORTED_VARIANT, **self.unsupported}, self.architecture)
        others = set(self.layer_types or ()) - {"full_attention"}
        if others:
            raise ValueError(
                f"layer_types: expected 'full_attention' for every layer, got {sorted(others)}; "
                f"this variant of {self.architecture} is not supported"
            )
        self._check_rope()
        assert self.num_key_value_heads is not None
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads: expected a multiple of num_key_value_heads "
                f"({self.num_key_value_heads}), got {self.num_attention_heads}; correct the "
                f"checkpoint's config.json"
            )
        check_token_ids(self)
