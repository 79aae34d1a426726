"""The routed MLP of a block: a few of many experts for every row, with its explicit backward.

The published rule (inclusionAI/dInfer `modeling_fused_lladamoe.py`; transformers' Qwen3-MoE with
`norm_topk_prob` false): float32 softmax over all experts, the largest `k` of the probabilities (of
each with its constant, where the checkpoint has one), used as weights as they are. Each expert is a
SwiGLU. Products are `grouped`: all rows of an expert are multiplied together, and a row has the
same bits whatever rows are beside it. Under tensor parallelism a rank holds some columns of every
expert.

Legend: `N` any rows, `A` saved rows, `K` chosen experts of a row, `X` experts, `D` width, `F` inner
width of an expert on this rank, `M` the N x K choices in the order of their experts.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from boe_vllm.models.functional import Scratch, accurate, swiglu_, swiglu_backward
from boe_vllm.models.grouped import Groups, matmul_groups
from boe_vllm.models.layers import Layers, copy_exactly
from boe_vllm.models.products import matmul_rows
from boe_vllm.models.shape import ExpertsShape

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class SavedRouting:
    """What the backward needs of the saved rows."""

    probabilities_AX: Tensor
    """Of the router, without constants, in float32 or better."""
    chosen_AK: Tensor
    """Numbers of the experts."""
    weights_AK: Tensor
    """Of the experts, in the dtype of `probabilities_AX`."""
    gate_up_AK2F: Tensor
    """The experts' pre-activations."""


class Experts(nn.Module):
    """The weights of all experts of a layer, this rank's columns of each."""

    def __init__(self, shape: ExpertsShape, width: int, layers: Layers) -> None:
        """Uninitialised, in torch's default dtype and on its default device.

        Raises:
            ValueError: when the inner width does not divide among the ranks.
        """
        super().__init__()
        self.rank, self.ranks = layers.rank, layers.ranks
        if shape.inner % self.ranks:
            raise ValueError(
                f"tensor_parallel_size: expected a divisor of the experts' inner width "
                f"({shape.inner}), got {self.ranks}; choose another"
            )
        self.inner = shape.inner // self.ranks
        gate_up = torch.empty(shape.count, 2 * self.inner, width)
        down = torch.empty(shape.count, width, self.inner)
        self.gate_up = nn.Parameter(gate_up, requires_grad=False)
        self.down = nn.Parameter(down, requires_grad=False)

    def load(self, tensor: Tensor, part: str, expert: int) -> None:
        """Copy this rank's share of one expert's "gate", "up" or "down" to its place.

        Raises:
            ValueError: for another shape than that of its place.
        """
        width, whole = self.down.shape[1], self.inner * self.ranks
        expected = (width, whole) if part == "down" else (whole, width)
        if tensor.shape != expected:
            raise ValueError(f"expected shape {expected}, got {tuple(tensor.shape)}")
        columns = slice(self.rank * self.inner, (self.rank + 1) * self.inner)
        if part == "down":
            copy_exactly(self.down.data[expert], tensor[:, columns])
            return
        start = self.inner * ("gate", "up").index(part)
        place = self.gate_up.data[expert, start : start + self.inner]
        copy_exactly(place, tensor[columns])


class RoutedMlp(nn.Module):
    """A router and its experts."""

    def __init__(self, shape: ExpertsShape, width: int, layers: Layers) -> None:
        super().__init__()
        self.shape = shape
        self.router = nn.Parameter(torch.empty(shape.count, width), requires_grad=False)
        bias = torch.zeros(shape.count, dtype=torch.float32)
        self.expert_bias = nn.Parameter(bias, requires_grad=False) if shape.biased else None
        self.experts = Experts(shape, width, layers)

    def run(
        self, normed_ND: Tensor, saved_A: Tensor | None = None, scratch: Scratch | None = None
    ) -> tuple[Tensor, SavedRouting | None]:
        """As `mlp.Mlp`."""
        logits = matmul_rows(normed_ND, self.router.t())
        probabilities = accurate(logits).softmax(-1)
        scores = probabilities
        if self.expert_bias is not None:
            scores = probabilities + self.expert_bias
        weights_NK, chosen_NK = scores.topk(self.shape.chosen, dim=-1)
        rows, experts = len(normed_ND), self.experts
        groups = Groups.of(chosen_NK, self.shape.count)
        normed_MD = normed_ND[groups.order_M // self.shape.chosen]
        gate_up_M2F = matmul_groups(normed_MD, experts.gate_up.transpose(1, 2), groups)
        saved = None
        if saved_A is not None:
            kept = groups.put_back(gate_up_M2F).view(rows, self.shape.chosen, -1)[saved_A]
            routed = (probabilities[saved_A], chosen_NK[saved_A], weights_NK[saved_A])
            saved = SavedRouting(*routed, kept)
        mixed_MD = matmul_groups(swiglu_(gate_up_M2F), experts.down.transpose(1, 2), groups)
        # In the order of the weights, so that a row's sum does not depend on the other rows.
        mixed_NKD = groups.put_back(mixed_MD).view(rows, self.shape.chosen, -1)
        return _weighted_sum(mixed_NKD, weights_NK), saved

    def backward(self, dy_AD: Tensor, saved: SavedRouting) -> Tensor:
        """As `mlp.Mlp`: through the chosen experts, and through their weights and the softmax.

        On each of several ranks the weights' gradients are its own columns' share, and so is what
        comes of them, which is linear in them.
        """
        rows, chosen = saved.chosen_AK.shape
        experts, groups = self.experts, Groups.of(saved.chosen_AK, self.shape.count)
        order_M = groups.order_M
        before_M2F = saved.gate_up_AK2F.flatten(0, 1)[order_M]
        dactivated_MF = matmul_groups(dy_AD[order_M // chosen], experts.down, groups)
        dactivated_MF = accurate(dactivated_MF)
        # The weight's gradient is <dy, down(a)> = <down^T dy, a>.
        activated_MF = accurate(swiglu_(before_M2F.clone()))
        dweights_M1 = (dactivated_MF * activated_MF).sum(-1, keepdim=True)
        dweights = groups.put_back(dweights_M1).to(saved.weights_AK.dtype)
        dactivated_MF = dactivated_MF * saved.weights_AK.flatten()[order_M, None]
        dbefore_M2F = swiglu_backward(dactivated_MF.to(dy_AD.dtype), before_M2F)
        dnormed_MD = matmul_groups(dbefore_M2F, experts.gate_up, groups)
        dnormed = groups.put_back(dnormed_MD).view(rows, chosen, -1)
        total = dnormed[:, 0].clone()
        for k in range(1, chosen):
            total += dnormed[:, k]
        dp = torch.zeros_like(saved.probabilities_AX)
        dp.scatter_(1, saved.chosen_AK, dweights.view(rows, chosen))
        p = saved.probabilities_AX
        dlogits = p * (dp - (p * dp).sum(-1, keepdim=True))
        return total.add_(matmul_rows(dlogits.to(dy_AD.dtype), self.router))


def _weighted_sum(mixed_NKD: Tensor, weights_NK: Tensor) -> Tensor:
    """[N, D] in the experts' dtype, added up in the weights'."""
    total = accurate(mixed_NKD[:, 0]) * weights_NK[:, :1]
    for k in range(1, mixed_NKD.shape[1]):
        total.addcmul_(accurate(mixed_NKD[:, k]), weights_NK[:, k : k + 1])
    return total.to(mixed_NKD.dtype)
