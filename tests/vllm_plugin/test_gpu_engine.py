"""The check of the engine on a GPU runs on the CPU, says what it found and never stops early."""

import importlib.util
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from boe_vllm.lab.gpu.report import Report

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_engine.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("gpu_engine", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines(text):
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def answer(tokens, forwards=3):
    return SimpleNamespace(
        outputs=[SimpleNamespace(token_ids=tokens)],
        kv_transfer_params={"boe": {"forwards": forwards, "policy": "joint"}},
    )


def wanted(tokens, forwards=3):
    return SimpleNamespace(tokens=tokens, cost={"forwards": forwards})


def test_help_needs_nothing_installed():
    command = [sys.executable, "-I", "-S", str(SCRIPT), "--help"]
    assert "--device" in subprocess.check_output(command, text=True)


@pytest.mark.slow
def test_the_engine_is_ok_on_the_cpu():
    """In a process of its own, as the check chooses how vLLM's engine runs by the environment."""
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--small"]
    command += ["--only", "facts", "process", "large"]
    environment = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    found = lines(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert [line["check"] for line in found if line["check"] not in ("answers", "large")] == [
        *("facts", "start", "worker", "start", "memory", "all"),
    ]
    assert {line["policy"] for line in found if line["check"] == "large"} == {
        *("confidence", "joint", "boe"),
    }
    assert all(line["ok"] and line["costs_cpu"] for line in found if line["check"] == "answers")


@pytest.mark.parametrize(
    ("given", "ok"),
    [
        ({}, True),
        ({"alone": answer([1, 3])}, False),
        ({"cpu": wanted([1, 3])}, False),
        ({"cuda": wanted([1, 3])}, False),
        ({"cuda": wanted([1, 2], 4)}, False),
        ({"cpu": wanted([1, 2], 4)}, True),
    ],
)
def test_other_tokens_and_other_costs_are_not_ok(script, monkeypatch, capsys, given, ok):
    """But for costs on the CPU beside a GPU, where rounding may decide them."""
    alone = given.get("alone", answer([1, 2]))
    monkeypatch.setattr(
        script,
        "answers",
        lambda llm, fields, temperature, prompts=None: [alone if prompts else answer([1, 2])],
    )
    monkeypatch.setattr(script, "expected", lambda place, *_: [given.get(place, wanted([1, 2]))])
    script.compare(Report(60), "any", None, "cuda", small=True)
    found = lines(capsys.readouterr().out)
    assert len(found) == 5 and {line["ok"] for line in found} == {ok}


def test_a_check_that_fails_is_a_line_and_stops_no_other(script, monkeypatch, capsys):
    @contextmanager
    def broken(*args, **settings):
        raise RuntimeError("no kernel image")
        yield

    monkeypatch.setenv("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # which `main` would set
    monkeypatch.setattr(script, "engine", broken)
    monkeypatch.setattr(script, "expect", lambda *args, **options: None)
    monkeypatch.setattr(script, "check_facts", lambda report, *_: report.line("facts"))
    only = ["facts", "process", "separate", "worker", "large"]
    assert script.main(["--device", "cpu", "--small", "--only", *only]) == 1
    found = lines(capsys.readouterr().out)
    assert [line["check"] for line in found] == [*only, "all"]
    assert [line["ok"] for line in found] == [True, False, False, False, False, False]
    assert "no kernel image" in found[1]["error"]
