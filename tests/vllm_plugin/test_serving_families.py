"""`vllm serve` of every further family: completions and chat over HTTP, of random weights."""

import json

import pytest
import tiny_a2d
from families import make
from openai import OpenAI
from server import serving

from boe_vllm import Denoiser

FIELDS = {"block_length": 8, "tokens_per_step": 2}
VOCABULARY = 320


def written(family, folder):
    """A checkpoint with a tokenizer of its own, whose special ids its config names."""
    tokenizer = tiny_a2d.write_tokenizer(folder)
    sizes = dict(hidden_size=32, head_dim=16, num_hidden_layers=2, num_key_value_heads=2)
    make(family, vocab_size=VOCABULARY, **sizes).save(folder)
    config = json.loads((folder / "config.json").read_text())
    config["mask_token_id"] = tokenizer.token_to_id("<|mask|>")
    config["eos_token_id"] = tokenizer.token_to_id("<|im_end|>")
    config["pad_token_id"] = tokenizer.token_to_id("<|endoftext|>")
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.costly
@pytest.mark.parametrize("family", ["illada", "dream", "a2d-qwen2", "a2d-llama", "llada-moe"])
def test_a_family_is_served(family, tmp_path):
    folder = written(family, tmp_path)
    flags = ("--sampler", "boe", "--max-model-len", "128", "--max-num-seqs", "4", "--seed", "0")
    with serving(*flags, "--dtype", "float32", model=folder) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
        asked = {"vllm_xargs": FIELDS, "ignore_eos": True, "return_token_ids": True}
        answer = client.completions.create(
            model=folder, prompt="Once upon", max_tokens=16, temperature=0.0, extra_body=asked
        )
        chat = client.chat.completions.create(
            model=folder,
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=16,
            temperature=0.0,
            extra_body=asked,
        )
    denoiser = Denoiser.from_pretrained(folder, device="cpu")
    (want,) = denoiser.generate(
        ["Once upon"], policy="boe", max_tokens=16, ignore_eos=True, **FIELDS
    )
    assert answer.choices[0].token_ids == want.tokens
    assert answer.kv_transfer_params["boe"]["backwards"] > 0
    assert chat.usage.completion_tokens == 16 and chat.choices[0].message.content
