"""A plain-torch LLaDA, dense and differentiated by autograd: what the packed network must equal.

Legend: `L` positions of one sequence, `D` width, `H` heads, `P` size of a head, `V` vocabulary.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from boe_vllm.models.llada import PREFIX, LLaDAConfig

Tensor = torch.Tensor


class Shifted(LLaDAConfig):
    """LLaDA's network, read as Dream's is."""

    shift = 1

    def shape(self):
        return dataclasses.replace(super().shape(), shift=1)


def small_config(*, shift: int = 0, **changes) -> LLaDAConfig:
    """A LLaDA with everything small and no two sizes equal; its predictions shifted, or not."""
    sizes = dict(
        d_model=24,
        n_heads=4,
        n_kv_heads=4,
        n_layers=3,
        mlp_hidden_size=40,
        vocab_size=29,
        embedding_size=32,
        mask_token_id=28,
        eos_token_id=27,
        pad_token_id=27,
        max_sequence_length=128,
        rope_theta=1000.0,
    )
    return (Shifted if shift else LLaDAConfig)(**(sizes | changes))


def random_weights(config: LLaDAConfig, *, seed: int = 0, dtype=torch.float32) -> dict[str, Tensor]:
    """Official tensor names with seeded values, sharp enough for uneven predictions."""
    torch.manual_seed(seed)
    width, inner = config.d_model, config.mlp_hidden_size
    kv = config.n_kv_heads * (width // config.n_heads)
    shapes = {"wte": (config.embedding_size, width), "ln_f": (width,)}
    if not config.weight_tying:
        shapes["ff_out"] = (config.embedding_size, width)
    for i in range(config.n_layers):
        shapes |= {
            f"blocks.{i}.attn_norm": (width,),
            f"blocks.{i}.q_proj": (width, width),
            f"blocks.{i}.k_proj": (kv, width),
            f"blocks.{i}.v_proj": (kv, width),
            f"blocks.{i}.attn_out": (width, width),
            f"blocks.{i}.ff_norm": (width,),
            f"blocks.{i}.ff_proj": (inner, width),
            f"blocks.{i}.up_proj": (inner, width),
            f"blocks.{i}.ff_out": (width, inner),
        }
    weights = {}
    for name, shape in shapes.items():
        x = torch.randn(shape, dtype=torch.float64)
        x = 1 + 0.2 * x if len(shape) == 1 else x * 1.6 * shape[1] ** -0.5
        weights[f"{PREFIX}{name}.weight"] = x.to(dtype)
    return weights


@dataclasses.dataclass
class Dense:
    """The oracle network: `logits`, with every layer's keys and values left in `kv`, its queries
    and attention outputs in `attention`."""

    config: LLaDAConfig
    weights: dict[str, Tensor]
    kv: list = dataclasses.field(default_factory=list)
    attention: list = dataclasses.field(default_factory=list)

    def w(self, name: str) -> Tensor:
        return self.weights[f"{PREFIX}{name}.weight"]

    def norm(self, x: Tensor, name: str) -> Tensor:
        rms = (x * x).mean(-1, keepdim=True) + self.config.rms_norm_eps
        return x / rms.sqrt() * self.w(name)

    def rotate(self, x_LHP: Tensor) -> Tensor:
        length, _, size = x_LHP.shape
        frequency = self.config.rope_theta ** (-torch.arange(0, size, 2, dtype=x_LHP.dtype) / size)
        angle = torch.arange(length, dtype=x_LHP.dtype)[:, None, None] * frequency
        a, b = x_LHP.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("ihp,jhp->hij", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("hij,jhp->ihp", scores.softmax(-1), v)

    def logits(self, x_LD: Tensor, open_L: Tensor | None = None, frozen=None) -> Tensor:
        """[L, V] logits of every position from embeddings; eq. 30 where `open_L` is False.

        `frozen`, if given, is (row, kv): the keys and values of all rows but `row` are those of kv.
        """
        length, width, heads = *x_LD.shape, self.config.n_heads
        self.kv, self.attention = [], []
        x = x_LD
        for i in range(self.config.n_layers):
            h = self.norm(x, f"blocks.{i}.attn_norm")
            q, k, v = (
                (h @ self.w(f"blocks.{i}.{n}_proj").T).view(length, -1, width // heads)
                for n in "qkv"
            )
            q, k = self.rotate(q), self.rotate(k)
            if frozen is not None:
                row, kv = frozen
                own = torch.arange(length)[:, None, None] == row
                k, v = torch.where(own, k, kv[i][0]), torch.where(own, v, kv[i][1])
            self.kv.append((k, v))
            o = self.attend(q, k, v)
            self.attention.append((q, o))
            y = o.reshape(length, width) @ self.w(f"blocks.{i}.attn_out").T
            if open_L is not None:
                y = torch.where(open_L[:, None], y, y.detach())
            x = x + y
            h = self.norm(x, f"blocks.{i}.ff_norm")
            gate, up = (h @ self.w(f"blocks.{i}.{n}_proj").T for n in ("ff", "up"))
            x = x + (F.silu(gate) * up) @ self.w(f"blocks.{i}.ff_out").T
        head = "wte" if self.config.weight_tying else "ff_out"
        logits = (self.norm(x, "ln_f") @ self.w(head).T)[:, : self.config.vocab_size]
        return torch.cat([logits[:1], logits[:-1]]) if self.shift else logits

    @property
    def shift(self) -> int:
        return self.config.shape().shift

    def rows_of(self, positions) -> list[int]:
        """The rows of some positions and those at which they are read."""
        return sorted({*positions, *self.read_at(positions)})

    def read_at(self, positions) -> list[int]:
        return [max(0, int(p) - self.shift) for p in positions]

    def embed(self, tokens_L: Tensor) -> Tensor:
        return self.w("wte")[tokens_L]

    def log_probs(self, logits: Tensor) -> Tensor:
        keep = torch.arange(logits.shape[-1]) != self.config.mask_token_id
        return logits.masked_fill(~keep, -1e30).log_softmax(-1)

    def entropies(self, logits: Tensor) -> Tensor:
        logp = self.log_probs(logits)
        return -(logp.exp() * logp).sum(-1)
