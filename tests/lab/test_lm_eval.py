"""lm-eval's two ways to a model: its own vLLM engine, and a server's completions."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import boe_vllm
from boe_vllm.lab.tasks import get_task

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'boe-vllm[lm-eval]'")
pytestmark = pytest.mark.slow

MODEL = boe_vllm.tiny_model_path()
TASK = get_task("sudoku4")
ITEMS = 12
FIELDS = {"block_length": 16, "tokens_per_step": 4}
CONFIG = """\
task: tiny_sudoku4
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["\\n", "S4:"]
  max_gen_toks: 16
  do_sample: false
  temperature: 0.0
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A local task of lm-eval's, with the items of one of ours."""
    folder = tmp_path_factory.mktemp("lm-eval")
    items = TASK.items(ITEMS, seed=5)
    lines = [json.dumps({"prompt": item.prompt, "answer": item.answer}) for item in items]
    (folder / "items.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "tiny_sudoku4.yaml").write_text(CONFIG.format(file=folder / "items.jsonl"))
    return folder


def lm_eval(folder: Path, name: str, *arguments: str) -> tuple[float, dict[str, str]]:
    """The score that lm-eval prints, and the answer to each prompt."""
    command = [sys.executable, "-m", "lm_eval", "run", *arguments]
    command += ["--tasks", "tiny_sudoku4", "--include_path", str(folder), "--seed", "1234"]
    command += ["--output_path", str(folder / name), "--log_samples"]
    environment = os.environ | {
        "HF_HOME": str(folder / "cache"),
        "HF_DATASETS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    (results,) = (folder / name).rglob("results_*.json")
    (samples,) = (folder / name).rglob("samples_*.jsonl")
    score = json.loads(results.read_text())["results"]["tiny_sudoku4"]["exact_match,none"]
    records = [json.loads(line) for line in samples.read_text().splitlines()]
    return score, {record["doc"]["prompt"]: record["resps"][0][0] for record in records}


@pytest.fixture(scope="module")
def offline(folder):
    model = {
        "pretrained": MODEL,
        "max_num_seqs": 8,
        "additional_config": {
            "sampler": "boe",
            "sampler_config": {"rho": 0.5, **FIELDS},
        },
    }
    return lm_eval(folder, "offline", "--model", "vllm", "--model_args", json.dumps(model))


def completions(folder, server, name, fields):
    model = f"model={MODEL},base_url={server}/v1/completions,num_concurrent=4"
    model += ",tokenized_requests=False,max_retries=1"
    arguments = ["--model", "local-completions", "--model_args", model]
    fields = json.dumps({"vllm_xargs": fields})
    return lm_eval(folder, name, *arguments, "--gen_kwargs", fields)


def test_its_vllm_model_decodes_with_our_sampler(offline):
    score, answers = offline
    items = TASK.items(ITEMS, seed=5)
    assert len(answers) == ITEMS
    right = [TASK.score(item, answers[item.prompt]).exact for item in items]
    assert score == pytest.approx(sum(right) / ITEMS) and score > 0.5


def test_a_server_gives_the_same_answers(folder, shared_server, offline):
    fields = {"policy": "boe", "rho": 0.5, **FIELDS}
    assert completions(folder, shared_server, "server", fields) == offline


def test_a_request_chooses_its_policy_through_gen_kwargs(folder, shared_server, offline):
    fields = {"policy": "random", **FIELDS, "tokens_per_step": 16}
    _, answers = completions(folder, shared_server, "other", fields)
    assert len(answers) == ITEMS and answers != offline[1]
