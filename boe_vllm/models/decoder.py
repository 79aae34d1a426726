"""LLaDA's network on packed rows, with a backward that only the kept rows pass through.

Attention is bidirectional, so a pass works on a `RowLayout`: any rows of any sequences. Kept rows
leave behind what the backward needs; the other rows leave only their keys and values. The backward
is explicit: no autograd graph, no weight gradients, and it runs under inference mode.

Built from vLLM's parallel layers. Under tensor parallelism heads and MLP columns are split;
gradients that enter column-parallel layers are all-reduced.

Legend: `T` packed live rows, `K` packed kept rows, `R` logit rows, `S` rows of keys and values,
`D` width, `H`/`G` heads of queries/keys on this rank, `P` size of a head, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
)
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from boe_vllm.attention import attention_backward, attention_forward
from boe_vllm.models import weights
from boe_vllm.models.functional import (
    Scratch,
    rms_norm,
    rms_norm_backward,
    rotary_tables,
    rotate,
    swiglu_,
    swiglu_backward,
)
from boe_vllm.models.llada import LLaDAConfig
from boe_vllm.models.parallel import FrozenEmbeddingMethod, FrozenLinearMethod, sum_over_ranks
from boe_vllm.models.products import matmul_rows
from boe_vllm.models.rows import RowLayout
from boe_vllm.models.saved import KeyValueContext, SavedLayer, SavedPass, key_value_memory

Tensor = torch.Tensor


class LLaDABlock(nn.Module):
    """Pre-norm attention and SwiGLU, no biases."""

    def __init__(self, config: LLaDAConfig, prefix: str) -> None:
        super().__init__()
        width = config.d_model
        self.head_size = width // config.n_heads
        self.eps = config.rms_norm_eps
        self.scale = self.head_size**-0.5
        self.attn_norm = nn.Parameter(torch.ones(width), requires_grad=False)
        self.ff_norm = nn.Parameter(torch.ones(width), requires_grad=False)
        self.qkv_proj = QKVParallelLinear(
            width,
            self.head_size,
            config.n_heads,
            config.n_kv_heads,
            bias=False,
            prefix=f"{prefix}.qkv_proj",
        )
        self.attn_out = RowParallelLinear(width, width, bias=False, prefix=f"{prefix}.attn_out")
        self.gate_up_proj = MergedColumnParallelLinear(
            width, [config.mlp_hidden_size] * 2, bias=False, prefix=f"{prefix}.gate_up_proj"
        )
        self.ff_out = RowParallelLinear(
            config.mlp_hidden_size, width, bias=False, prefix=f"{prefix}.ff_out"
        )
        for layer in (self.qkv_proj, self.attn_out, self.gate_up_proj, self.ff_out):
            layer.quant_method = FrozenLinearMethod()
        self.heads, self.kv_heads = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads

    def project(
        self,
        x_ND: Tensor,
        rotary: Tensor,
        scratch: Scratch | None = None,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [N, H, P], rotated keys and values [N, G, P], the latter two in `out` if
        it is given."""
        normed = rms_norm(x_ND, self.attn_norm, self.eps)
        turned = (self.heads + self.kv_heads) * self.head_size
        weight = self.qkv_proj.weight.t()
        keys, values = out or (None, None)
        qk = matmul_rows(normed, weight[:, :turned], scratch).view(len(x_ND), -1, self.head_size)
        flat = None if values is None else values.flatten(1)
        v = matmul_rows(normed, weight[:, turned:], out=flat).view(len(x_ND), -1, self.head_size)
        q, k = qk.split([self.heads, self.kv_heads], dim=1)
        return rotate(q, rotary), rotate(k, rotary, out=keys), v

    def attend(self, x_ND: Tensor, mixed_NHP: Tensor) -> Tensor:
        """The residual stream after attention, [N, D]."""
        return self.attn_out(mixed_NHP.reshape(len(x_ND), -1))[0].add_(x_ND)

    def feed(
        self, x_ND: Tensor, kept_A: Tensor | None = None, scratch: Scratch | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream after the MLP, [N, D], and the MLP's pre-activations of the kept
        rows, [K, 2F], if there are any."""
        normed = rms_norm(x_ND, self.ff_norm, self.eps)
        gate_up = matmul_rows(normed, self.gate_up_proj.weight.t(), scratch)
        kept = None if kept_A is None else gate_up[kept_A]
        return self.ff_out(swiglu_(gate_up))[0].add_(x_ND), kept

    def backward(
        self,
        dx_AD: Tensor,
        saved: SavedLayer,
        layout: RowLayout,
        rotary: Tensor,
        active_A11: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of the block's input [K, D], and of the kept rows' attention outputs
        [K, H, P], keys and values [K, G, P].

        `active_A11` is 1 for the rows whose attention output passes a gradient (eq. 30), else 0.
        """
        dgate_up = swiglu_backward(matmul_rows(dx_AD, self.ff_out.weight), saved.gate_up_A2F)
        dnormed = sum_over_ranks(matmul_rows(dgate_up, self.gate_up_proj.weight))
        dx = rms_norm_backward(dnormed, saved.after_attention_AD, self.ff_norm, self.eps)
        dx_AD = dx.add_(dx_AD)
        dmixed = matmul_rows(dx_AD, self.attn_out.weight).view(len(dx_AD), -1, self.head_size)
        dmixed.mul_(active_A11)
        dq, dk, dv = attention_backward(
            dmixed,
            saved.queries_AHP,
            saved.keys_SGP,
            saved.values_SGP,
            layout=layout.attention,
            scale=self.scale,
        )
        dqk = rotate(torch.cat([dq, dk], dim=1), rotary, back=True)
        dqkv = torch.cat([dqk, dv], dim=1).flatten(1)
        dnormed = sum_over_ranks(matmul_rows(dqkv, self.qkv_proj.weight))
        dx = rms_norm_backward(dnormed, saved.before_AD, self.attn_norm, self.eps)
        return dx.add_(dx_AD), dmixed, dk, dv


class LLaDAForDiffusion(nn.Module):
    """LLaDA-8B-Base, -8B-Instruct and LLaDA-1.5 share this network."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: LLaDAConfig = vllm_config.model_config.hf_config
        self.config = config
        self.vocab_size = config.vocab_size
        self.wte = VocabParallelEmbedding(config.embedding_size, config.d_model, prefix="wte")
        self.blocks = nn.ModuleList(
            LLaDABlock(config, prefix=f"blocks.{i}") for i in range(config.n_layers)
        )
        self.ln_f = nn.Parameter(torch.ones(config.d_model), requires_grad=False)
        self.head = ParallelLMHead(config.embedding_size, config.d_model, prefix="head")
        if config.weight_tying:
            self.head = self.head.tie_weights(self.wte)
        self.scratch = Scratch()
        for layer in (self.wte, self.head):
            layer.quant_method = FrozenEmbeddingMethod()

    @property
    def layers(self) -> list[LLaDABlock]:
        """The blocks, first to last."""
        return cast(list[LLaDABlock], list(self.blocks))

    # ---- the pass ------------------------------------------------------------------------------

    def embed(self, tokens_N: Tensor) -> Tensor:
        """Token embeddings, [N, D]."""
        return self.wte(tokens_N)

    def run(
        self,
        x_TD: Tensor,
        layout: RowLayout,
        context: KeyValueContext | None = None,
        memory: Scratch | None = None,
    ) -> tuple[Tensor, SavedPass | None]:
        """Final normalised hidden states of the logit rows, [R, D], and the saved if rows are kept.

        Args:
            x_TD: embeddings of the live rows.
            layout: where the rows lie.
            context: where frozen keys and values come from, if the layout has any.
            memory: for the keys and values of a saved, which are gone with the next pass given it.
        """
        context = context or KeyValueContext()
        block = self.layers[0]
        rotary = rotary_tables(
            layout.positions, block.head_size, self.config.rope_theta, x_TD.dtype
        )
        keep = any(layout.saved_lens)
        kept = layout.saved_index
        saved = SavedPass(layout, rotary[:, kept], []) if keep else None
        places: list[tuple[Tensor, Tensor] | None] = [None] * len(self.blocks)
        if keep and memory and x_TD.device.type == "cpu":
            places = [*key_value_memory(x_TD, memory, **self.cache_shape())]
        for index, block in enumerate(self.layers):
            q, k, v = block.project(x_TD, rotary, self.scratch, places[index])
            k, v = context.merge(index, k, v)
            mixed = attention_forward(q, k, v, layout=layout.attention, scale=block.scale)
            after = block.attend(x_TD, mixed)
            out, gate_up = block.feed(after, kept if keep else None, self.scratch)
            if saved is not None:
                assert gate_up is not None
                saved.layers.append(SavedLayer(x_TD[kept], after[kept], q[kept], gate_up, k, v))
            x_TD = out
        if saved is not None:
            saved.final_AD = x_TD[kept]
        hidden = rms_norm(x_TD[layout.logit_index], self.ln_f, self.config.rms_norm_eps)
        return hidden, saved

    def backward(
        self,
        dhidden_AD: Tensor,
        saved: SavedPass,
        active_A11: Tensor,
        observe: Callable[[int, Tensor, Tensor, Tensor], None] | None = None,
    ) -> Tensor:
        """Gradient of the kept rows' embeddings, [K, D], given that of their final hidden states.

        Args:
            dhidden_AD: gradient of the normalised final states; zero for rows without an objective.
            saved: of the pass.
            active_A11: 1 for rows whose attention passes a gradient, else 0 (eq. 30).
            observe: called with (layer, dO, dK, dV) for every layer, last one first: gradients of
                the kept rows' attention outputs [K, H, P] (zero where they pass none), and of their
                keys and values [K, G, P].
        """
        assert saved.final_AD is not None
        dx = rms_norm_backward(dhidden_AD, saved.final_AD, self.ln_f, self.config.rms_norm_eps)
        for index in reversed(range(len(self.blocks))):
            dx, dmixed, dk, dv = self.layers[index].backward(
                dx, saved.layers[index], saved.layout, saved.rotary_2A1p, active_A11
            )
            if observe is not None:
                observe(index, dmixed, dk, dv)
        return dx

    def cache_shape(self) -> dict[str, int]:
        """Layers, key heads on this rank and head size, for a pool of keys and values."""
        block = self.layers[0]
        return dict(layers=len(self.blocks), heads=block.kv_heads, head_size=block.head_size)

    # ---- vocabulary ----------------------------------------------------------------------------

    def logits(self, hidden_RD: Tensor, scratch: Scratch | None = None) -> Tensor:
        """Logits [R, V] of normalised hidden states, on every rank; in `scratch` if it is given."""
        local = matmul_rows(hidden_RD, self.head.weight.t(), scratch)
        if get_tensor_model_parallel_world_size() > 1:
            local = tensor_model_parallel_all_gather(local)
        return local[:, : self.vocab_size]

    def logits_backward(self, dlogits_RV: Tensor) -> Tensor:
        """Gradient of `logits` with respect to the hidden states, [R, D]."""
        return sum_over_ranks(matmul_rows(self._shard(dlogits_RV, self.head), self.head.weight))

    def soft_embed(self, probabilities_RV: Tensor) -> Tensor:
        """Expected embedding `E^T pi` (eq. 10), [R, D]."""
        return sum_over_ranks(matmul_rows(self._shard(probabilities_RV, self.wte), self.wte.weight))

    def _shard(self, x_RV: Tensor, layer: VocabParallelEmbedding) -> Tensor:
        """The columns of this rank, padded to the rows of the layer's weight."""
        rows = layer.weight.shape[0]
        start = layer.shard_indices.org_vocab_start_index
        piece = x_RV[:, start : start + rows].to(layer.weight.dtype)
        missing = rows - piece.shape[1]
        return torch.nn.functional.pad(piece, (0, missing)) if missing else piece

    # ---- what vLLM calls -----------------------------------------------------------------------

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """vLLM's name for `embed`."""
        return self.embed(input_ids)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Not used: the diffusion runner calls `run` with a `RowLayout`."""
        raise NotImplementedError(
            "LLaDAForDiffusion runs through boe_vllm's diffusion runner; expected worker_cls "
            "boe_vllm.vllm_plugin.*_worker, got vLLM's own; check that the plugin's config hook ran"
        )

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """vLLM's name for `logits`."""
        return self.logits(hidden_states)

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load official LLaDA tensors.

        Raises:
            ValueError: naming every missing or unexpected tensor.
        """
        return weights.load(self, tensors)
