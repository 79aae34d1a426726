"""What a checkpoint of a family may say, what is refused, and where special ids come from."""

import json
from types import SimpleNamespace

import pytest
import torch
from families import EOS, FAMILIES, MASK, SIZES, make, network
from tokenizers import pre_tokenizers
from transformers import AutoConfig

from boe_vllm import Denoiser
from boe_vllm.models import special
from boe_vllm.models.build import empty_model, load_model, read_config
from boe_vllm.models.families import config_class, config_classes
from boe_vllm.models.families.dream import DreamConfig
from boe_vllm.models.families.illada import ILLaDAConfig
from boe_vllm.models.families.llada_moe import LLaDAMoEConfig
from boe_vllm.models.llada import LLaDAConfig

# ---- architectures -------------------------------------------------------------------------------


def write(folder, **fields):
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize("model_type", ["llada", "llada_moe"])
def test_one_model_type_is_two_networks(tmp_path, model_type):
    AutoConfig.register("llada", LLaDAConfig, exist_ok=True)
    AutoConfig.register("llada_moe", LLaDAMoEConfig, exist_ok=True)
    sizes = {k: v for k, v in SIZES.items() if k not in ("intermediate_size", "head_dim")}
    write(tmp_path, architectures=["LLaDAMoEModelLM"], model_type=model_type, **sizes)
    for config in (AutoConfig.from_pretrained(tmp_path), read_config(tmp_path)):
        assert type(config) is LLaDAMoEConfig
        assert config.shape().experts.count == 64


def test_an_architecture_that_is_not_served_is_refused_by_name(tmp_path):
    AutoConfig.register("Dream", DreamConfig, exist_ok=True)
    write(tmp_path, architectures=["DreamVLModel"], model_type="Dream")
    for read in (AutoConfig.from_pretrained, read_config):
        with pytest.raises(ValueError, match="architectures: expected one of LLaDAModelLM, .*got "):
            read(str(tmp_path))


def test_a_model_that_no_field_names_is_refused(tmp_path):
    write(tmp_path, model_type="bert")
    with pytest.raises(ValueError, match="architectures: .* got 'none, of model_type bert'"):
        read_config(tmp_path)


@pytest.mark.parametrize("config", list(config_classes()), ids=lambda c: c.architecture)
def test_a_config_survives_saving(config, tmp_path):
    before = config(architectures=[config.architecture])
    before.save_pretrained(tmp_path)
    after = read_config(tmp_path)
    assert type(after) is config and after.shape() == before.shape()


# ---- variants ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family, fields, message",
    [
        ("illada", {"attention_bias": True}, "attention_bias: expected False, got True"),
        ("illada", {"mlp_bias": True}, "mlp_bias: expected False, got True"),
        ("illada", {"layer_norm_eps": 1e-5}, "layer_norm_eps: expected None, got 1e-05"),
        ("illada", {"hidden_act": "gelu"}, "hidden_act: expected 'silu', got 'gelu'"),
        ("illada", {"num_key_value_heads": 3}, r"multiple of num_key_value_heads \(3\), got 4"),
        ("illada", {"mask_token_id": 99}, r"mask_token_id: expected .* below vocab_size \(29\)"),
        ("dream", {"use_mrope": True}, "use_mrope: expected False, got True"),
        ("dream", {"use_sliding_window": True}, "use_sliding_window: expected False, got True"),
        (
            "a2d-llama",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 32.0}},
            "rope_parameters: expected rope_theta alone, or .*'linear'.* are not supported",
        ),
        (
            "a2d-qwen3",
            {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            r"layer_types: expected 'full_attention' .*got \['sliding_attention'\]",
        ),
        ("llada-moe", {"qk_layernorm": False}, "qk_layernorm: expected True, got False"),
        ("llada-moe", {"norm_topk_prob": True}, "norm_topk_prob: expected False, got True"),
        ("llada-moe", {"router_num_group": 4}, "router_num_group: expected None, got 4"),
        ("llada-moe", {"routed_scaling_factor": 2.5}, "routed_scaling_factor: expected 1.0, got"),
        (
            "llada-moe",
            {"shared_expert_intermediate_size": 64},
            "shared_expert_intermediate_size: expected None, got 64",
        ),
        ("llada-moe", {"moe_layer_freq": [0, 1, 1]}, r"moe_layer_freq: expected 1 .* got \[0, 1"),
    ],
)
def test_an_unsupported_variant_is_refused(family, fields, message):
    with pytest.raises(ValueError, match=message):
        config_class(FAMILIES[family][0])(**(SIZES | fields))


def test_what_a_field_says_of_biases_that_are_there_anyway_does_not_matter():
    for said in (False, True):
        assert DreamConfig(**SIZES, attention_bias=said).shape().qkv_bias


def test_of_several_ends_of_text_the_first_is_the_models():
    assert config_class("A2DLlamaLMHeadModel")(**SIZES, eos_token_id=[7, 8, 9]).eos_token_id == 7


# ---- weights -------------------------------------------------------------------------------------


def test_a_tied_checkpoint_may_store_its_output_matrix_again(tmp_path):
    made = make("illada", tie_word_embeddings=True)
    embedding = made.weights["model.embed_tokens.weight"]
    made.weights["lm_head.weight"] = embedding.clone()
    model = load_model(made.save(tmp_path))
    assert model.head.weight is model.wte.weight
    made.weights["lm_head.weight"] = embedding + 1
    with pytest.raises(ValueError, match=r"lm_head.weight to be model.embed_tokens.weight, since"):
        load_model(made.save(tmp_path))


@pytest.mark.parametrize(
    "family, gone",
    [
        ("dream", "model.layers.1.self_attn.k_proj.bias"),
        ("a2d-qwen3", "model.layers.0.self_attn.q_norm.weight"),
        ("llada-moe", "model.layers.2.mlp.experts.5.up_proj.weight"),
        ("llada-moe", "model.layers.2.mlp.gate.weight"),
        ("illada", "lm_head.weight"),
    ],
)
def test_missing_and_unexpected_tensors_are_named(family, gone):
    made = make(family)
    weights = dict(made.weights)
    del weights[gone]
    model = empty_model(made.config, dtype=torch.float32)
    with pytest.raises(ValueError, match=rf"missing 1 tensor.*{gone}"):
        model.load_weights(weights.items())
    weights = made.weights | {"model.layers.0.self_attn.o_proj.bias": torch.zeros(24)}
    with pytest.raises(ValueError, match="unexpected tensor '.*o_proj.bias'"):
        model.load_weights(weights.items())


def test_a_tensor_of_one_expert_that_does_not_fit_is_named():
    made = make("llada-moe")
    name = "model.layers.0.mlp.experts.3.down_proj.weight"
    weights = made.weights | {name: torch.zeros(24, 17)}
    with pytest.raises(ValueError, match=rf"tensor '{name}' .*does not fit"):
        empty_model(made.config, dtype=torch.float32).load_weights(weights.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_loaded(family):
    made = make(family, tie_word_embeddings=True)
    model = empty_model(made.config, dtype=torch.float32)
    assert model.load_weights(made.weights.items()) == {
        name for name, _ in model.named_parameters(remove_duplicate=False)
    }


def test_a_constant_of_each_expert_enters_choice_and_weight():
    """`moe_router_enable_expert_bias`: a large constant makes every row choose that expert."""
    made = make("llada-moe", num_hidden_layers=1)
    config = LLaDAMoEConfig(**(made.config.to_dict() | {"moe_router_enable_expert_bias": True}))
    bias = torch.zeros(6)
    bias[4] = 3.0
    weights = made.weights | {"model.layers.0.mlp.gate.expert_bias": bias}
    model = empty_model(config, dtype=torch.float32)
    model.load_weights(weights.items())
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    _, saved = model.layers[0].mlp.run(x, torch.arange(5))
    assert (saved.chosen_AK[:, 0] == 4).all()
    p = (x @ made.weights["model.layers.0.mlp.gate.weight"].T).softmax(-1)
    torch.testing.assert_close(saved.weights_AK[:, 0], p[:, 4] + 3.0)


# ---- tokenizers ----------------------------------------------------------------------------------


def test_dreams_tokenizer_is_read_and_its_code_is_not_run(tmp_path):
    """Its files as the repositories have them: Qwen2's, under a name and code of their own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {c: n for n, c in enumerate([*alphabet, "he", "\u0120he"])}
    special_words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"]
    added = {
        str(len(words) + n): {"content": text, "special": True, "normalized": False}
        for n, text in enumerate(special_words)
    }
    told = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "added_tokens_decoder": added,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
    }
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh e\n\u0120 he\n", encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
    (tmp_path / "tokenization_dream.py").write_text("raise SystemExit('it ran')\n")
    mask = len(words) + 3
    made = make("dream", vocab_size=320, num_hidden_layers=1)
    made.config.mask_token_id = None
    denoiser = Denoiser.from_pretrained(made.save(tmp_path), device="cpu")
    assert denoiser.special.mask == mask and denoiser.special.late == {EOS, mask - 1}
    prompt = denoiser.encode("he he<|mask|>")
    assert prompt == [words["he"], words["\u0120he"], mask]
    assert denoiser.decode(prompt) == "he he"
    (answer,) = denoiser.generate([prompt], policy="boe", max_tokens=4, ignore_eos=True)
    assert len(answer.tokens) == 4 and answer.report["infill"][0]["position"] == 2


# ---- special ids ---------------------------------------------------------------------------------


def tokenizer(mask=None, eos=None, **vocabulary):
    words = {f"<|{name}|>": token for name, token in vocabulary.items()}
    return SimpleNamespace(mask_token_id=mask, eos_token_id=eos, get_vocab=lambda: words)


def config_of(architecture="A2DQwen3LMHeadModel", **fields):
    return config_class(architecture)(**(SIZES | fields))


def ids(config):
    return config.mask_token_id, config.eos_token_id, config.eot_token_id


def test_ids_come_from_the_config_then_the_tokenizer_then_the_server():
    said = config_of(mask_token_id=20, eos_token_id=21, eot_token_id=22)
    special.complete(said, tokenizer(10, 11, im_end=12))
    assert ids(said) == (20, 21, 22)
    silent = config_of()
    special.complete(silent, tokenizer(10, 11, im_end=12))
    assert ids(silent) == (10, 11, 12)
    given = config_of(eos_token_id=3)
    special.complete(given, tokenizer(None, 11), 9)
    assert ids(given) == (9, 3, None)


def test_published_ids_are_those_of_the_published_vocabulary_alone():
    config = ILLaDAConfig(vocab_size=155136, eos_token_id=2)
    special.complete(config, None)
    assert ids(config) == (5, 2, None)
    other = ILLaDAConfig(vocab_size=155000, eos_token_id=2)
    with pytest.raises(ValueError, match="mask_token_id: .*neither config.json nor the tokenizer"):
        special.complete(other, None)


def test_a_mask_that_is_the_end_of_text_counts_as_unsaid():
    config = LLaDAMoEConfig(mask_token_id=156892, eos_token_id=156892, vocab_size=157184)
    special.complete(config, None)
    assert config.mask_token_id == 156895


def test_without_a_mask_the_refusal_says_how_to_give_it():
    message = r"""mask_token_id: .*got None; .*--additional-config '{"mask_token_id": \.\.\.}'"""
    with pytest.raises(ValueError, match=message):
        special.complete(config_of(eos_token_id=3), tokenizer())
    with pytest.raises(ValueError, match=r"mask_token_id: .*\(29\), got 29; neither"):
        special.complete(config_of(eos_token_id=3), None, 29)


def test_a_mask_that_two_name_differently_is_refused():
    for config, words in ((config_of(mask_token_id=20), None), (config_of(), tokenizer(20))):
        with pytest.raises(ValueError, match=r"the checkpoint's own \(20\), got 9; remove"):
            special.complete(config, words, 9)


def test_without_an_end_of_text_nothing_is_served():
    with pytest.raises(ValueError, match="eos_token_id: expected a token id .*--hf-overrides"):
        special.complete(config_of(mask_token_id=20), tokenizer())


def test_the_ids_of_small_checkpoints_are_complete():
    made = make("dream")
    special.complete(network(made).config, None)
    assert ids(made.config)[:2] == (MASK, EOS)
