"""The steps of docs/extending.md, followed to the letter."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import httpx
import pytest
from families import MASK, make, plain_loop
from server import serving

TESTS = Path(__file__).parents[1]
TEXT = (TESTS.parent / "docs" / "extending.md").read_text()


def block(language, number=0):
    """A code block of the document in a language, by its number."""
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)[number]


def install(folder, monkeypatch, number):
    """Steps 1 to 3 of a package: two files and `pip install .`, into a folder of its own and with
    nothing downloaded. Returns what its `pyproject.toml` says."""
    project = tomllib.loads(block("toml", number))
    (module,) = project["tool"]["setuptools"]["py-modules"]
    (folder / f"{module}.py").write_text(block("python", number))
    (folder / "pyproject.toml").write_text(block("toml", number))
    site = folder / "site"
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--target", str(site))
    command = [sys.executable, "-m", "pip", "install", ".", *options]
    subprocess.run(command, cwd=folder, check=True)
    path = os.pathsep.join(filter(None, [str(site), os.getenv("PYTHONPATH")]))
    monkeypatch.setenv("PYTHONPATH", path)
    return project


@pytest.mark.slow
def test_a_policy_in_one_file(tmp_path, monkeypatch):
    project = install(tmp_path, monkeypatch, 0)
    (name,) = project["project"]["entry-points"]["boe_vllm.policies"]

    with serving("--sampler", name) as url:

        def query(fields):
            fields = {"block_length": 8, "trace": True} | fields
            body = {"model": url.model, "prompt": "1+2", "max_tokens": 16, "ignore_eos": True}
            body |= {"temperature": 0, "vllm_xargs": fields}
            return httpx.post(f"{url}/v1/completions", json=body, timeout=60)

        for fields, stride in ((json.loads(block("json")), 3), ({}, 2)):  # named, and by default
            report = query(fields).json()["kv_transfer_params"]["boe"]
            assert report["policy"] == name
            trace = report["trace"]
            first = [
                p for p, step in zip(trace["position"], trace["step"], strict=True) if step == 0
            ]
            assert first and all((position + 3) % stride == 0 for position in first)
        refused = query({"policy": name, "stride": 0})
        assert refused.status_code == 400 and "stride" in refused.json()["error"]["message"]
        assert query({"policy": "boe"}).json()["kv_transfer_params"]["boe"]["policy"] == "boe"


DECODE = """
import sys
from transformers import AutoConfig
from vllm.model_executor.models.registry import ModelRegistry
from boe_vllm.models.build import load_model
from boe_vllm.vllm_plugin import plugin
from test_loop import finish, make_loop, params_of

plugin.register()
folder, architecture = sys.argv[1:]
assert architecture in ModelRegistry.get_supported_archs()
model = load_model(folder)
assert type(AutoConfig.from_pretrained(folder)) is type(model.config)
assert type(model.config).__module__ == "tern"
loop = make_loop(model)
fields = {"block_length": 4, "tokens_per_step": 2}
loop.add("x", [3, 14, 15], params_of(fields, prompt_len=3, max_tokens=8))
canvas = loop.canvases["x"]
finish(loop)
print(canvas.tokens.tolist())
"""


@pytest.mark.slow
def test_a_model_in_one_file(tmp_path, monkeypatch):
    """Its checkpoint decodes to the tokens of a plain loop over transformers' own class."""
    project = install(tmp_path, monkeypatch, 1)
    (architecture,) = project["project"]["entry-points"]["boe_vllm.families"]
    made = make("dream")
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    fields = json.loads((made.save(folder) / "config.json").read_text())
    fields |= {"architectures": [architecture], "model_type": "tern"}
    (folder / "config.json").write_text(json.dumps(fields))
    tests = os.pathsep.join(map(str, [TESTS, TESTS / "decoding", TESTS / "policies"]))
    monkeypatch.setenv("PYTHONPATH", os.environ["PYTHONPATH"] + os.pathsep + tests)
    command = [sys.executable, "-c", DECODE, str(folder), architecture]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    tokens = [3, 14, 15] + [MASK] * 8
    want = plain_loop(made, tokens, start=3, block=4, quota=2)
    assert json.loads(done.stdout.splitlines()[-1]) == want


def test_files_that_the_document_names_exist():
    named = re.findall(r"`((?:boe_vllm|tests|docs)/[\w/.]+)`", TEXT)
    assert len(named) > 5
    assert [path for path in named if not (TESTS.parent / path).exists()] == []
