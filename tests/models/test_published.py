"""The families' published configurations: how they are read, and starts at the real widths with two
layers of random weights in bfloat16."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, PretrainedConfig
from vllm import LLM, SamplingParams

from boe_vllm.models.build import read_config
from boe_vllm.models.families import FAMILIES, config_class
from boe_vllm.models.shape import DecoderShape, ExpertsShape, RopeStretch
from boe_vllm.vllm_plugin import plugin

FOLDER = Path(__file__).parents[1] / "published"
CHEAP = ("a2d_qwen3_0.6b", "llada_moe_7b_a1b")
"""Those whose start at the real widths is part of every run."""
MASKS = {
    "illada_8b": 5,
    "dream_7b": 151666,
    "a2d_qwen3_0.6b": 151669,
    "a2d_qwen2_0.5b": 151665,
    "a2d_llama_1b": 128256 - 1,
    "llada_moe_7b_a1b": 156895,
    "mdlm_owt": 50257,
}
"""The models' masks; those of Tiny-A2D are their tokenizers', which are not here."""


def shape(**fields):
    return DecoderShape(**fields)


SHAPES = {
    "illada_8b": shape(
        vocab_size=155136, embedding_rows=155136, width=4096, layers=32, heads=32, kv_heads=8,
        head_size=128, inner=14336, eps=1e-5, rope_theta=5e5, tied=True,
    ),
    "dream_7b": shape(
        vocab_size=152064, embedding_rows=152064, width=3584, layers=28, heads=28, kv_heads=4,
        head_size=128, inner=18944, eps=1e-6, rope_theta=1e6, qkv_bias=True, shift=1,
    ),
    "a2d_qwen3_0.6b": shape(
        vocab_size=151936, embedding_rows=151936, width=1024, layers=28, heads=16, kv_heads=8,
        head_size=128, inner=3072, eps=1e-6, rope_theta=1e6, head_norm=True, tied=True,
    ),
    "a2d_qwen2_0.5b": shape(
        vocab_size=151936, embedding_rows=151936, width=896, layers=24, heads=14, kv_heads=2,
        head_size=64, inner=4864, eps=1e-6, rope_theta=1e6, qkv_bias=True, tied=True,
    ),
    "a2d_llama_1b": shape(
        vocab_size=128256, embedding_rows=128256, width=2048, layers=16, heads=32, kv_heads=8,
        head_size=64, inner=8192, eps=1e-5, rope_theta=5e5,
        rope_stretch=RopeStretch(factor=32.0, low=1.0, high=4.0, context=8192.0), tied=True,
    ),
    "llada_moe_7b_a1b": shape(
        vocab_size=157184, embedding_rows=157184, width=2048, layers=16, heads=16, kv_heads=16,
        head_size=128, inner=11008, eps=1e-5, rope_theta=5e4, head_norm=True,
        experts=ExpertsShape(count=64, chosen=8, inner=1024),
    ),
    "mdlm_owt": shape(
        vocab_size=50258, embedding_rows=50258, width=768, layers=12, heads=12, kv_heads=12,
        head_size=64, inner=3072, eps=1e-5, rope_theta=1e4, qkv_bias=True, modulated=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_a_published_config_is_read_by_its_architecture(name):
    plugin.register()
    folder = str(FOLDER / name)
    config = AutoConfig.from_pretrained(folder)
    named = PretrainedConfig.get_config_dict(folder)[0]["architectures"][0]
    assert type(config) is config_class(named) is type(read_config(folder))
    assert config.shape() == SHAPES[name]


def test_every_family_has_its_published_config_here():
    there = {PretrainedConfig.get_config_dict(str(f))[0]["architectures"][0] for f in folders()}
    assert there | {"LLaDAModelLM"} == set(FAMILIES)


def folders():
    return sorted(FOLDER.iterdir())


def answer_of(name):
    llm = LLM(
        str(FOLDER / name),
        sampler="boe",
        sampler_config={"rho": 1.0},
        additional_config={"mask_token_id": MASKS[name]},
        load_format="dummy",
        dtype="bfloat16",
        hf_overrides={"num_hidden_layers": 2},
        skip_tokenizer_init=True,
        max_model_len=256,
        max_num_seqs=2,
    )
    config = llm.llm_engine.vllm_config.model_config
    assert config.dtype == torch.bfloat16
    assert config.hf_config.shape().width == SHAPES[name].width
    assert config.hf_config.mask_token_id == MASKS[name]
    settings = SamplingParams(temperature=0.0, max_tokens=3, detokenize=False, ignore_eos=True)
    (output,) = llm.generate([{"prompt_token_ids": [100, 2000, 30000]}], settings, use_tqdm=False)
    tokens = output.outputs[0].token_ids
    assert len(tokens) == 3
    assert all(0 <= t < SHAPES[name].vocab_size and t != MASKS[name] for t in tokens)
    cost = output.kv_transfer_params["boe"]
    assert (cost["denoising_steps"], cost["backwards"]) == (3, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in CHEAP else pytest.mark.costly) for name in SHAPES],
)
def test_a_short_request_is_steered_at_the_real_widths(name):
    answer_of(name)
