"""`vllm serve` of the bundled MDLM: text after one end of text, the same as without a server."""

import pytest
from openai import OpenAI
from server import serving

from boe_vllm import Denoiser, tiny_text_model_path
from boe_vllm.lab.tasks.story_grammar import END
from boe_vllm.lab.tasks.story_words import ALL

POLICIES = {
    "ancestral": {"block_length": 24, "steps": 12},
    "boe": {"policy": "boe", "block_length": 24, "tokens_per_step": 3},
    "joint": {"policy": "joint", "block_length": 24, "tokens_per_step": 3},
}


@pytest.fixture(scope="module")
def client():
    flags = ("--sampler", "ancestral", "--max-num-seqs", "4", "--seed", "0")
    with serving(*flags, model=tiny_text_model_path()) as url:
        yield OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)


@pytest.fixture(scope="module")
def denoiser():
    return Denoiser.from_pretrained("tiny-text", device="cpu")


def complete(client, fields, **more):
    return client.completions.create(
        model=tiny_text_model_path(),
        prompt=END,
        max_tokens=24,
        temperature=1.0,
        seed=5,
        extra_body={"vllm_xargs": fields, "ignore_eos": True, "return_token_ids": True},
        **more,
    )


@pytest.mark.parametrize("name", POLICIES)
def test_a_completion_is_what_the_denoiser_gives(client, denoiser, name):
    answer = complete(client, POLICIES[name])
    (want,) = denoiser.generate(
        [END],
        max_tokens=24,
        temperature=1.0,
        seed=5,
        ignore_eos=True,
        **({"policy": name} | POLICIES[name]),
    )
    assert answer.choices[0].prompt_token_ids == want.prompt_tokens == [denoiser.special.eos]
    assert answer.choices[0].token_ids == want.tokens and len(want.tokens) == 24
    assert answer.choices[0].text.strip() == want.text
    assert set(want.text.split()) <= ALL
    assert answer.kv_transfer_params["boe"]["policy"] == name


def test_streamed_pieces_make_the_same_text(client):
    fields = {"policy": "confidence", "block_length": 6, "tokens_per_step": 2}
    whole = complete(client, fields).choices[0].text
    pieces = [chunk.choices[0].text for chunk in complete(client, fields, stream=True)]
    assert "".join(pieces) == whole and len([piece for piece in pieces if piece]) > 1


def test_the_checkpoint_is_small_and_its_special_tokens_are_known(denoiser):
    words = denoiser.tokenizer.get_vocab()
    assert len(words) == denoiser.model.vocab_size == len(ALL) + 3
    assert denoiser.special.mask == words["<|mask|>"] == max(words.values())
    assert denoiser.special.eos == words[END]
    assert sum(p.numel() for p in denoiser.model.parameters()) * 4 < 8e6
    text = "yesterday , Vera hurried to the school ."
    assert denoiser.decode(denoiser.encode(text)) == text
