"""MDLM's network (kuleshov-group/mdlm `models/dit.py`) in plain torch, for `train_stories.py`.

The names of the parameters are MDLM's own. There is no time conditioning, as in its published
checkpoint: the modulation is that of time 0, a constant.

Shapes: B sequences, L positions, D width, H heads, C width of the condition, V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention, silu

TIME_WIDTH = 256


class Norm(nn.Module):
    """LayerNorm with a weight and no bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x_BLD: Tensor, shift_D: Tensor, scale_D: Tensor) -> Tensor:
        x_BLD = layer_norm(x_BLD, self.weight.shape, self.weight)
        return torch.addcmul(shift_D, x_BLD, 1 + scale_D)


class Block(nn.Module):
    """Bidirectional attention with rotary positions, then a GELU MLP, both modulated."""

    def __init__(self, width: int, heads: int, cond: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = Norm(width)
        self.attn_qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.norm2 = Norm(width)
        self.mlp = nn.ModuleList([nn.Linear(width, 4 * width), nn.Identity()])
        self.mlp.append(nn.Linear(4 * width, width))
        self.adaLN_modulation = nn.Linear(cond, 6 * width)

    def forward(self, x_BLD: Tensor, c_C: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = x_BLD.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c_C).chunk(6)
        qkv = self.attn_qkv(self.norm1(x_BLD, shift1, scale1))
        q, k, v = qkv.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v)
        y = self.attn_out(y.transpose(1, 2).reshape(batch, length, width))
        x_BLD = torch.addcmul(x_BLD, gate1, y)
        y = gelu(self.mlp[0](self.norm2(x_BLD, shift2, scale2)), approximate="tanh")
        return torch.addcmul(x_BLD, gate2, self.mlp[2](y))


def rotate(x_BHLd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout; `cos`, `sin` are `[L, d/2]`."""
    a, b = x_BHLd.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Head(nn.Module):
    """The final norm, modulated, and the logits."""

    def __init__(self, width: int, cond: int, vocab_size: int) -> None:
        super().__init__()
        self.norm_final = Norm(width)
        self.linear = nn.Linear(width, vocab_size)
        self.adaLN_modulation = nn.Linear(cond, 2 * width)

    def forward(self, x_BLD: Tensor, c_C: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c_C).chunk(2)
        return self.linear(self.norm_final(x_BLD, shift, scale))


class TinyMDLM(nn.Module):
    """MDLM; `state_dict()` has the official names less the leading `backbone.`."""

    def __init__(
        self,
        *,
        vocab_size: int,
        hidden_dim: int,
        n_blocks: int,
        n_heads: int,
        cond_dim: int,
        **rest: object,
    ) -> None:
        super().__init__()
        width = hidden_dim
        self.vocab_embed = nn.ParameterDict({"embedding": torch.empty(vocab_size, width)})
        time = [nn.Linear(TIME_WIDTH, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim)]
        self.sigma_map = nn.ModuleDict({"mlp": nn.Sequential(*time)})
        self.blocks = nn.ModuleList(Block(width, n_heads, cond_dim) for _ in range(n_blocks))
        self.output_layer = Head(width, cond_dim, vocab_size)
        head = width // n_heads
        self.frequencies = 10000.0 ** (-torch.arange(0, head, 2) / head)
        for name, p in self.named_parameters():
            if p.ndim == 2 and not name.startswith("sigma_map"):
                nn.init.normal_(p, std=width**-0.5)
            # As in MDLM: every block starts as the identity, and all words are equally likely.
            if "adaLN_modulation" in name or "output_layer.linear" in name:
                nn.init.zeros_(p)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Logits `[B, L, V]`, float32."""
        angles = torch.arange(tokens_BL.shape[1])[:, None] * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        half = torch.zeros(TIME_WIDTH // 2)  # the sinusoid of time 0, cosines first
        c_C = silu(self.sigma_map["mlp"](torch.cat((half.cos(), half.sin()))))
        x_BLD = self.vocab_embed["embedding"][tokens_BL]
        for block in self.blocks:
            x_BLD = block(x_BLD, c_C, cos, sin)
        return self.output_layer(x_BLD, c_C)
