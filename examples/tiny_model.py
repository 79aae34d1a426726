"""LLaDA's network in plain torch, and the optimiser for it, for `train_tiny.py`.

Shapes: B sequences, L positions, D width, H heads, V vocabulary.
"""

from collections import defaultdict

import torch
from tiny_files import VOCAB_SIZE
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention, silu


class Block(nn.Module):
    """Pre-norm bidirectional attention with rotary positions, then SwiGLU."""

    def __init__(self, d_model: int, n_heads: int, mlp_hidden_size: int, eps: float) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.attn_norm = nn.RMSNorm(d_model, eps)
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.k_proj = nn.Linear(d_model, d_model, bias=False)
        self.v_proj = nn.Linear(d_model, d_model, bias=False)
        self.attn_out = nn.Linear(d_model, d_model, bias=False)
        self.ff_norm = nn.RMSNorm(d_model, eps)
        self.ff_proj = nn.Linear(d_model, mlp_hidden_size, bias=False)
        self.up_proj = nn.Linear(d_model, mlp_hidden_size, bias=False)
        self.ff_out = nn.Linear(mlp_hidden_size, d_model, bias=False)

    def forward(self, x_BLD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = x_BLD.shape
        # One product instead of three: small matrices waste a CPU.
        weight = torch.cat((self.q_proj.weight, self.k_proj.weight, self.v_proj.weight))
        qkv = linear(self.attn_norm(x_BLD), weight).view(batch, length, 3, self.n_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        x_BLD = x_BLD + self.attn_out(y.transpose(1, 2).reshape(batch, length, width))
        weight = torch.cat((self.ff_proj.weight, self.up_proj.weight))
        gate, up = linear(self.ff_norm(x_BLD), weight).chunk(2, dim=-1)
        return x_BLD + self.ff_out(silu(gate) * up)


def rotate(x_BHLd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout; `cos`, `sin` are `[L, d/2]`."""
    a, b = x_BHLd.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class TinyLLaDA(nn.Module):
    """LLaDA; `state_dict()` has the official names less the leading `model.`."""

    def __init__(
        self,
        *,
        d_model: int,
        n_layers: int,
        n_heads: int,
        mlp_hidden_size: int,
        rope_theta: float = 10000.0,
        rms_norm_eps: float = 1e-5,
        **rest: object,
    ) -> None:
        super().__init__()
        self.config = {
            "d_model": d_model,
            "n_layers": n_layers,
            "n_heads": n_heads,
            "mlp_hidden_size": mlp_hidden_size,
            "rope_theta": rope_theta,
            "rms_norm_eps": rms_norm_eps,
        }
        blocks = [Block(d_model, n_heads, mlp_hidden_size, rms_norm_eps) for _ in range(n_layers)]
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCAB_SIZE, d_model),
                "blocks": nn.ModuleList(blocks),
                "ln_f": nn.RMSNorm(d_model, rms_norm_eps),
                "ff_out": nn.Linear(d_model, VOCAB_SIZE, bias=False),
            }
        )
        head = d_model // n_heads
        self.frequencies = rope_theta ** (-torch.arange(0, head, 2) / head)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02 if "transformer.ff_out" in name else d_model**-0.5)
            if name.endswith(("attn_out.weight", "ff_out.weight")) and ".blocks." in name:
                nn.init.zeros_(p)  # every block starts as the identity

    def forward(self, tokens_BL: Tensor, *, canvas: int) -> Tensor:
        """Logits `[B, canvas, V]` of the last `canvas` positions, float32."""
        angles = torch.arange(tokens_BL.shape[1])[:, None] * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        x_BLD = self.transformer["wte"](tokens_BL)
        for block in self.transformer["blocks"]:
            x_BLD = block(x_BLD, cos, sin)
        return self.transformer["ff_out"](self.transformer["ln_f"](x_BLD[:, -canvas:]))


class Muon(torch.optim.Optimizer):
    """Muon for equally important 2-D weights, all matrices of one shape in one batched product.

    `torch.optim.Muon` orthogonalises one matrix at a time in bfloat16, which many CPUs emulate.
    """

    def __init__(self, params, *, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                by_shape[tuple(sorted(p.shape))].append(p)
            for params in by_shape.values():
                updates = []
                for p in params:
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    update = p.grad.lerp(buffer, group["momentum"])
                    updates.append(update.T if p.shape[0] > p.shape[1] else update)
                for p, update in zip(params, orthogonalise(torch.stack(updates)), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    # Scaled to the size of an AdamW update, so that both share one rate.
                    scale = 0.2 * max(p.shape) ** 0.5
                    update = update.T if p.shape[0] > p.shape[1] else update
                    p.add_(update, alpha=-group["lr"] * scale)


def orthogonalise(x_NMK: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices, roughly, by five Newton-Schulz iterations."""
    x_NMK = x_NMK / (x_NMK.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x_NMK @ x_NMK.mT
        x_NMK = 3.4445 * x_NMK + torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315) @ x_NMK
    return x_NMK
