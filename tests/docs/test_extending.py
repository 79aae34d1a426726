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
from server import serving

TESTS = Path(__file__).parents[1]
TEXT = (TESTS.parent / "docs" / "extending.md").read_text()


def block(language):
    """The document's first code block in a language."""
    return re.search(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)[1]


@pytest.mark.slow
def test_a_policy_in_one_file(tmp_path, monkeypatch):
    # 1. and 2.: two files.
    project = tomllib.loads(block("toml"))
    ((name, module),) = project["project"]["entry-points"]["boe_vllm.policies"].items()
    (tmp_path / f"{module}.py").write_text(block("python"))
    (tmp_path / "pyproject.toml").write_text(block("toml"))
    # 3.: `pip install .`, into a folder of its own and with nothing downloaded.
    site = tmp_path / "site"
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--target", str(site))
    install = [sys.executable, "-m", "pip", "install", ".", *options]
    subprocess.run(install, cwd=tmp_path, check=True)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(filter(None, [str(site), os.getenv("PYTHONPATH")]))
    )

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


def test_files_that_the_document_names_exist():
    named = re.findall(r"`((?:boe_vllm|tests|docs)/[\w/.]+)`", TEXT)
    assert len(named) > 5
    assert [path for path in named if not (TESTS.parent / path).exists()] == []
