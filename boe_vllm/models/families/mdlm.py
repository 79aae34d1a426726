"""MDLM (kuleshov-group/mdlm `models/dit.py`): a diffusion transformer whose layers are modulated.

Every block norms its input and then scales and shifts it, and scales what it adds to the residual
stream, by numbers that follow from the time. The published checkpoints are not conditioned on it:
they are always given time 0, so that these numbers are constants. They are folded into the weights
when a checkpoint is loaded, and what remains is a plain transformer: scales go into the norms'
weights, shifts through the products that follow into biases, and gates into the products before.

Legend: `D` width, `C` width of the condition.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from transformers import PretrainedConfig

from boe_vllm.models.families import check_token_ids, refuse_variants, route
from boe_vllm.models.names import Place, TensorNames
from boe_vllm.models.shape import DecoderShape

Tensor = torch.Tensor

PREFIX = "backbone."
TIME_WIDTH = 256
ROPE_THETA = 10000.0
_WHOLE = (
    "attn_norm",
    "attn_out.weight",
    "ff_norm",
    "mlp.up_bias",
    "mlp.ff_out.weight",
    "mlp.out_bias",
)
_FREQUENCIES = "rotary_emb.inv_freq"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MDLMNames(TensorNames):
    """The authors' names; the network gets the tensors under the names of its own parameters."""

    def expected(self, shape: DecoderShape) -> dict[str, Place]:
        """The names that `prepare` gives."""
        places: list[Place] = [(name, None) for name in ("wte.weight", "ln_f", "head.weight")]
        places.append(("head_bias", None))
        for n in range(shape.layers):
            block = f"blocks.{n}."
            places += [
                (f"{block}qkv_proj.{leaf}", part) for leaf in ("weight", "bias") for part in "qkv"
            ]
            places.append((f"{block}mlp.up_proj.weight", 0))
            places += [(block + name, None) for name in _WHOLE]
        return {_key(target, part): (target, part) for target, part in places}

    def prepare(
        self, tensors: Iterable[tuple[str, Tensor]], shape: DecoderShape
    ) -> Iterator[tuple[str, Tensor]]:
        """The tensors with the modulation folded in; with or without the prefix of the published
        checkpoint.

        Raises:
            ValueError: for a missing or an unexpected tensor, or one of the wrong shape, by name.
        """
        given = {name.removeprefix(PREFIX): tensor for name, tensor in tensors}
        _check(given, shape)
        return folded(given, shape.layers)


class MDLMConfig(PretrainedConfig):
    """An MDLM checkpoint's `config.json`, with the fields and defaults of its authors.

    Raises:
        ValueError: for a network that is conditioned on the time, or sizes that do not divide.
    """

    model_type: ClassVar[str] = "mdlm"
    architecture: ClassVar[str] = "MDLM"
    names: ClassVar[TensorNames] = MDLMNames(
        family="MDLM", embedding="", final_norm="", head="", block="", within={}
    )
    published_ids: ClassVar[Mapping[int, Mapping[str, int]]] = {
        50258: {"mask_token_id": 50257, "eos_token_id": 50256}
    }
    """GPT-2's end of text, and the mask after GPT-2's tokens."""
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "hidden_dim",
        "num_hidden_layers": "n_blocks",
        "num_attention_heads": "n_heads",
        "max_position_embeddings": "model_length",
    }

    vocab_size: int = 50258
    """Tokens in the vocabulary."""
    model_length: int = 1024
    """Longest prompt plus canvas, in tokens."""
    hidden_dim: int = 768
    """Width of the residual stream."""
    cond_dim: int = 128
    """Width of the condition that the modulation is computed from."""
    n_blocks: int = 12
    """Number of blocks."""
    n_heads: int = 12
    """Heads."""
    dropout: float = 0.1
    """Of training; not used."""
    time_conditioning: bool = False
    """Whether the network is told the time."""
    mask_token_id: int | None = None
    """The token that stands for "not written yet"."""
    eos_token_id: int | None = None
    """End of text."""
    pad_token_id: int | None = None
    """Padding."""
    eot_token_id: int | None = None
    """End of turn: there are no chats."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.check_supported()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers calls it."""
        return route(cls, super().from_dict, config_dict, kwargs)

    def shape(self) -> DecoderShape:
        """The network's sizes and switches."""
        return DecoderShape(
            vocab_size=self.vocab_size,
            embedding_rows=self.vocab_size,
            width=self.hidden_dim,
            layers=self.n_blocks,
            heads=self.n_heads,
            kv_heads=self.n_heads,
            head_size=self.hidden_dim // self.n_heads,
            inner=4 * self.hidden_dim,
            eps=1e-5,
            rope_theta=ROPE_THETA,
            qkv_bias=True,
            modulated=True,
        )

    def check_supported(self) -> None:
        """Raise ValueError if the network would not compute what this config describes."""
        refuse_variants(self, {"time_conditioning": False}, "MDLM")
        if self.hidden_dim % (2 * self.n_heads):
            raise ValueError(
                f"hidden_dim: expected a multiple of twice n_heads ({self.n_heads}), got "
                f"{self.hidden_dim}; correct the checkpoint's config.json"
            )
        check_token_ids(self)


# ---- folding -----------------------------------------------------------------------------------


def folded(given: Mapping[str, Tensor], layers: int) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the plain transformer, in float32 (float64 for float64).

    Args:
        given: the authors' tensors, complete and of the right shapes.
        layers: number of blocks.
    """
    yield "wte.weight", given["vocab_embed.embedding"]
    c_C = condition(given)
    for n in range(layers):
        prefix = f"blocks.{n}."
        own = {
            k.removeprefix(prefix): _accurate(v) for k, v in given.items() if k.startswith(prefix)
        }
        for name, tensor in _folded_block(own, c_C).items():
            yield prefix + name, tensor
    last = {
        k.removeprefix("output_layer."): _accurate(v)
        for k, v in given.items()
        if k.startswith("output_layer.")
    }
    shift, scale = _modulation(last, c_C).chunk(2)
    yield "ln_f", last["norm_final.weight"] * (1 + scale)
    yield "head.weight", last["linear.weight"]
    yield "head_bias", last["linear.weight"] @ shift + last["linear.bias"]


def condition(given: Mapping[str, Tensor]) -> Tensor:
    """[C] what the modulation of every block is computed from, at time 0: `silu(sigma_map(0))`."""
    first, second = (
        [_accurate(given[f"sigma_map.mlp.{k}.{leaf}"]) for leaf in ("weight", "bias")]
        for k in (0, 2)
    )
    half = first[0].new_zeros(TIME_WIDTH // 2)
    sinusoid = torch.cat([half.cos(), half.sin()])
    return F.silu(F.linear(F.silu(F.linear(sinusoid, *first)), *second))


def _folded_block(own: Mapping[str, Tensor], c_C: Tensor) -> dict[str, Tensor]:
    shift1, scale1, gate1, shift2, scale2, gate2 = _modulation(own, c_C).chunk(6)
    qkv, up, down = own["attn_qkv.weight"], own["mlp.0.weight"], own["mlp.2.weight"]
    found = {
        "attn_norm": own["norm1.weight"] * (1 + scale1),
        "attn_out.weight": gate1[:, None] * own["attn_out.weight"],
        "ff_norm": own["norm2.weight"] * (1 + scale2),
        _key("mlp.up_proj.weight", 0): up,
        "mlp.up_bias": up @ shift2 + own["mlp.0.bias"],
        "mlp.ff_out.weight": gate2[:, None] * down,
        "mlp.out_bias": gate2 * own["mlp.2.bias"],
    }
    for part, weight, bias in zip("qkv", qkv.chunk(3), (qkv @ shift1).chunk(3), strict=True):
        found[_key("qkv_proj.weight", part)] = weight
        found[_key("qkv_proj.bias", part)] = bias
    return found


def _modulation(own: Mapping[str, Tensor], c_C: Tensor) -> Tensor:
    weight, bias = (own[f"adaLN_modulation.{leaf}"] for leaf in ("weight", "bias"))
    return F.linear(c_C.to(weight.dtype), weight, bias)


def _key(target: str, part: Any) -> str:
    return target if part is None else f"{target}:{part}"


def _accurate(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# ---- what a checkpoint must have ---------------------------------------------------------------


def _check(given: Mapping[str, Tensor], shape: DecoderShape) -> None:
    """Raise ValueError unless the tensors are those of an MDLM of these sizes."""
    width = shape.width
    cond = len(given.get("sigma_map.mlp.2.bias", ()))
    expected = dict(_shapes(shape, cond))
    for name, tensor in given.items():
        if name == _FREQUENCIES:
            _check_frequencies(tensor, shape.head_size)
        elif name not in expected:
            raise ValueError(
                f"checkpoint: unexpected tensor {name!r} of shape {tuple(tensor.shape)}; expected "
                f"MDLM's names for {shape.layers} blocks of width {width}; check config.json "
                f"against the checkpoint"
            )
        elif tuple(tensor.shape) != expected[name]:
            raise ValueError(
                f"checkpoint: tensor {name!r} of shape {tuple(tensor.shape)} does not fit the "
                f"sizes in config.json (expected {expected[name]}); check config.json"
            )
    missing = sorted(set(expected) - set(given))
    if missing:
        raise ValueError(
            f"checkpoint: missing {len(missing)} tensor(s): {', '.join(missing[:8])}; expected "
            f"MDLM's official names; download the checkpoint again or check config.json"
        )


def _shapes(shape: DecoderShape, cond: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, inner, tokens = shape.width, shape.inner, shape.vocab_size
    yield "vocab_embed.embedding", (tokens, width)
    for k, columns in ((0, TIME_WIDTH), (2, cond)):
        yield from _linear(f"sigma_map.mlp.{k}", cond, columns)
    for n in range(shape.layers):
        block = f"blocks.{n}."
        yield f"{block}norm1.weight", (width,)
        yield f"{block}norm2.weight", (width,)
        yield f"{block}attn_qkv.weight", (3 * width, width)
        yield f"{block}attn_out.weight", (width, width)
        yield from _linear(f"{block}mlp.0", inner, width)
        yield from _linear(f"{block}mlp.2", width, inner)
        yield from _linear(f"{block}adaLN_modulation", 6 * width, cond)
    yield "output_layer.norm_final.weight", (width,)
    yield from _linear("output_layer.linear", tokens, width)
    yield from _linear("output_layer.adaLN_modulation", 2 * width, cond)


def _linear(name: str, rows: int, columns: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (rows, columns)
    yield f"{name}.bias", (rows,)


def _check_frequencies(stored: Tensor, head_size: int) -> None:
    """A checkpoint may hold its rotary frequencies, which the network computes itself."""
    own = ROPE_THETA ** (-torch.arange(0, head_size, 2) / head_size)
    if stored.shape != own.shape or not torch.allclose(stored.float(), own, rtol=1e-2):
        raise ValueError(
            f"checkpoint: tensor {_FREQUENCIES!r}: expected the frequencies of base "
            f"{ROPE_THETA:g} for heads of {head_size}, got others; this variant of MDLM is not "
            f"supported"
        )
