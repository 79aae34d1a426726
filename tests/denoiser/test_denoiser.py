"""The notebook interface: the engine's tokens without an engine, costs, traces and refusals."""

import subprocess
import sys
from pathlib import Path

import pytest

import boe_vllm
from boe_vllm import Denoiser

PROMPTS = ["12+34=", "7+8=", "305+41="]
REQUESTS = [
    {"policy": "boe", "tokens_per_step": 4, "trace": True},
    {"policy": "joint", "tokens_per_step": 4},
    {"policy": "confidence", "block_length": 8, "cache": "dual"},
    {"policy": "boe", "preset": "paper", "cfg_scale": 0.5},
    {"policy": "info-gain", "tokens_per_step": 2},
    {"choices": ["46", "15", "346"]},
    {"canvas_template": ["4", 3, "."]},
]


@pytest.fixture(scope="module")
def denoiser():
    return Denoiser.from_pretrained("tiny", device="cpu")


@pytest.fixture(scope="module")
def engine():
    from vllm import LLM

    return LLM(boe_vllm.tiny_model_path(), seed=0, max_num_seqs=8)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_texts_costs_and_traces_are_the_engines(denoiser, engine, temperature):
    from vllm import SamplingParams

    for fields in REQUESTS:
        params = [
            SamplingParams(temperature=temperature, max_tokens=16, seed=5 + n, extra_args=fields)
            for n in range(len(PROMPTS))
        ]
        wanted = engine.generate(PROMPTS, params, use_tqdm=False)
        found = denoiser.generate(PROMPTS, temperature=temperature, max_tokens=16, seed=5, **fields)
        for answer, output in zip(found, wanted, strict=True):
            (completion,) = output.outputs
            assert answer.prompt_tokens == list(output.prompt_token_ids)
            assert answer.tokens == list(completion.token_ids), fields
            assert answer.text == completion.text
            assert answer.finish_reason == completion.finish_reason
            assert answer.report == output.kv_transfer_params["boe"]


def test_a_prompt_alone_gives_what_it_gives_among_others(denoiser):
    together = denoiser.generate(PROMPTS, policy="boe", max_tokens=16, tokens_per_step=2)
    for n, prompt in enumerate(PROMPTS):
        assert denoiser.generate(
            prompt, policy="boe", max_tokens=16, tokens_per_step=2, seed=n
        ) == [together[n]]


def test_more_prompts_than_fit_together_are_all_answered(denoiser, monkeypatch):
    few = denoiser.generate(PROMPTS * 2, max_tokens=16)
    monkeypatch.setattr("boe_vllm.denoiser.MAX_ROWS", 30)
    assert denoiser.generate(PROMPTS * 2, max_tokens=16) == few


def test_a_stop_string_ends_an_answer_and_is_cut_off(denoiser):
    (whole,) = denoiser.generate("12+34=", max_tokens=16, ignore_eos=True)
    middle = whole.text[len(whole.text) // 2]
    (cut,) = denoiser.generate("12+34=", max_tokens=16, ignore_eos=True, stop=[middle])
    assert cut.text == whole.text.split(middle)[0] and cut.finish_reason == "stop"


def test_cost_and_trace_are_the_requests_own(denoiser):
    (answer,) = denoiser.generate(
        "12+34=", policy="boe", max_tokens=8, tokens_per_step=1, trace=True, ignore_eos=True
    )
    assert answer.cost["denoising_steps"] == 8 and answer.cost["backwards"] > 0
    assert sorted(answer.trace["step"]) == list(range(8))
    (plain,) = denoiser.generate("12+34=", policy="joint", max_tokens=8)
    assert plain.cost["backwards"] == 0 and plain.trace is None


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"policy": "nope"}, "policy: expected one of"),
        ({"rho": 0.5, "policy": "confidence"}, "unknown field 'rho'"),
        ({"max_tokens": 10_000}, "max_tokens: expected a canvas of at most"),
        ({"top_p": 0.9, "nothing": 1}, "unknown field 'nothing'"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(denoiser, fields, message):
    with pytest.raises(ValueError, match=message):
        denoiser.generate("1+1=", **({"max_tokens": 8} | fields))


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"expected a folder with a config\.json"):
        Denoiser.from_pretrained(tmp_path)


def test_it_works_where_there_is_no_vllm():
    code = (
        "import sys; sys.modules['vllm'] = None\n"
        "from boe_vllm import Denoiser\n"
        "d = Denoiser.from_pretrained('tiny', device='cpu')\n"
        "print(d.generate('12+34=', policy='boe', max_tokens=8, tokens_per_step=4)[0].tokens)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    (answer,) = Denoiser.from_pretrained("tiny", device="cpu").generate(
        "12+34=", policy="boe", max_tokens=8, tokens_per_step=4
    )
    assert found.stdout.strip() == str(answer.tokens)


def test_the_example_runs():
    example = Path(__file__).parents[2] / "examples" / "notebook.py"
    found = subprocess.run([sys.executable, str(example)], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert [line for line in found.stdout.split("\n") if line.startswith("boe: ")]
    costs = [line for line in found.stdout.split("\n") if line.startswith("cost:")]
    assert ["'backwards': 0," in cost for cost in costs] == [True, False, True]
