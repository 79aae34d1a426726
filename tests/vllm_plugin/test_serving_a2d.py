"""`vllm serve` of a Tiny-A2D checkpoint that transformers saved: completions, chat, streaming."""

import pytest
import tiny_a2d
from openai import OpenAI
from server import serving

from boe_vllm import Denoiser

FIELDS = {"block_length": 8, "tokens_per_step": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny_a2d.write(tmp_path_factory.mktemp("tiny-a2d")))


@pytest.fixture(scope="module")
def client(folder):
    flags = ("--sampler", "boe", "--max-model-len", "128", "--max-num-seqs", "4")
    with serving(*flags, "--seed", "0", model=folder) as url:
        yield OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)


@pytest.fixture(scope="module")
def denoiser(folder):
    return Denoiser.from_pretrained(folder, device="cpu")


def test_the_mask_is_the_tokenizers(denoiser):
    words = denoiser.tokenizer.get_vocab()
    special = denoiser.special
    assert special.mask == words["<|mask|>"]
    assert special.eos == words["<|im_end|>"] and special.late == {special.eos}
    assert not denoiser.model.config.shape().qkv_bias and denoiser.model.config.shape().head_norm


def test_a_completion_is_what_the_denoiser_gives(client, folder, denoiser):
    answer = client.completions.create(
        model=folder,
        prompt="Once upon",
        max_tokens=16,
        temperature=0.0,
        extra_body={"vllm_xargs": FIELDS, "ignore_eos": True, "return_token_ids": True},
    )
    (want,) = denoiser.generate(
        ["Once upon"], policy="boe", max_tokens=16, ignore_eos=True, **FIELDS
    )
    assert answer.choices[0].token_ids == want.tokens
    cost = answer.kv_transfer_params["boe"]
    assert cost["policy"] == "boe" and cost["denoising_steps"] == 8 and cost["backwards"] > 0


def test_a_chat_goes_through_the_tokenizers_template(client, folder, denoiser):
    messages = [{"role": "user", "content": "hi"}]
    quiet = {"enable_thinking": False}
    answer = client.chat.completions.create(
        model=folder,
        messages=messages,
        max_tokens=16,
        temperature=0.0,
        extra_body={
            "vllm_xargs": FIELDS,
            "chat_template_kwargs": quiet,
            "return_token_ids": True,
        },
    )
    text = denoiser.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **quiet
    )
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    (want,) = denoiser.generate([text], policy="boe", max_tokens=16, **FIELDS)
    assert answer.prompt_token_ids == want.prompt_tokens
    assert answer.choices[0].token_ids == want.tokens
    assert answer.choices[0].finish_reason == want.finish_reason


def test_streamed_pieces_make_the_same_text(client, folder):
    def ask(stream):
        return client.chat.completions.create(
            model=folder,
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=24,
            temperature=0.0,
            stream=stream,
            extra_body={"vllm_xargs": FIELDS, "ignore_eos": True},
        )

    whole = ask(False).choices[0].message.content
    pieces = [c.choices[0].delta.content or "" for c in ask(True) if c.choices]
    assert "".join(pieces) == whole
    assert len([piece for piece in pieces if piece]) > 1
