"""A real vLLM engine on the bundled checkpoint, offline."""

import itertools

import numpy as np
import pytest
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError

import boe_vllm
from boe_vllm.lab.tasks import get_task
from boe_vllm.policies import POLICY_NAMES

MODEL = boe_vllm.tiny_model_path()
NEEDS_A_TABLE = {"pc"}


@pytest.fixture(scope="module")
def llm():
    return LLM(MODEL, sampler="boe", sampler_config={"rho": 0.5}, max_num_seqs=40, seed=0)


def params(task=None, *, temperature=0.0, max_tokens=None, seed=None, **fields):
    """Greedy by default, on the task's canvas; other vLLM settings with a leading underscore."""
    own = {key[1:]: fields.pop(key) for key in list(fields) if key.startswith("_")}
    if task is not None:
        max_tokens = task.gen_length
        fields.setdefault("block_length", task.block_length)
    return SamplingParams(
        temperature=temperature, max_tokens=max_tokens, seed=seed, extra_args=fields, **own
    )


def generate(llm, prompts, settings):
    return llm.generate(prompts, settings, use_tqdm=False)


def report(output):
    return output.kv_transfer_params["boe"]


def test_puzzles_are_solved_and_cost_is_reported(llm):
    task = get_task("sudoku4")
    items = task.items(40, seed=3, split="test")
    outputs = generate(llm, [item.prompt for item in items], params(task, policy="confidence"))
    scores = [task.score(i, o.outputs[0].text).valid for i, o in zip(items, outputs, strict=True)]
    assert np.mean(scores) > 0.6
    for output in outputs:
        cost = report(output)
        rows = len(output.prompt_token_ids) + 16
        assert (cost["policy"], cost["denoising_steps"], cost["forwards"]) == ("confidence", 16, 16)
        assert cost["rows_forward"] == 16 * rows and cost["backwards"] == 0
        assert len(output.outputs[0].token_ids) == 16
        assert output.outputs[0].finish_reason == "length"


def test_the_servers_sampler_is_the_default(llm):
    task = get_task("sudoku4")
    (item,) = task.items(1, seed=0, split="test")
    (output,) = generate(llm, [item.prompt], params(task, surrogate="mask", bypass=None))
    assert report(output)["policy"] == "boe" and report(output)["backwards"] > 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_policy_gives_the_same_alone_and_among_32(llm, temperature):
    names = sorted(POLICY_NAMES - NEEDS_A_TABLE)
    tasks = [get_task(name) for name in ("sudoku4", "countdown")]
    prompts, settings = [], []
    for n, policy in zip(range(max(33, len(names))), itertools.cycle(names), strict=False):
        task = tasks[n % len(tasks)]
        (item,) = task.items(1, seed=n, split="test")
        prompts.append(item.prompt)
        settings.append(
            params(task, policy=policy, temperature=temperature, seed=n, tokens_per_step=2 + n % 3)
        )
    together = generate(llm, prompts, settings)
    for n, _ in enumerate(names):
        (alone,) = generate(llm, [prompts[n]], settings[n])
        assert alone.outputs[0].token_ids == together[n].outputs[0].token_ids, names[n]
        assert report(alone) == report(together[n])


def test_a_seed_fixes_a_sample_and_n_gives_different_ones(llm):
    task = get_task("sudoku6-few")
    (item,) = task.items(1, seed=0, split="test")
    settings = params(task, policy="confidence", temperature=1.0, seed=5, tokens_per_step=6, _n=3)
    first, again = (generate(llm, [item.prompt], settings)[0].outputs for _ in range(2))
    assert [o.text for o in first] == [o.text for o in again]
    assert len({o.text for o in first}) > 1
    other = params(task, policy="confidence", temperature=1.0, seed=6, tokens_per_step=6, _n=3)
    assert [o.text for o in generate(llm, [item.prompt], other)[0].outputs] != [
        o.text for o in first
    ]


def test_max_tokens_cuts_a_canvas_of_whole_blocks(llm):
    (output,) = generate(llm, ["A:1+2="], params(max_tokens=5, policy="confidence", block_length=4))
    assert len(output.outputs[0].token_ids) <= 5
    assert output.outputs[0].finish_reason in ("length", "stop")


def test_gen_length_overrides_max_tokens(llm):
    settings = params(max_tokens=5, gen_length=24, block_length=8, _ignore_eos=True)
    (output,) = generate(llm, ["A:1+2="], settings)
    assert len(output.outputs[0].token_ids) == 24


def test_eos_ends_the_request_and_nothing_after_it_is_decoded(llm):
    task = get_task("addition")
    (item,) = task.items(1, seed=0, split="test")
    fields = dict(policy="confidence", block_length=8)
    (short,) = generate(llm, [item.prompt], params(max_tokens=64, **fields))
    (long,) = generate(llm, [item.prompt], params(max_tokens=64, _ignore_eos=True, **fields))
    assert short.outputs[0].finish_reason == "stop"
    assert report(short)["denoising_steps"] < report(long)["denoising_steps"] == 64
    assert len(long.outputs[0].token_ids) == 64
    assert long.outputs[0].token_ids[: len(short.outputs[0].token_ids)] == list(
        short.outputs[0].token_ids
    )


def test_a_stop_string_ends_the_request(llm):
    task = get_task("sudoku4")
    (item,) = task.items(1, seed=0, split="test")
    (whole,) = generate(llm, [item.prompt], params(task, policy="confidence"))
    text = whole.outputs[0].text
    (cut,) = generate(llm, [item.prompt], params(task, policy="confidence", _stop=[text[5:7]]))
    assert cut.outputs[0].text == text[: text.index(text[5:7])]
    assert cut.outputs[0].finish_reason == "stop" and cut.outputs[0].stop_reason == text[5:7]


def test_logprobs_are_of_the_committed_tokens(llm):
    task = get_task("sudoku4")
    (item,) = task.items(1, seed=0, split="test")
    settings = params(task, policy="confidence", trace=True, _logprobs=2)
    (output,) = generate(llm, [item.prompt], settings)
    trace = report(output)["trace"]
    for token, entry, confidence in zip(
        output.outputs[0].token_ids, output.outputs[0].logprobs, trace["confidence"], strict=True
    ):
        assert np.exp(entry[token].logprob) == pytest.approx(confidence, abs=1e-5)
        assert entry[token].rank == 1 and len(entry) == 2


def test_requests_of_all_lengths_join_and_leave(llm):
    """More requests than run at once, of very different sizes: all come back, in order."""
    rng = np.random.default_rng(0)
    prompts = ["A:" + "1+" * int(rng.integers(0, 150)) + "1=" for _ in range(60)]
    settings = [
        params(
            max_tokens=int(rng.integers(1, 40)),
            policy=["confidence", "boe", "random"][n % 3],
            tokens_per_step=int(rng.integers(1, 9)),
            _ignore_eos=True,
        )
        for n in range(60)
    ]
    outputs = generate(llm, prompts, settings)
    assert [o.prompt for o in outputs] == prompts
    assert [len(o.outputs[0].token_ids) for o in outputs] == [s.max_tokens for s in settings]


BAD = [
    ("", {}, r"prompt cannot be empty"),
    ("A:1+2=", dict(max_tokens=0), r"max_tokens"),
    ("A:1+2=", dict(max_tokens=600), r"max_tokens: .*canvas of at most"),
    ("A:1+2=", dict(gen_length=2000), r"gen_length: .*canvas of at most"),
    ("A:" + "1+" * 400 + "1=", {}, r"maximum context length"),
    ({"prompt_token_ids": [1, 2, 99999]}, {}, r"token|vocab"),
    ({"prompt_token_ids": [1, -2]}, {}, r"Token id -2"),
    ("A:1+2=", dict(policy="nope"), r"policy: expected one of"),
    ("A:1+2=", dict(policy="boe", rho=2), r"rho: .*got 2"),
    ("A:1+2=", dict(steps=7, gen_length=32, block_length=5), r"gen_length: .*block_length"),
    ("A:1+2=", dict(_presence_penalty=0.5), r"presence_penalty"),
]


@pytest.mark.parametrize("prompt, fields, message", BAD, ids=lambda v: str(v)[:30])
def test_bad_input_is_refused_and_harms_nobody(llm, prompt, fields, message):
    fields = {"max_tokens": 16} | fields
    with pytest.raises((ValueError, VLLMValidationError), match=message):
        generate(llm, ["A:1+2=", prompt], [params(max_tokens=8), params(**fields)])
    (after,) = generate(llm, ["A:1+2="], params(max_tokens=8))
    assert len(after.outputs[0].token_ids) >= 1
