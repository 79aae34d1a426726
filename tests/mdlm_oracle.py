"""MDLM's network transcribed from kuleshov-group/mdlm `models/dit.py` into plain torch: dense, with
its modulation computed in every call, and differentiated by autograd.

Left out are dropout, the packed attention of flash_attn (an ordinary softmax here, over the full
head, rotated in halves) and autocast. Everything is computed in the dtype of the weights.

Legend: `L` positions of one sequence, `D` width, `V` vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
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


@dataclasses.dataclass
class DenseMDLM:
    """The network: logits of one sequence from its embeddings."""

    config: MDLMConfig
    weights: dict[str, Tensor]

    def w(self, name: str) -> Tensor:
        return self.weights[f"backbone.{name}"]

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.w(f"{name}.weight"), self.weights.get(f"backbone.{name}.bias"))

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, [x.shape[-1]]) * self.w(f"{name}.weight")[None, :]

    def embed(self, tokens_L: Tensor) -> Tensor:
        return self.w("vocab_embed.embedding")[torch.as_tensor(tokens_L)]

    def logits(self, x_LD: Tensor, open_L: Tensor | None = None) -> Tensor:
        """[L, V]; where `open_L` is False, a row's attention output passes no gradient (eq. 30)."""
        sigma = torch.zeros(1, dtype=x_LD.dtype)
        mapped = self.linear("sigma_map.mlp.0", timestep_embedding(sigma))
        c = F.silu(self.linear("sigma_map.mlp.2", F.silu(mapped)))
        x = x_LD
        for n in range(self.config.n_blocks):
            x = self.block(f"blocks.{n}", x, c, open_L)
        shift, scale = self.linear("output_layer.adaLN_modulation", c).chunk(2, dim=1)
        x = modulate(self.norm("output_layer.norm_final", x), shift, scale)
        return self.linear("output_layer.linear", x)

    def block(self, name: str, x: Tensor, c: Tensor, open_L: Tensor | None) -> Tensor:
        length, width = x.shape
        (shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp) = self.linear(
            f"{name}.adaLN_modulation", c
        ).chunk(6, dim=1)
        x_skip = x
        x = modulate(self.norm(f"{name}.norm1", x), shift_msa, scale_msa)
        # rearrange(qkv, 'b s (three h d) -> b s three h d')
        qkv = self.linear(f"{name}.attn_qkv", x).view(length, 3, self.config.n_heads, -1)
        q, k, v = (part.transpose(0, 1) for part in qkv.unbind(1))
        y = F.softmax(self.rotary(q) @ self.rotary(k).mT / q.shape[-1] ** 0.5, dim=-1) @ v
        y = self.linear(f"{name}.attn_out", y.transpose(0, 1).reshape(length, width))
        if open_L is not None:
            y = torch.where(open_L[:, None], y, y.detach())
        x = x_skip + gate_msa * y
        y = modulate(self.norm(f"{name}.norm2", x), shift_mlp, scale_mlp)
        y = F.gelu(self.linear(f"{name}.mlp.0", y), approximate="tanh")
        return x + gate_mlp * self.linear(f"{name}.mlp.2", y)

    def rotary(self, x_HLP: Tensor) -> Tensor:
        _, length, dim = x_HLP.shape
        inv_freq = 1.0 / (10_000 ** (torch.arange(0, dim, 2, dtype=x_HLP.dtype) / dim))
        freqs = torch.einsum("i,j->ij", torch.arange(length, dtype=x_HLP.dtype), inv_freq)
        emb = torch.cat((freqs, freqs), dim=-1)
        return x_HLP * emb.cos() + rotate_half(x_HLP) * emb.sin()

    def log_probs(self, x_LD: Tensor) -> Tensor:
        """[L, V] as SUBS has them for masked positions (`diffusion.py`)."""
        logits = self.logits(x_LD).clone()
        logits[:, MASK if self.config.vocab_size == VOCAB else self.config.mask_token_id] += -1e6
        return logits - torch.logsumexp(logits, dim=-1, keepdim=True)
