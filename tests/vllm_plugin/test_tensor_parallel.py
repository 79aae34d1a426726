"""Two ranks give the tokens of one: forward, active-row backward and partial passes."""

import json
import os
import subprocess
import sys

import pytest
from families import make

from boe_vllm import Denoiser
from boe_vllm.lab.tasks import get_task

FIELDS = [
    {"policy": "confidence"},
    {"policy": "boe"},
    {"policy": "boe", "surrogate": "mask"},
    {"policy": "boe", "surrogate": "inject"},
    {"policy": "boe", "surrogate": "inject", "context": "exact"},
    {"policy": "joint"},
    {"policy": "pairwise", "coupling": "exact"},
    {"policy": "pairwise", "coupling": "attention"},
    {"policy": "boe", "cache": "dual"},
]

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
import boe_vllm
from boe_vllm.lab.tasks import get_task

def main():
    size, fields = int(sys.argv[1]), json.loads(sys.argv[2])
    llm = LLM(boe_vllm.tiny_model_path(), sampler="boe", tensor_parallel_size=size, seed=0)
    task = get_task("sudoku6")
    prompts, settings = [], []
    for n, own in enumerate(fields):
        for temperature in (0.0, 1.0):
            prompts.append(task.items(1, seed=n, split="test")[0].prompt)
            extra = {"block_length": 18, "tokens_per_step": 3} | own
            settings.append(SamplingParams(temperature=temperature, seed=n, max_tokens=36,
                                           ignore_eos=True, extra_args=extra))
    outputs = llm.generate(prompts, settings, use_tqdm=False)
    print(json.dumps([list(o.outputs[0].token_ids) for o in outputs]))

if __name__ == "__main__":
    main()
"""


FAMILY_SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
import boe_vllm

def main():
    size, folder = int(sys.argv[1]), sys.argv[2]
    llm = LLM(folder, sampler="boe", tensor_parallel_size=size, seed=0, dtype="float32",
              skip_tokenizer_init=True)
    settings = [
        SamplingParams(temperature=0.0, seed=3, max_tokens=12, ignore_eos=True, detokenize=False,
                       extra_args={"block_length": 6, "tokens_per_step": 2} | own)
        for own in ({}, {"surrogate": "mask"}, {"policy": "joint"}, {"surrogate": "inject"})
    ]
    prompts = [{"prompt_token_ids": [3, 14, 15, 9 + n]} for n in range(len(settings))]
    outputs = llm.generate(prompts, settings, use_tqdm=False)
    print(json.dumps([list(o.outputs[0].token_ids) for o in outputs]))

if __name__ == "__main__":
    main()
"""


def tokens_with(size: int, tmp_path, text=SCRIPT, asked=None) -> list[list[int]]:
    script = tmp_path / "generate.py"
    script.write_text(text)
    asked = json.dumps(FIELDS) if asked is None else asked
    environment = os.environ | {
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(size))),
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    }
    done = subprocess.run(
        [sys.executable, str(script), str(size), asked],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores, one per rank")
def test_two_ranks_give_the_tokens_of_none(tmp_path):
    """Of the network without vLLM's parallel layers, whose tokens are those of an engine."""
    denoiser, two = Denoiser.from_pretrained("tiny", device="cpu"), iter(tokens_with(2, tmp_path))
    for n, fields in enumerate(FIELDS):
        (item,) = get_task("sudoku6").items(1, seed=n, split="test")
        for temperature in (0.0, 1.0):
            own = {"block_length": 18, "tokens_per_step": 3, "ignore_eos": True} | fields
            (answer,) = denoiser.generate(
                item.prompt, temperature=temperature, seed=n, max_tokens=36, **own
            )
            assert answer.tokens == next(two), fields


@pytest.mark.costly
@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores, one per rank")
@pytest.mark.parametrize("family", ["dream", "llada-moe"])
def test_two_ranks_of_every_switch_give_the_tokens_of_one(family, tmp_path):
    """Biases and shift; norms of heads and experts. One key head of two is on each rank. In
    bfloat16 random networks have near-ties that the order of a sum decides."""
    made = make(family, num_key_value_heads=2, num_hidden_layers=2)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    made.save(folder)
    one, two = (tokens_with(size, tmp_path, FAMILY_SCRIPT, str(folder)) for size in (1, 2))
    assert one == two and all(len(tokens) == 12 for tokens in one)
