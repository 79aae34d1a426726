"""vLLM serves the bundled MDLM by its architecture's name: unconditional text after one end of text,
the same tokens as without an engine."""

import pytest
from vllm import LLM, SamplingParams

from boe_vllm import Denoiser, tiny_text_model_path
from boe_vllm.lab.tasks.story_grammar import END
from boe_vllm.lab.tasks.story_words import ALL

POLICIES = {
    "ancestral": {"policy": "ancestral", "block_length": 24, "steps": 12},
    "boe": {"policy": "boe", "block_length": 24, "tokens_per_step": 3},
    "joint": {"policy": "joint", "block_length": 24, "tokens_per_step": 3},
}


@pytest.fixture(scope="module")
def outputs():
    llm = LLM(tiny_text_model_path(), seed=0, max_num_seqs=4)
    params = [
        SamplingParams(
            max_tokens=24, temperature=1.0, seed=n, ignore_eos=True, extra_args=dict(fields)
        )
        for n, fields in enumerate(POLICIES.values())
    ]
    found = llm.generate([END] * len(params), params, use_tqdm=False)
    return dict(zip(POLICIES, found, strict=True))


@pytest.fixture(scope="module")
def denoiser():
    return Denoiser.from_pretrained("tiny-text", device="cpu")


@pytest.mark.parametrize("name", POLICIES)
def test_the_engines_tokens_are_the_denoisers(outputs, denoiser, name):
    output = outputs[name]
    (completion,) = output.outputs
    seed = list(POLICIES).index(name)
    (want,) = denoiser.generate(
        [END], max_tokens=24, temperature=1.0, seed=seed, ignore_eos=True, **POLICIES[name]
    )
    assert output.prompt_token_ids == want.prompt_tokens == [denoiser.special.eos]
    assert list(completion.token_ids) == want.tokens and len(want.tokens) == 24
    assert completion.text.strip() == want.text.strip()
    assert set(completion.text.split()) <= ALL | {"<|unknown|>"}


def test_the_checkpoint_is_small_and_its_special_tokens_are_known(denoiser):
    words = denoiser.tokenizer.get_vocab()
    assert len(words) == denoiser.model.vocab_size == len(ALL) + 3
    assert denoiser.special.mask == words["<|mask|>"] == max(words.values())
    assert denoiser.special.eos == words[END]
    assert sum(p.numel() for p in denoiser.model.parameters()) * 4 < 8e6
    text = "yesterday , Vera hurried to the school ."
    assert denoiser.decode(denoiser.encode(text)) == text
