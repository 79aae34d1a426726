"""One block of the network: pre-norm attention and SwiGLU, each with its explicit backward.

Weights are frozen: a backward returns gradients of inputs only, and runs under inference mode.
Under tensor parallelism heads and MLP columns are split among the ranks; what comes out of a
row-split weight, and gradients that enter a column-split one, are summed over the ranks.

Legend: `N` any rows, `T` packed live rows, `A` packed saved rows, `S` packed rows of keys and
values, `D` width, `F` MLP width, `H`/`G` heads of queries/keys on this rank, `P` head size.
"""

from __future__ import annotations

import torch
from torch import nn

from boe_vllm.attention import attention_backward
from boe_vllm.models.functional import (
    Scratch,
    add_rms_norm_,
    join_rotated_back,
    rms_norm_backward,
    rotate,
    split_rotated,
    swiglu_,
    swiglu_backward,
)
from boe_vllm.models.layers import Layers
from boe_vllm.models.llada import LLaDAConfig
from boe_vllm.models.products import matmul_rows
from boe_vllm.models.rows import RowLayout
from boe_vllm.models.saved import SavedLayer

Tensor = torch.Tensor


class Block(nn.Module):
    """Pre-norm attention and SwiGLU, no biases."""

    attention_impl: str = "auto"
    """Whose kernels compute the attention; see `attention.api`."""

    def __init__(self, config: LLaDAConfig, layers: Layers) -> None:
        super().__init__()
        width, inner = config.d_model, config.mlp_hidden_size
        assert config.n_kv_heads is not None and inner is not None
        self.head_size = width // config.n_heads
        self.eps = config.rms_norm_eps
        self.scale = self.head_size**-0.5
        self.attn_norm = nn.Parameter(torch.ones(width), requires_grad=False)
        self.ff_norm = nn.Parameter(torch.ones(width), requires_grad=False)
        self.qkv_proj = layers.query_key_value(
            width, self.head_size, config.n_heads, config.n_kv_heads
        )
        self.attn_out = layers.output(width, width)
        self.gate_up_proj = layers.merged(width, [inner, inner])
        self.ff_out = layers.output(inner, width)
        self.heads, self.kv_heads = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads
        self.sum_over_ranks = layers.sum_over_ranks

    def project(
        self,
        normed_ND: Tensor,
        rotary: Tensor,
        scratch: Scratch | None = None,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [N, H, P], rotated keys and values [N, G, P], the latter two in `out` if
        it is given, of the residual stream's norm by `attn_norm`."""
        weight = self.qkv_proj.weight.t()
        if normed_ND.is_cuda:
            qkv = matmul_rows(normed_ND, weight, scratch)
            q, kv = split_rotated(qkv, rotary, self.heads, self.kv_heads)
            return q, kv[0], kv[1]
        # Values need no turning: a product of their own puts them where they are wanted.
        turned = (self.heads + self.kv_heads) * self.head_size
        keys, values = out or (None, None)
        qk = matmul_rows(normed_ND, weight[:, :turned], scratch).unflatten(1, (-1, self.head_size))
        flat = None if values is None else values.flatten(1)
        v = matmul_rows(normed_ND, weight[:, turned:], out=flat).unflatten(1, (-1, self.head_size))
        q, k = qk.split([self.heads, self.kv_heads], dim=1)
        return rotate(q, rotary), rotate(k, rotary, out=keys), v

    def attend(self, x_ND: Tensor, mixed_NHP: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream after attention, and its norm for the MLP, [N, D] each."""
        mixed = self.sum_over_ranks(matmul_rows(mixed_NHP.flatten(1), self.attn_out.weight.t()))
        return add_rms_norm_(mixed, x_ND, self.ff_norm, self.eps)

    def feed(
        self,
        x_ND: Tensor,
        normed_ND: Tensor,
        then_D: Tensor | None,
        saved_A: Tensor | None = None,
        scratch: Scratch | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The residual stream after the MLP, [N, D]; its norm by the next block's `then_D`, if that
        is given; and the MLP's pre-activations of the rows `saved_A`, [A, 2F], if they are."""
        gate_up = matmul_rows(normed_ND, self.gate_up_proj.weight.t(), scratch)
        saved = None if saved_A is None else gate_up[saved_A]
        fed = self.sum_over_ranks(matmul_rows(swiglu_(gate_up), self.ff_out.weight.t()))
        if then_D is None:
            return fed.add_(x_ND), None, saved
        return *add_rms_norm_(fed, x_ND, then_D, self.eps), saved

    def backward(
        self,
        dx_AD: Tensor,
        saved: SavedLayer,
        layout: RowLayout,
        rotary: Tensor,
        active_A11: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of the saved rows' input to the block [A, D], and of their attention outputs
        [A, H, P], keys and values [A, G, P].

        `active_A11` is 1 for the rows whose attention output passes a gradient (eq. 30), else 0;
        None for all of them.
        """
        dgate_up = swiglu_backward(matmul_rows(dx_AD, self.ff_out.weight), saved.gate_up_A2F)
        dnormed = self.sum_over_ranks(matmul_rows(dgate_up, self.gate_up_proj.weight))
        after = saved.after_attention_AD
        dx_AD = rms_norm_backward(dnormed, after, self.ff_norm, self.eps, dx_AD)
        dmixed = matmul_rows(dx_AD, self.attn_out.weight).view(len(dx_AD), -1, self.head_size)
        if active_A11 is not None:
            dmixed.mul_(active_A11)
        dq, dk, dv = attention_backward(
            dmixed,
            saved.queries_AHP,
            saved.keys_SGP,
            saved.values_SGP,
            layout=layout.attention,
            scale=self.scale,
            impl=self.attention_impl,
        )
        dqkv = join_rotated_back(dq, dk, dv, rotary)
        dnormed = self.sum_over_ranks(matmul_rows(dqkv, self.qkv_proj.weight))
        dx_AD = rms_norm_backward(dnormed, saved.before_AD, self.attn_norm, self.eps, dx_AD)
        return dx_AD, dmixed, dk, dv
