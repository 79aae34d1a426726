"""The configuration of a LLaDA checkpoint, as transformers and vLLM read it.

Field names are LLaDA's own (`config.json` of GSAI-ML/LLaDA-8B); `attribute_map` gives vLLM its
usual names for them. Registered under `model_type` "llada", so a checkpoint's `auto_map` is never
followed and `trust_remote_code` is not needed.
"""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PretrainedConfig

from boe_vllm.models.families import check_token_ids, refuse_variants, route
from boe_vllm.models.names import TensorNames
from boe_vllm.models.shape import DecoderShape

PREFIX = "model.transformer."
NAMES = TensorNames(
    family="LLaDA",
    embedding=f"{PREFIX}wte",
    final_norm=f"{PREFIX}ln_f",
    head=f"{PREFIX}ff_out",
    block=f"{PREFIX}blocks.{{n}}.",
    within={
        "attention_norm": "attn_norm",
        "q": "q_proj",
        "k": "k_proj",
        "v": "v_proj",
        "attention_out": "attn_out",
        "mlp_norm": "ff_norm",
        "gate": "ff_proj",
        "up": "up_proj",
        "down": "ff_out",
    },
)

# Fields that choose a variant of the network, and the one value that ours implements.
SUPPORTED_VARIANT: dict[str, Any] = {
    "block_type": "llama",
    "block_group_size": 1,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "bias_for_layer_norm": False,
    "attention_layer_norm": False,
    "input_emb_norm": False,
    "activation_type": "silu",
    "rope": True,
    "alibi": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "scale_logits": False,
    "clip_qkv": None,
}
# LLaDA-8B's end-of-turn token; its config.json names no such token.
_LLADA_8B_VOCAB_SIZE, _LLADA_8B_EOT = 126464, 126348


class LLaDAConfig(PretrainedConfig):
    """A LLaDA checkpoint's `config.json`; sizes and token ids default to LLaDA-8B's.

    Raises:
        ValueError: for a variant that the network does not implement, or sizes that do not divide.
    """

    model_type: ClassVar[str] = "llada"
    architecture: ClassVar[str] = "LLaDAModelLM"
    names: ClassVar[TensorNames] = NAMES
    end_of_turn: ClassVar[str] = "<|eot_id|>"
    shift: ClassVar[int] = 0
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "intermediate_size": "mlp_hidden_size",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "max_position_embeddings": "max_sequence_length",
        "hidden_act": "activation_type",
        "tie_word_embeddings": "weight_tying",
    }

    d_model: int = 4096
    """Width of the residual stream."""
    n_layers: int = 32
    """Number of blocks."""
    n_heads: int = 32
    """Query heads."""
    n_kv_heads: int | None = None
    """Key/value heads; default: as many as query heads."""
    multi_query_attention: bool | None = None
    """Older spelling of a single key/value head."""
    mlp_hidden_size: int | None = None
    """Inner width of the MLP; default: `mlp_ratio` times `d_model`."""
    mlp_ratio: int = 4
    """See `mlp_hidden_size`."""
    max_sequence_length: int = 4096
    """Longest prompt plus canvas, in tokens."""
    vocab_size: int = _LLADA_8B_VOCAB_SIZE
    """Tokens in the vocabulary."""
    embedding_size: int | None = None
    """Rows of the embedding and of the output matrix; default: `vocab_size`."""
    rope_theta: float = 500000.0
    """Base of the rotary embedding."""
    rms_norm_eps: float = 1e-5
    """Added to the mean square in every norm."""
    weight_tying: bool = False
    """Whether the output matrix is the embedding matrix."""
    mask_token_id: int = 126336
    """The token that stands for "not written yet"."""
    eos_token_id: int | None = 126081
    """End of text; also pads answers to the canvas."""
    pad_token_id: int | None = 126081
    """Padding."""
    eot_token_id: int | None = None
    """End of turn; default: 126348 for LLaDA-8B's vocabulary, else none."""
    init_std: float = 0.02
    """Standard deviation of newly made weights."""

    block_type: str = "llama"
    block_group_size: int = 1
    layer_norm_type: str = "rms"
    layer_norm_with_affine: bool = True
    bias_for_layer_norm: bool | None = False
    attention_layer_norm: bool = False
    input_emb_norm: bool = False
    activation_type: str = "silu"
    rope: bool = True
    alibi: bool = False
    include_bias: bool = False
    include_qkv_bias: bool | None = False
    scale_logits: bool = False
    clip_qkv: float | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # first: it sets what came under the usual names
        if self.n_kv_heads is None:
            self.n_kv_heads = 1 if self.multi_query_attention else self.n_heads
        if self.mlp_hidden_size is None:
            self.mlp_hidden_size = self.mlp_ratio * self.d_model
        if self.embedding_size is None:
            self.embedding_size = self.vocab_size
        if self.eot_token_id is None and self.vocab_size == _LLADA_8B_VOCAB_SIZE:
            self.eot_token_id = _LLADA_8B_EOT
        self.check_supported()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers calls it; "llada" is the `model_type` of LLaDA-MoE as well."""
        return route(cls, super().from_dict, config_dict, kwargs)

    def shape(self) -> DecoderShape:
        """The network's sizes."""
        assert self.n_kv_heads and self.mlp_hidden_size and self.embedding_size
        return DecoderShape(
            vocab_size=self.vocab_size,
            embedding_rows=self.embedding_size,
            width=self.d_model,
            layers=self.n_layers,
            heads=self.n_heads,
            kv_heads=self.n_kv_heads,
            head_size=self.d_model // self.n_heads,
            inner=self.mlp_hidden_size,
            eps=self.rms_norm_eps,
            rope_theta=self.rope_theta,
            tied=self.weight_tying,
        )

    def check_supported(self) -> None:
        """Raise ValueError if the network would not compute what this config describes."""
        refuse_variants(self, SUPPORTED_VARIANT, "LLaDA")
        for name, by in (("d_model", "n_heads"), ("n_heads", "n_kv_heads")):
            if getattr(self, name) % getattr(self, by):
                raise ValueError(
                    f"{name}: expected a multiple of {by} ({getattr(self, by)}), "
                    f"got {getattr(self, name)}; correct the checkpoint's config.json"
                )
        if self.embedding_size is None or self.embedding_size < self.vocab_size:
            raise ValueError(
                f"embedding_size: expected at least vocab_size ({self.vocab_size}), "
                f"got {self.embedding_size}; correct the checkpoint's config.json"
            )
        check_token_ids(self)
