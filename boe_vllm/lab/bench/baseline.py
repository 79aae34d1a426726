"""LLaDA's public loop as people run it, written independently of our network and engine.

Requests are decoded in padded batches, in the order in which they come: every sequence as long as
the longest prompt (padded on the left, masked in the attention) and the longest generation, dense
attention, logits of all rows in float32, a fixed number of steps, everything decoded, then cut.
As `generate.py` of ML-GSAI/LLaDA with `remasking="low_confidence"`, batched as its `main` does.

Two things are as in our engine, so that tokens can be compared: the mask token is never proposed,
and confidences are compared on a grid of 2^-16 with ties to the lower position. The first costs one
column, the second a rounding of one number per row.

Legend: `B` sequences, `L` positions, `D` width, `H` heads, `P` size of a head, `V` vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F

from boe_vllm.models.llada import LLaDAConfig

Tensor = torch.Tensor
PREFIX = "model.transformer."
GRID = 2.0**-16
"""Scores this close count as equal."""


class PlainLLaDA:
    """LLaDA's network on padded batches, by its official tensor names; differentiable."""

    def __init__(
        self,
        config: LLaDAConfig,
        tensors: Mapping[str, Tensor],
        *,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
    ) -> None:
        """Take the weights, which are shared where dtype and device fit."""
        self.config, self.device = config, torch.device(device)
        self.weights = {
            name.removeprefix(PREFIX).removesuffix(".weight"): x.to(self.device, dtype)
            for name, x in tensors.items()
        }

    def embed(self, tokens_BL: Tensor) -> Tensor:
        """[B, L, D]."""
        return F.embedding(tokens_BL, self.weights["wte"])

    def hidden(self, x_BLD: Tensor, bias_B11L: Tensor | None = None) -> Tensor:
        """Normalised final states [B, L, D] of embeddings; `bias` is added to the scores."""
        batch, length, width = x_BLD.shape
        head_size = width // self.config.n_heads
        cos, sin = self._rotary(length, head_size, x_BLD.dtype)
        x = x_BLD
        for layer in range(self.config.n_layers):
            block = f"blocks.{layer}"
            normed = self._norm(x, f"{block}.attn_norm")
            q, k, v = (
                self._linear(normed, f"{block}.{name}_proj")
                .view(batch, length, -1, head_size)
                .transpose(1, 2)
                for name in "qkv"
            )
            mixed = F.scaled_dot_product_attention(
                _rotate(q, cos, sin),
                _rotate(k, cos, sin),
                v,
                attn_mask=bias_B11L,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            mixed = mixed.transpose(1, 2).reshape(batch, length, width)
            x = x + self._linear(mixed, f"{block}.attn_out")
            normed = self._norm(x, f"{block}.ff_norm")
            gate = F.silu(self._linear(normed, f"{block}.ff_proj"))
            up = self._linear(normed, f"{block}.up_proj")
            x = x + self._linear(gate * up, f"{block}.ff_out")
        return self._norm(x, "ln_f")

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., V] in float32, or float64 for float64 weights."""
        head = "wte" if self.config.weight_tying else "ff_out"
        logits = self._linear(hidden, head)[..., : self.config.vocab_size]
        return logits if logits.dtype == torch.float64 else logits.float()

    def __call__(self, tokens_BL: Tensor, attention_mask_BL: Tensor | None = None) -> Tensor:
        """Logits [B, L, V] of every row."""
        x = self.embed(tokens_BL)
        bias = None
        if attention_mask_BL is not None and not attention_mask_BL.all():
            closed = 1.0 - attention_mask_BL[:, None, None, :].to(x.dtype)
            bias = closed * torch.finfo(x.dtype).min
        return self.logits(self.hidden(x, bias))

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[name])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        exact = x if x.dtype == torch.float64 else x.float()
        scale = torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps)
        return self.weights[name] * (exact * scale).to(x.dtype)

    def _rotary(self, length: int, head_size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        steps = torch.arange(0, head_size, 2, device=self.device, dtype=exact) / head_size
        places = torch.arange(length, device=self.device, dtype=exact)
        angles = torch.outer(places, 1.0 / self.config.rope_theta**steps)
        angles = torch.cat([angles, angles], -1)
        return angles.cos(), angles.sin()


def _rotate(x_BHLP: Tensor, cos_LP: Tensor, sin_LP: Tensor) -> Tensor:
    exact = x_BHLP.to(cos_LP.dtype)
    first, second = exact.chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    return (exact * cos_LP + turned * sin_LP).to(x_BHLP.dtype)


@dataclasses.dataclass(slots=True)
class Decoded:
    """One request as the baseline decoded it."""

    tokens: list[int]
    """Cut to what was asked for, and after the first EOS if one ends a request."""
    canvas: list[int]
    """All that was generated."""
    step_of: list[int]
    """The step in which each position of the canvas was committed."""


@torch.no_grad()
def generate(
    network: PlainLLaDA,
    prompts: Sequence[Sequence[int]],
    *,
    gen_length: int,
    block_length: int,
    steps: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Decode one batch; returns the canvases and the step of each position's commit, [B, G].

    Args:
        network: predicts every row.
        prompts: token ids; padded on the left to the longest.
        gen_length: tokens to generate, a multiple of `block_length`.
        block_length: tokens of a block; blocks are decoded from left to right.
        steps: denoising steps for the whole generation, a multiple of the number of blocks.
        temperature: 0 takes the most likely token, otherwise Gumbel noise in float64.
        generator: of the noise.
    """
    config, device = network.config, network.device
    mask_id = config.mask_token_id
    start = max(map(len, prompts))
    shape = (len(prompts), start + gen_length)
    x = torch.full(shape, mask_id, device=device)
    attention_mask = torch.ones(shape, dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        x[row, start - len(prompt) : start] = torch.tensor(prompt, device=device)
        x[row, : start - len(prompt)] = config.pad_token_id or 0
        attention_mask[row, : start - len(prompt)] = 0
    step_of = torch.full(shape, -1, device=device)
    blocks = gen_length // block_length
    assert blocks * block_length == gen_length and steps % blocks == 0
    for block in range(blocks):
        end = start + (block + 1) * block_length
        for step, quota in enumerate(_quotas(block_length, steps // blocks)):
            open_BL = x == mask_id
            logits = network(x, attention_mask)
            logits[..., mask_id] = -torch.inf
            x0 = _with_gumbel_noise(logits, temperature, generator).argmax(-1)
            confidence = F.softmax(logits, dim=-1).gather(-1, x0[..., None])[..., 0]
            confidence[:, end:] = -torch.inf
            confidence = torch.where(open_BL, confidence, -torch.inf)
            on_grid = (confidence.double() / GRID).round()
            chosen = on_grid.argsort(dim=-1, descending=True, stable=True)[:, :quota]
            x.scatter_(1, chosen, x0.gather(1, chosen))
            step_of.scatter_(1, chosen, block * (steps // blocks) + step)
    return x[:, start:], step_of[:, start:]


def decode_all(
    network: PlainLLaDA,
    prompts: Sequence[Sequence[int]],
    gen_lens: Sequence[int],
    *,
    block_length: int,
    tokens_per_step: int,
    batch: int = 16,
    eos_token_id: int | None = None,
) -> list[Decoded]:
    """Decode all requests, batch after batch, at temperature 0.

    Args:
        network: predicts every row.
        prompts: token ids of every request.
        gen_lens: tokens that every request asks for.
        block_length: tokens of a block.
        tokens_per_step: tokens committed per step.
        batch: requests of a batch.
        eos_token_id: what ends a request; None if nothing does.
    """
    decoded = []
    for members, gen_length in batches(gen_lens, block_length, batch):
        steps = -(-block_length // tokens_per_step) * (gen_length // block_length)
        canvases, step_of = generate(
            network,
            [prompts[n] for n in members],
            gen_length=gen_length,
            block_length=block_length,
            steps=steps,
        )
        for n, canvas, when in zip(members, canvases.tolist(), step_of.tolist(), strict=True):
            tokens = canvas[: gen_lens[n]]
            if eos_token_id in tokens:
                tokens = tokens[: tokens.index(eos_token_id) + 1]
            decoded.append(Decoded(tokens=tokens, canvas=canvas, step_of=when))
    return decoded


def batches(gen_lens: Sequence[int], block_length: int, batch: int) -> Iterator[tuple[range, int]]:
    """Members of every batch and its generation length: the longest, in whole blocks."""
    for first in range(0, len(gen_lens), batch):
        members = range(first, min(first + batch, len(gen_lens)))
        longest = max(gen_lens[n] for n in members)
        yield members, -(-longest // block_length) * block_length


def _quotas(block_length: int, steps: int) -> list[int]:
    base, more = divmod(block_length, steps)
    return [base + (step < more) for step in range(steps)]


def _with_gumbel_noise(
    logits: Tensor, temperature: float, generator: torch.Generator | None
) -> Tensor:
    if temperature == 0:
        return logits
    noise = torch.empty_like(logits, dtype=torch.float64).uniform_(generator=generator)
    return logits.double().exp() / (-noise.log()) ** temperature
