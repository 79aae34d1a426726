"""The check for a machine with a GPU runs on the CPU, says what it found and never stops early."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from boe_vllm.lab.bench.scenarios import DECODES
from boe_vllm.lab.gpu import attention, rows, run, tokens
from boe_vllm.lab.gpu.report import Report

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check.py"


def lines(text):
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def test_help_needs_nothing_installed_and_names_the_wheels():
    command = [sys.executable, "-I", "-S", str(SCRIPT), "--help"]
    text = subprocess.check_output(command, text=True)
    for wheel in ("pydantic-core", "annotated-types", "xformers==0.0.35", "nvidia-cuda-runtime"):
        assert wheel in text


def test_everything_is_ok_on_the_cpu(capsys):
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.main(["--device", "cpu", "--small"]) == 0
    found = lines(capsys.readouterr().out)
    assert all(line["ok"] for line in found)
    assert found[-1]["check"] == "all"
    kinds = {line["check"] for line in found}
    assert kinds > {
        "facts",
        "ceilings",
        "attention",
        "products",
        "functions",
        "experts",
        "tokens",
        "steps",
    }
    assert {line["scenario"] for line in found if line["check"] == "tokens"} == set(DECODES)
    for line in found:
        if line["check"] == "steps":
            assert line["predicted_ms"] > 0 and line["passes"] >= 1 and line["rows"] >= 1


def test_a_check_that_fails_is_a_line_and_stops_no_other(capsys, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("no kernel image")

    for name in ("check_facts", "check_attention", "check_steps", "check_products"):
        monkeypatch.setattr(run, name, broken)
    monkeypatch.setattr(tokens, "DECODES", {"joint": DECODES["joint"]})
    assert run.run("cpu", small=True, budget=60) == 1
    found = lines(capsys.readouterr().out)
    failed = [line for line in found if not line["ok"]]
    assert [line["check"] for line in failed] == [
        *("facts", "broken", "broken", "steps", "all"),
    ]
    assert "no kernel image" in failed[0]["error"] and failed[0]["trace"]
    assert [line["ok"] for line in found if line["check"] == "tokens"] == [True]


def test_wrong_numbers_are_not_ok(capsys, monkeypatch):
    right = attention.attention_forward

    def wrong(q, k, v, **options):
        o = right(q, k, v, **options)
        return o * 1.05 if options["impl"] != "reference" else o

    monkeypatch.setattr(attention, "attention_forward", wrong)
    report = Report(60)
    attention.check_attention(report, torch.device("cpu"), small=True)
    assert not report.passed
    found = lines(capsys.readouterr().out)
    assert found and not any(line["ok"] for line in found)


def test_rows_that_depend_on_their_batch_are_found(capsys, monkeypatch):
    def by_batch(x, weight, **options):
        return x @ weight + len(x) * 1e-3

    monkeypatch.setattr(rows, "matmul_rows", by_batch)
    report = Report(60)
    rows.check_products(report, torch.device("cpu"), small=True)
    assert not report.passed
    assert all(
        line["depends_at_rows"] == [1, 3, 8, 27, 32] for line in lines(capsys.readouterr().out)
    )


def test_a_spent_budget_leaves_out_what_is_left_and_says_so(capsys):
    assert run.run("cpu", small=True, budget=0) == 1
    found = lines(capsys.readouterr().out)
    assert {line["check"] for line in found if "left_out" in line} == {
        *("attention", "products", "functions", "experts", "tokens", "steps"),
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_told(capsys):
    assert run.run("cuda", small=True, budget=60) == 1
    assert "--device cpu" in lines(capsys.readouterr().out)[0]["error"]
