"""Small random checkpoints of every Llama-shaped family, made by transformers' own classes, which
are then the oracle: nobody here wrote them. The mask of their attention is made all-visible.

Legend: `L` positions of one sequence, `V` vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from boe_vllm.models.build import empty_model
from boe_vllm.models.families import config_class

Tensor = torch.Tensor

MODELING = ("modeling_llama", "modeling_qwen2", "modeling_qwen3", "modeling_qwen3_moe")
VOCAB, MASK, EOS = 29, 28, 27
SIZES: dict[str, Any] = dict(
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=6,
    intermediate_size=40,
    vocab_size=VOCAB,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    pad_token_id=EOS,
)
MOE = dict(num_experts=6, num_experts_per_tok=2)
QWEN_MOE = dict(MOE, moe_intermediate_size=16, norm_topk_prob=False)
LLADA_MOE = dict(MOE, expert_intermediate_size=16)

# Family -> architecture, transformers' config and class, what only that config has.
FAMILIES: dict[str, tuple[str, Any, Any, dict[str, Any], dict[str, Any]]] = {
    "illada": ("ILLaDAForCausalLM", LlamaConfig, LlamaForCausalLM, {}, {}),
    "dream": ("DreamModel", Qwen2Config, Qwen2ForCausalLM, {}, {}),
    "a2d-qwen3": ("A2DQwen3LMHeadModel", Qwen3Config, Qwen3ForCausalLM, {}, {}),
    "a2d-qwen2": ("A2DQwen2LMHeadModel", Qwen2Config, Qwen2ForCausalLM, {}, {}),
    "a2d-llama": ("A2DLlamaLMHeadModel", LlamaConfig, LlamaForCausalLM, {}, {}),
    "llada-moe": ("LLaDAMoEModelLM", Qwen3MoeConfig, Qwen3MoeForCausalLM, QWEN_MOE, LLADA_MOE),
}


@dataclasses.dataclass
class Checkpoint:
    """One family's config and weights, and the oracle that has them too."""

    config: Any
    weights: dict[str, Tensor]
    oracle: Any

    @property
    def shift(self) -> int:
        return self.config.shape().shift

    def save(self, folder: Path) -> Path:
        """A folder as a hub would have it."""
        save_file(
            {name: x.contiguous().clone() for name, x in self.weights.items()},
            folder / "model.safetensors",
        )
        fields = {k: v for k, v in self.config.to_dict().items() if k != "rope_parameters"}
        rope = dict(self.config.rope_parameters)
        fields["rope_theta"] = rope.pop("rope_theta")
        fields["rope_scaling"] = None if rope["rope_type"] == "default" else rope
        (folder / "config.json").write_text(json.dumps(fields, default=str))
        return folder

    def logits(self, x_LD: Tensor) -> Tensor:
        """[L, V] of embeddings, position by position: Dream's shift is the authors' own line."""
        return shifted(self.own_rows(x_LD), self.shift)

    def own_rows(self, x_LD: Tensor) -> Tensor:
        """[L, V] of embeddings, row by row; every row sees all."""
        length = len(x_LD)
        visible = torch.zeros(1, 1, length, length, dtype=x_LD.dtype)
        with computing_in(x_LD.dtype):
            out = self.oracle(inputs_embeds=x_LD[None], attention_mask=visible, use_cache=False)
        return out.logits[0]

    def embed(self, tokens: Any) -> Tensor:
        return self.oracle.get_input_embeddings()(torch.as_tensor(np.array(tokens)))


class _Double:
    """torch, for a module that says float32 where it means "accurately"."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextlib.contextmanager
def computing_in(dtype: torch.dtype) -> Iterator[None]:
    """Transformers' classes compute norms and angles in float32; for float64, in float64 here."""
    if dtype != torch.float64:
        yield
        return
    names = [name for name in sys.modules if name.startswith("transformers.models.")]
    found = [sys.modules[n] for n in names if n.endswith(MODELING)]
    single = torch.Tensor.float
    for module in found:
        module.torch = _Double()
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        torch.Tensor.float = single
        for module in found:
            module.torch = torch


def shifted(logits_LV: Tensor, shift: int) -> Tensor:
    """`cat([logits[:, :1], logits[:, :-1]], 1)` (Fast-dLLM `dream/model/generation_utils.py`)."""
    return torch.cat([logits_LV[:1], logits_LV[:-1]]) if shift else logits_LV


def make(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any):
    """A checkpoint of a family, with every parameter of the oracle drawn anew."""
    architecture, config_of, class_of, only_theirs, only_ours = FAMILIES[family]
    rope = {"rope_theta": 1000.0, "rope_type": "default"} | changes.pop("rope", {})
    sizes = SIZES | changes
    theirs = config_of(**(only_theirs | sizes), rope_parameters=dict(rope), eos_token_id=EOS)
    theirs._attn_implementation = theirs._experts_implementation = "eager"
    with computing_in(dtype):
        oracle = class_of(theirs).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in oracle.parameters():
        x = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        x = 1 + 0.2 * x if parameter.ndim == 1 else x * 1.6 * parameter.shape[-1] ** -0.5
        parameter.data.copy_(x)
        parameter.requires_grad_(False)
    ours = config_class(architecture)
    fields = only_ours | sizes | {"mask_token_id": MASK, "eos_token_id": EOS}
    config = ours(**fields, architectures=[architecture], rope_parameters=dict(rope))
    return Checkpoint(config, published(oracle.state_dict(), sizes), oracle)


def published(state: dict[str, Tensor], sizes: dict[str, Any]) -> dict[str, Tensor]:
    """The family's names: transformers stacks the experts, which checkpoints have one by one."""
    weights: dict[str, Tensor] = {}
    for name, x in state.items():
        if name == "lm_head.weight" and sizes["tie_word_embeddings"]:
            continue
        if name.endswith("experts.gate_up_proj"):
            for e, both in enumerate(x):
                for part, half in zip(("gate", "up"), both.chunk(2), strict=True):
                    weights[name.replace("gate_up_proj", f"{e}.{part}_proj.weight")] = half
        elif name.endswith("experts.down_proj"):
            for e, own in enumerate(x):
                weights[name.replace("down_proj", f"{e}.down_proj.weight")] = own
        else:
            weights[name] = x
    return weights


def network(made: Checkpoint) -> Any:
    """Ours, with the checkpoint's weights, in their dtype."""
    model = empty_model(made.config, dtype=made.embed([0]).dtype)
    model.load_weights(made.weights.items())
    return model


def plain_loop(made, tokens, *, start, block, quota):
    """LLaDA's `generate` by confidence, temperature 0: masks of each block, the surest first."""
    tokens = np.array(tokens)
    for begin in range(start, len(tokens), block):
        last = begin + block
        while (masks := np.flatnonzero(tokens[:last] == MASK)).size:
            logits = made.logits(made.embed(tokens))[masks]
            logits[:, MASK] = -torch.inf
            best, token = logits.softmax(-1).max(-1)
            for n in best.argsort(descending=True, stable=True)[:quota]:
                tokens[masks[n]] = token[n]
    return tokens.tolist()
