"""The steps of docs/extending.md, followed."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

TESTS = Path(__file__).parent
TEXT = (TESTS.parent / "docs" / "extending.md").read_text()

USE = """
import sys
sys.path.insert(0, {tests!r})
import conftest
from oracle import random_weights, small_config
from test_loop import finish, make_loop, params_of
from boe_vllm.config import parse_sampler_config
from boe_vllm.models.standalone import build

fields = {fields!r}
network = build(small_config())
network.load_weights(random_weights(small_config()).items())
loop = make_loop(network)
loop.add("x", [1, 2, 3], params_of(fields | {{"block_length": 8, "trace": True}}, prompt_len=3))
tokens, reports = finish(loop)
trace = reports["x"]["trace"]
first = [p for p, step in zip(trace["position"], trace["step"]) if step == 0]
assert len(tokens["x"]) == 16 and reports["x"]["policy"] == fields["policy"]
assert all((position + 3) % fields["stride"] == 0 for position in first), first
try:
    parse_sampler_config(fields | {{"stride": 0}})
except ValueError as error:
    assert "stride" in str(error)
    print("refused and served")
"""


def block(language):
    """The document's first code block in a language."""
    return re.search(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)[1]


def test_a_policy_in_one_file(tmp_path):
    project = tomllib.loads(block("toml"))
    ((name, module),) = project["project"]["entry-points"]["boe_vllm.policies"].items()
    assert project["tool"]["setuptools"]["py-modules"] == [module]
    (tmp_path / f"{module}.py").write_text(block("python"))
    # What pip makes of the two files.
    info = tmp_path / f"{project['project']['name'].replace('-', '_')}-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['project']['name']}\nVersion: 0.1\n"
    )
    (info / "entry_points.txt").write_text(f"[boe_vllm.policies]\n{name} = {module}\n")
    code = USE.format(tests=str(TESTS), fields=json.loads(block("json")))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert run.stdout.endswith("refused and served\n"), run.stderr


def test_files_that_the_document_names_exist():
    named = re.findall(r"`((?:boe_vllm|tests|docs)/[\w/.]+)`", TEXT)
    assert len(named) > 5
    assert [path for path in named if not (TESTS.parent / path).exists()] == []
