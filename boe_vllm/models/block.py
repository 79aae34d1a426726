"""One block of the network: pre-norm attention and a dense MLP, each with its explicit backward.

Weights are frozen: a backward returns gradients of inputs only, and runs under inference mode.
Under tensor parallelism heads and MLP columns are split among the ranks; what comes out of a
row-split weight, and gradients that enter a column-split one, are summed over the ranks.

Legend: `N` any rows, `T` packed live rows, `A` packed saved rows, `S` packed rows of keys and
values, `D` width, `H`/`G` heads of queries/keys on this rank, `X` both, `P` head size, `F` inner
width of the MLP on this rank.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from boe_vllm.attention import attention_backward
from boe_vllm.models import plain
from boe_vllm.models.experts import RoutedMlp
from boe_vllm.models.functional import (
    Scratch,
    join_rotated_back,
    norm_of,
    rms_norm,
    rms_norm_backward,
    rotate,
    split_rotated,
    swiglu_,
    swiglu_backward,
)
from boe_vllm.models.layers import Layers
from boe_vllm.models.products import matmul_rows
from boe_vllm.models.rows import RowLayout
from boe_vllm.models.saved import SavedLayer
from boe_vllm.models.shape import DecoderShape

Tensor = torch.Tensor


class Mlp(Protocol):
    """What a block asks of its MLP, whatever is in it."""

    def run(
        self, normed_ND: Tensor, saved_A: Tensor | None = None, scratch: Scratch | None = None
    ) -> tuple[Tensor, Any]:
        """What is added to the residual stream, [N, D], before the sum over the ranks; and what
        the backward needs of the rows `saved_A`, if they are given."""
        ...

    def backward(self, dy_AD: Tensor, saved: Any) -> Tensor:
        """Gradient of the normed rows, [A, D], before the sum over the ranks."""
        ...


class DenseMlp(nn.Module):
    """`down(silu(gate(x)) * up(x))`, no biases."""

    def __init__(self, width: int, inner: int, layers: Layers) -> None:
        super().__init__()
        self.gate_up_proj = layers.merged(width, [inner, inner])
        self.ff_out = layers.output(inner, width)

    def run(
        self, normed_ND: Tensor, saved_A: Tensor | None = None, scratch: Scratch | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """As `Mlp`; what is saved are the pre-activations, [A, 2F]."""
        gate_up = matmul_rows(normed_ND, self.gate_up_proj.weight.t(), scratch)
        saved = None if saved_A is None else gate_up.index_select(0, saved_A)
        return matmul_rows(swiglu_(gate_up), self.ff_out.weight.t()), saved

    def backward(self, dy_AD: Tensor, saved: Tensor) -> Tensor:
        """As `Mlp`."""
        dgate_up = swiglu_backward(matmul_rows(dy_AD, self.ff_out.weight), saved)
        return matmul_rows(dgate_up, self.gate_up_proj.weight)


class GeluMlp(nn.Module):
    """`down(gelu(up(x)))` with biases and the tanh form of GELU, on one rank."""

    def __init__(self, width: int, inner: int, layers: Layers) -> None:
        """Weights that are yet to be loaded.

        Raises:
            ValueError: for more than one tensor-parallel rank.
        """
        super().__init__()
        if layers.ranks > 1:
            raise ValueError(
                f"tensor_parallel_size: expected 1 for a network with a GELU MLP, got "
                f"{layers.ranks}; such networks are small: remove the setting"
            )
        self.up_proj = layers.merged(width, [inner])
        self.up_bias = nn.Parameter(torch.zeros(inner), requires_grad=False)
        self.ff_out = layers.output(inner, width)
        self.out_bias = nn.Parameter(torch.zeros(width), requires_grad=False)

    def run(
        self, normed_ND: Tensor, saved_A: Tensor | None = None, scratch: Scratch | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """As `Mlp`; what is saved are the pre-activations, [A, F]."""
        up = matmul_rows(normed_ND, self.up_proj.weight.t(), scratch).add_(self.up_bias)
        saved = None if saved_A is None else up.index_select(0, saved_A)
        active = plain.gelu(up)
        return matmul_rows(active, self.ff_out.weight.t()).add_(self.out_bias), saved

    def backward(self, dy_AD: Tensor, saved: Tensor) -> Tensor:
        """As `Mlp`."""
        dactive = matmul_rows(dy_AD, self.ff_out.weight)
        return matmul_rows(plain.gelu_backward(dactive, saved), self.up_proj.weight)


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    attention_impl: str = "auto"
    """Whose kernels compute the attention; see `attention.api`."""
    mlp: Mlp

    def __init__(self, shape: DecoderShape, layers: Layers) -> None:
        super().__init__()
        width = shape.width
        self.head_size = shape.head_size
        self.eps = shape.eps
        self.scale = self.head_size**-0.5
        self.norm = norm_of(shape)
        self.attn_norm = nn.Parameter(torch.ones(width), requires_grad=False)
        self.ff_norm = nn.Parameter(torch.ones(width), requires_grad=False)
        self.qkv_proj = layers.query_key_value(
            width, self.head_size, shape.heads, shape.kv_heads, bias=shape.qkv_bias
        )
        self.q_norm: nn.Parameter | None = None
        self.k_norm: nn.Parameter | None = None
        if shape.head_norm:
            self.q_norm = nn.Parameter(torch.ones(self.head_size), requires_grad=False)
            self.k_norm = nn.Parameter(torch.ones(self.head_size), requires_grad=False)
        self.attn_out = layers.output(shape.heads * self.head_size, width)
        if shape.modulated:
            self.mlp = GeluMlp(width, shape.inner, layers)
        elif shape.experts is None:
            self.mlp = DenseMlp(width, shape.inner, layers)
        else:
            self.mlp = RoutedMlp(shape.experts, width, layers)
        self.heads, self.kv_heads = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads
        self._ranks = layers

    def project(
        self,
        normed_ND: Tensor,
        rotary: Tensor,
        scratch: Scratch | None = None,
        out: tuple[Tensor, Tensor] | None = None,
        saved_A: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Rotated queries [N, H, P], rotated keys and values [N, G, P], the latter two in `out` if
        it is given, of the residual stream's norm by `attn_norm`; and, where heads are normed, the
        queries and keys of the rows `saved_A` before that, [A, X, P], if these are given."""
        weight, bias = self.qkv_proj.weight.t(), self.qkv_proj.bias
        turned = (self.heads + self.kv_heads) * self.head_size
        if normed_ND.is_cuda:
            qkv = matmul_rows(normed_ND, weight, scratch)
            qkv = qkv if bias is None else qkv.add_(bias)
            before = None
            if self.q_norm is not None:
                (q, k), before = self._norm_heads(qkv[:, :turned], saved_A)
                qkv = torch.cat([q.flatten(1), k.flatten(1), qkv[:, turned:]], dim=1)
            q, kv = split_rotated(qkv, rotary, self.heads, self.kv_heads)
            return q, kv[0], kv[1], before
        # Values need no turning: a product of their own puts them where they are wanted.
        keys, values = out or (None, None)
        qk = matmul_rows(normed_ND, weight[:, :turned], scratch)
        flat = None if values is None else values.flatten(1)
        v = matmul_rows(normed_ND, weight[:, turned:], out=flat)
        if bias is not None:
            qk.add_(bias[:turned])
            v.add_(bias[turned:])
        (q, k), before = self._norm_heads(qk, saved_A)
        v = v.unflatten(1, (-1, self.head_size))
        return rotate(q, rotary), rotate(k, rotary, out=keys), v, before

    def _norm_heads(
        self, qk_NE: Tensor, saved_A: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        """Queries [N, H, P] and keys [N, G, P], normed where heads are; and what they were in the
        rows `saved_A`, see `project`."""
        heads_NXP = qk_NE.unflatten(1, (-1, self.head_size))
        q, k = heads_NXP.split([self.heads, self.kv_heads], dim=1)
        if self.q_norm is None or self.k_norm is None:
            return (q, k), None
        flat_q, flat_k = (x.reshape(-1, self.head_size) for x in (q, k))
        normed_q = rms_norm(flat_q, self.q_norm, self.eps).view(q.shape)
        normed_k = rms_norm(flat_k, self.k_norm, self.eps).view(k.shape)
        before = None if saved_A is None else heads_NXP.index_select(0, saved_A)
        return (normed_q, normed_k), before

    def attend(self, x_ND: Tensor, mixed_NHP: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream after attention, and its norm for the MLP, [N, D] each."""
        mixed = self._summed(matmul_rows(mixed_NHP.flatten(1), self.attn_out.weight.t()))
        return self.norm.add_(mixed, x_ND, self.ff_norm)

    def feed(
        self,
        x_ND: Tensor,
        normed_ND: Tensor,
        then_D: Tensor | None,
        saved_A: Tensor | None = None,
        scratch: Scratch | None = None,
    ) -> tuple[Tensor, Tensor | None, Any]:
        """The residual stream after the MLP, [N, D]; its norm by the next block's `then_D`, if that
        is given; and what the MLP's backward needs of the rows `saved_A`, if they are."""
        fed, saved = self.mlp.run(normed_ND, saved_A, scratch)
        fed = self._summed(fed)
        if then_D is None:
            return fed.add_(x_ND), None, saved
        return *self.norm.add_(fed, x_ND, then_D), saved

    def _summed(self, x: Tensor) -> Tensor:
        """The sum over the ranks, where there are several."""
        return x if self._ranks.ranks == 1 else self._ranks.sum_over_ranks(x)

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
        dnormed = self._summed(self.mlp.backward(dx_AD, saved.mlp))
        after = saved.after_attention_AD
        dx_AD = self.norm.backward(dnormed, after, self.ff_norm, dx_AD)
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
        if saved.heads_AXP is not None:
            dqkv = self._norm_heads_back(dqkv, saved.heads_AXP)
        dnormed = self._summed(matmul_rows(dqkv, self.qkv_proj.weight))
        dx_AD = self.norm.backward(dnormed, saved.before_AD, self.attn_norm, dx_AD)
        return dx_AD, dmixed, dk, dv

    def _norm_heads_back(self, dqkv_AE: Tensor, before_AXP: Tensor) -> Tensor:
        """[A, E] gradient of the heads as they were, given that of the normed ones."""
        assert self.q_norm is not None and self.k_norm is not None
        split = [self.heads, self.kv_heads]
        turned = before_AXP.shape[1] * self.head_size
        gradients = dqkv_AE[:, :turned].unflatten(1, (-1, self.head_size)).split(split, dim=1)
        pieces = []
        for dy, x, weight in zip(
            gradients, before_AXP.split(split, dim=1), (self.q_norm, self.k_norm), strict=True
        ):
            flat_dy, flat_x = (part.reshape(-1, self.head_size) for part in (dy, x))
            dx = rms_norm_backward(flat_dy, flat_x, weight, self.eps)
            pieces.append(dx.view(len(x), -1))
        return torch.cat([*pieces, dqkv_AE[:, turned:]], dim=1)
