"""A network that knows fewer tokens than clients ask about."""

import json

import pytest
from engine_config import SMALL
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

MASK = 10


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eleven")
    config = SMALL | {"vocab_size": MASK + 1, "mask_token_id": MASK}
    (folder / "config.json").write_text(json.dumps(config))
    return LLM(str(folder), load_format="dummy", skip_tokenizer_init=True, seed=0)


def generate(llm, **fields):
    settings = {"max_tokens": 6, "temperature": 0.0, "detokenize": False, "ignore_eos": True}
    params = SamplingParams(**(settings | fields))
    (output,) = llm.generate({"prompt_token_ids": [2, 3]}, params, use_tqdm=False)
    return output.outputs[0]


def test_log_probabilities_end_with_the_vocabulary(llm):
    for asked, least, most in ((3, 3, 4), (11, 11, 11), (20, 11, 11), (-1, 11, 11)):
        completion = generate(llm, logprobs=asked)  # vLLM's own limit is 20
        assert len(completion.logprobs) == len(completion.token_ids) == 6
        assert all(least <= len(entry) <= most for entry in completion.logprobs)
        assert MASK not in completion.token_ids


@pytest.mark.parametrize(
    "fields, name",
    [
        ({"logprobs": 21}, "logprobs"),
        ({"allowed_token_ids": [11]}, "allowed_token_ids"),
        ({"logit_bias": {11: 1.0}}, "logit_bias"),
        ({"stop_token_ids": [11]}, "stop_token_ids"),
        ({"extra_args": {"canvas_template": [[11], 2]}}, "canvas_template"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_token_beyond_it_is_refused_and_the_engine_lives(llm, fields, name):
    with pytest.raises(VLLMValidationError) as error:
        generate(llm, **fields)
    assert error.value.parameter == name
    assert len(generate(llm).token_ids) == 6
