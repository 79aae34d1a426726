"""MDLM's network transcribed from kuleshov-group/mdlm `models/dit.py` into plain torch: dense, with
its modulation computed in every call, and differentiated by autograd.

Left out are dropout, the packed attention of flash_attn (an ordinary softmax here, over the full
head, rotated in halves) and autocast. Everything is computed in the dtype of the weights.

Legend: `L` positions of one sequence, `D` width, `V` vocabulary.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from oracle import Dense
from safetensors.torch import save_file

from boe_vllm.models.families.mdlm import MDLMConfig

Tensor = torch.Tensor

VOCAB, EOS, MASK = 29, 27, 28


def mdlm_config(**changes) -> MDLMConfig:
    """An MDLM with everything small and no two sizes equal."""
    sizes = dict(
        vocab_size=VOCAB,
        model_length=128,
        hidden_dim=24,
        cond_dim=10,
        n_blocks=3,
        n_heads=4,
        mask_token_id=MASK,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    return MDLMConfig(**(sizes | changes), architectures=["MDLM"])


def mdlm_weights(config: MDLMConfig, *, seed: int = 0, dtype=torch.float32) -> dict[str, Tensor]:
    """The authors' names with seeded values; the modulation is large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    width, cond = config.hidden_dim, config.cond_dim
    shapes = {"vocab_embed.embedding": (config.vocab_size, width)}

    def linear(name, rows, columns):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (rows, columns), (rows,)

    linear("sigma_map.mlp.0", cond, 256)
    linear("sigma_map.mlp.2", cond, cond)
    for n in range(config.n_blocks):
        block = f"blocks.{n}."
        shapes |= {f"{block}norm1.weight": (width,), f"{block}norm2.weight": (width,)}
        shapes[f"{block}attn_qkv.weight"] = (3 * width, width)
        shapes[f"{block}attn_out.weight"] = (width, width)
        linear(f"{block}mlp.0", 4 * width, width)
        linear(f"{block}mlp.2", width, 4 * width)
        linear(f"{block}adaLN_modulation", 6 * width, cond)
    shapes["output_layer.norm_final.weight"] = (width,)
    linear("output_layer.linear", config.vocab_size, width)
    linear("output_layer.adaLN_modulation", 2 * width, cond)
    weights = {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        if "norm" in name:
            x = 1 + 0.2 * x
        elif len(shape) == 1:
            x = 0.5 * x
        else:
            x = x * 1.6 * shape[1] ** -0.5
        weights[f"backbone.{name}"] = x.to(dtype)
    return weights


def save_mdlm(folder: Path, config: MDLMConfig, weights: dict[str, Tensor]) -> Path:
    """A folder as a hub would have it."""
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    return folder


def rotate_half(x: Tensor) -> Tensor:
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def timestep_embedding(t: Tensor, dim: int = 256, max_period: int = 10000) -> Tensor:
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(0, half, dtype=t.dtype) / half)
    args = t[:, None] * freqs[None]
    return torch.cat([torch.cos(args), torch.sin(args)], dim=-1)


class DenseMDLM(Dense):
    """The network: logits of one sequence from its embeddings; the rest is as `oracle.Dense`."""

    def w(self, name: str) -> Tensor:
        return self.weights["backbone." + {"wte": "vocab_embed.embedding"}.get(name, name)]

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.w(f"{name}.weight"), self.weights.get(f"backbone.{name}.bias"))

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, [x.shape[-1]]) * self.w(f"{name}.weight")[None, :]

    def embed(self, tokens_L: Tensor) -> Tensor:
        own = tokens_L if isinstance(tokens_L, Tensor) else np.array(tokens_L)
        return super().embed(torch.as_tensor(own))

    def logits(self, x_LD: Tensor, open_L: Tensor | None = None, frozen=None) -> Tensor:
        sigma = torch.zeros(1, dtype=x_LD.dtype)
        mapped = self.linear("sigma_map.mlp.0", timestep_embedding(sigma))
        c = F.silu(self.linear("sigma_map.mlp.2", F.silu(mapped)))
        self.kv, self.attention = [], []
        x = x_LD
        for n in range(self.config.n_blocks):
            x = self.block(n, x, c, open_L, frozen)
        shift, scale = self.linear("output_layer.adaLN_modulation", c).chunk(2, dim=1)
        x = modulate(self.norm(x, "output_layer.norm_final"), shift, scale)
        return self.linear("output_layer.linear", x)

    def block(self, n: int, x: Tensor, c: Tensor, open_L: Tensor | None, frozen) -> Tensor:
        name, (length, width) = f"blocks.{n}", x.shape
        (shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp) = self.linear(
            f"{name}.adaLN_modulation", c
        ).chunk(6, dim=1)
        x_skip = x
        x = modulate(self.norm(x, f"{name}.norm1"), shift_msa, scale_msa)
        # rearrange(qkv, 'b s (three h d) -> b s three h d')
        qkv = self.linear(f"{name}.attn_qkv", x).view(length, 3, self.config.n_heads, -1)
        q, k, v = qkv.unbind(1)
        q, k = self.rotary(q), self.rotary(k)
        if frozen is not None:
            row, kv = frozen
            own = torch.arange(length)[:, None, None] == row
            k, v = torch.where(own, k, kv[n][0]), torch.where(own, v, kv[n][1])
        self.kv.append((k, v))
        o = self.attend(q, k, v)
        self.attention.append((q, o))
        y = self.linear(f"{name}.attn_out", o.reshape(length, width))
        if open_L is not None:
            y = torch.where(open_L[:, None], y, y.detach())
        x = x_skip + gate_msa * y
        y = modulate(self.norm(x, f"{name}.norm2"), shift_mlp, scale_mlp)
        y = F.gelu(self.linear(f"{name}.mlp.0", y), approximate="tanh")
        return x + gate_mlp * self.linear(f"{name}.mlp.2", y)

    def rotary(self, x_LHP: Tensor) -> Tensor:
        length, _, dim = x_LHP.shape
        inv_freq = 1.0 / (10_000 ** (torch.arange(0, dim, 2, dtype=x_LHP.dtype) / dim))
        freqs = torch.einsum("i,j->ij", torch.arange(length, dtype=x_LHP.dtype), inv_freq)
        emb = torch.cat((freqs, freqs), dim=-1)[:, None, :]
        return x_LHP * emb.cos() + rotate_half(x_LHP) * emb.sin()


def make_mdlm(*, dtype=torch.float32, seed: int = 0, **changes) -> DenseMDLM:
    """A small random checkpoint, and the oracle that has it."""
    config = mdlm_config(**changes)
    return DenseMDLM(config, mdlm_weights(config, seed=seed, dtype=dtype))
