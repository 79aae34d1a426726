"""Every command of the documents is run by a test or by CI, or said to be unverified there."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import boe_vllm

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *(ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "patches" / "README.md"),
    *sorted((ROOT / "docs").glob("*.md")),
]
BIN = Path(sys.executable).parent
PROGRAMS = r"(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?(?:make|vllm|python|boe-vllm|lm_eval|pip|git|cd) \S"
MARK = re.compile(r"unverified|needs a GPU", re.IGNORECASE)

PLUGIN = "tests/vllm_plugin"
HERE = "tests/docs/test_documents.py"
BENCHMARK = "(throughput|steering|attention|scaling|memory|overhead)"
RUN_BY = {
    r"make (setup|test|wheel|lint)": ".ci/run::make test",
    r"make demo": "scripts/check_wheel.sh::offline.py --items",
    r"pip install '?(boe-vllm\[|\.)": "Makefile::pip install --quiet --editable",
    r"pip install \.": "tests/docs/test_extending.py::test_a_policy_in_one_file",
    r"vllm serve .* --sampler alternate": "tests/docs/test_extending.py::test_a_policy_in_one_file",
    r"vllm serve$": "tests/server.py::serve",
    r'vllm serve "\$\(python -c .*tiny_model_path': "tests/server.py::tiny_model_path",
    r'vllm serve "\$\(python -c .*tiny_text_model_path': (
        f"{PLUGIN}/test_serving_mdlm.py::tiny_text_model_path"
    ),
    r"vllm serve MODEL --sampler boe": "tests/lab/test_lm_eval.py::server",
    r"vllm bench throughput": f"{HERE}::test_vllms_throughput_benchmark_runs",
    r"vllm bench serve": f"{HERE}::test_vllms_serving_benchmark_runs",
    r"lm_eval run --model vllm": "tests/lab/test_lm_eval.py::test_its_vllm_model",
    r"lm_eval run --model local-completions": "tests/lab/test_lm_eval.py::test_a_request_chooses",
    r"python scripts/modules_passed.py": f"{HERE}::test_a_request_passes_the_modules",
    r"python examples/client.py": f"{PLUGIN}/test_server.py::test_the_client_example_runs",
    r"python examples/grammar.py": f"{PLUGIN}/test_server.py::test_the_grammar_example_runs",
    r"python examples/beside_grammars.py": (
        f"{PLUGIN}/test_server.py::test_the_example_of_companies_runs"
    ),
    r"python examples/notebook.py": "tests/denoiser/test_denoiser.py::test_the_example_runs",
    r"python examples/throughput.py": f"{HERE}::test_the_throughput_example_runs",
    r".*python examples/soak.py": f"{HERE}::test_the_soak_runs",
    r"python examples/match_fronts.py": (
        "tests/lab/test_fronts.py::test_the_example_meets_each_share"
    ),
    r"python examples/train_scorer.py": f"{HERE}::test_the_tables_commands_run",
    r"boe-vllm eval --model tiny --(table|figure)": f"{HERE}::test_the_tables",
    r"boe-vllm eval --model tiny-text": (
        "tests/lab/test_stories.py::test_eval_writes_what_the_source_says"
    ),
    r"boe-vllm eval (--model tiny )?--contest": (
        "tests/lab/test_sweep.py::test_a_contest_is_run_once"
    ),
    r"boe-vllm eval --model tiny --tasks": (
        "tests/lab/test_eval_run.py::test_a_run_writes_every_item"
    ),
    r"boe-vllm eval$": "tests/lab/test_eval_run.py::test_a_run_writes_every_item",
    r"python -m boe_vllm\.lab\.eval": "tests/lab/test_eval_run.py::test_a_run_writes_every_item",
    rf"python -m boe_vllm\.lab\.bench {BENCHMARK}": "tests/lab/test_bench.py::test_throughput_ends",
    r"python -m boe_vllm\.lab\.bench fidelity": (
        "tests/steering/test_fidelity.py::test_fidelity_ends"
    ),
    r"(python -m boe_vllm\.lab\.|boe-vllm )bench remask": (
        "tests/lab/test_remask.py::test_the_command"
    ),
    r"boe-vllm grade": "tests/lab/test_graders.py::test_the_command_prints_both_shares",
    r"boe-vllm bench predict": "tests/lab/test_predict.py::test_predict_prints_passes",
    r"python scripts/gpu_check.py": "tests/lab/test_gpu_check.py::test_everything_is_ok",
    r"python scripts/gpu_engine.py": f"{PLUGIN}/test_gpu_engine.py::test_the_engine_is_ok",
    r"boe-vllm bench": "tests/lab/test_bench.py::test_throughput_ends",
    r"boe-vllm fields": "tests/docs/test_reference.py::test_the_document_is_what",
    r"boe-vllm watch": "tests/lab/test_pictures.py::test_watch_prints_the_end_plainly",
    r"boe-vllm plot": "tests/lab/test_pictures.py::test_curves_have_a_line_per_policy",
    r"BOE_VLLM_FUZZ_CASES=.* tests/vllm_plugin/test_fuzz.py": (
        f"{PLUGIN}/test_fuzz.py::test_any_request"
    ),
    r"BOE_VLLM_SCHEMA_EXAMPLES=.* tests/vllm_plugin/test_schema.py": (
        f"{PLUGIN}/test_schema.py::test_no_request"
    ),
    r"cd vllm && git apply": f"{PLUGIN}/test_patches.py::test_a_patch_applies",
}
"""What begins like a command of a document -> the file that runs it, and its words there."""


def commands(path: Path) -> list[tuple[str, bool]]:
    """The commands of a document, joined over their lines, and whether each is marked."""
    found = []
    for block in re.split(r"\n(?=#)", path.read_text(encoding="utf-8")):
        for paragraph in re.split(r"\n\s*\n(?=\S)", block):
            lines = re.sub(r"\\\n\s*", "", paragraph)
            lines = re.sub(r"('\{[^']*)\n\s*", r"\1", lines)  # JSON over several lines
            spans = re.findall(rf"^(?:    |\t|\$ )?({PROGRAMS}.*)$", lines, re.MULTILINE)
            spans += re.findall(rf"`({PROGRAMS}[^`\n]*)`", lines)
            marked = bool(MARK.search(paragraph) or MARK.search(block.partition("\n    ")[0]))
            found += [(span.strip(), marked) for span in spans]
    return found


ALL = [
    pytest.param(path, command, marked, id=f"{path.name}: {command[:60]}")
    for path in DOCUMENTS
    for command, marked in commands(path)
]


def test_commands_are_found():
    words = {param.values[1].split()[0] for param in ALL}
    assert {"make", "vllm", "boe-vllm", "python", "lm_eval"} <= words and len(ALL) > 30


@pytest.mark.parametrize("path, command, marked", ALL)
def test_a_command_is_run_somewhere_or_marked(path, command, marked):
    if "GSAI-ML/" in command:
        assert marked, "a checkpoint that was not at hand: say that it is unverified"
        return
    places = [place for pattern, place in RUN_BY.items() if re.match(pattern, command)]
    assert places, "name the test that runs it in RUN_BY"


@pytest.mark.parametrize("place", sorted(set(RUN_BY.values())))
def test_what_runs_a_command_exists(place):
    file, _, words = place.partition("::")
    assert words in (ROOT / file).read_text(encoding="utf-8")


# ---- commands that no other test runs ------------------------------------------------------------


def run(arguments: list[str], **environment: str) -> str:
    done = subprocess.run(
        arguments, capture_output=True, text=True, cwd=ROOT, env=os.environ | environment
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def of_document(pattern: str, results: Path, document: str = "docs/evaluation.md") -> list[str]:
    """The arguments of a document's only command of this kind, with its results elsewhere."""
    (command,) = [text for text, _ in commands(ROOT / document) if re.match(pattern, text)]
    program, *rest = shlex.split(command.replace("results/", f"{results}/"))
    return [str(BIN / program), *rest]


@pytest.mark.slow
def test_the_tables_commands_run(tmp_path):
    """In a short form: a few items of two policies."""
    scorer = of_document(r"python examples/train_scorer.py", tmp_path)
    run([*scorer, "--steps", "2", "--width", "32", "--layers", "1"])
    short = ["--policies", "confidence,boe", "--tasks", "sudoku6-few", "--limit", "2"]

    def table(name: str) -> str:
        command = of_document(rf"boe-vllm eval --model tiny --{name} ", tmp_path)
        return run([*command, *short], OMP_NUM_THREADS="1")

    with ThreadPoolExecutor(2) as pool:
        names = ("table 2", "table 4", "table 5", "figure 4")
        assert all("confidence" in printed for printed in pool.map(table, names))
    for name in ("table2", "table4", "table5", "figure4"):
        assert (tmp_path / name / "tables.md").exists()


@pytest.mark.slow
def test_the_soak_runs(shared_server):
    """Its answers, not its times: those are for a machine that does nothing else."""
    short = ["--seconds", "4", "--clients", "4", "--kinds", "4", "--slack", "1e6", "--growth", "9"]
    where = ["--base-url", f"{shared_server}/v1", "--pid", str(shared_server.process.pid)]
    printed = run([sys.executable, "examples/soak.py", *short, *where])
    result = json.loads(printed.splitlines()[-1])
    assert result["ok"] and result["answered"] > 0 and not any(result["failures"].values())


@pytest.mark.slow
def test_a_request_passes_the_modules_that_the_document_lists():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text.partition("## What a request passes")[2]
    listed = {
        f"{room}.{module}"
        for room, modules in re.findall(r"^\| `(\w+)` \| (.*) \|$", table, re.MULTILINE)
        for module, policy in re.findall(r"`(\w+)`(?: \((\w+)\))?", modules)
        if policy in ("", "boe")
    }
    *passed, total = run([sys.executable, "scripts/modules_passed.py", "boe"]).splitlines()
    assert total == f"{len(listed)} modules"
    assert set(passed[-len(listed) :]) == listed


@pytest.mark.slow
def test_the_throughput_example_runs():
    short = ["--requests", "4", "--rounds", "1", "--policy", "boe:rho=0.5"]
    printed = run([sys.executable, "examples/throughput.py", *short])
    result = json.loads(printed.splitlines()[-1])
    ours, loop = result["contestants"]
    assert result["tokens"] == 4 * 36 and loop["name"] == "loop on tiny"
    assert result["ratio"] == pytest.approx(ours["tokens_per_second"] / loop["tokens_per_second"])
    assert loop["forwards"] == 36 / 4 and loop["backwards"] == 0 < ours["rows_forward"]


RANDOM = ["--dataset-name", "random", "--random-input-len", "16", "--random-output-len", "32"]


@pytest.mark.slow
def test_vllms_throughput_benchmark_runs():
    command = [str(BIN / "vllm"), "bench", "throughput", "--model", boe_vllm.tiny_model_path()]
    command += ["--sampler", "boe", "--sampler-config", '{"tokens_per_step": 4}']
    printed = run([*command, *RANDOM, "--num-prompts", "4", "--max-model-len", "128"])
    assert "Throughput: " in printed and "Total num output tokens:  128" in printed


@pytest.mark.slow
def test_vllms_serving_benchmark_runs(shared_server):
    command = [str(BIN / "vllm"), "bench", "serve", "--model", shared_server.model]
    command += ["--base-url", str(shared_server), "--ignore-eos", "--num-prompts", "4"]
    fields = {"vllm_xargs": {"policy": "boe", "tokens_per_step": 4}}
    printed = run([*command, *RANDOM, "--extra-body", json.dumps(fields)])
    assert re.search(r"Successful requests: +4\b", printed)
    assert re.search(r"Total generated tokens: +128\b", printed)


def snippet(words: str) -> str:
    """The indented piece of Python in the README that contains some words."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pieces = re.findall(r"(?:^    .*\n|^\n(?=    ))+", text, re.MULTILINE)
    (found,) = [piece for piece in pieces if words in piece]
    return textwrap.dedent(found)


@pytest.mark.slow
def test_the_readmes_request_runs(shared_server, capsys):
    code = snippet("client.completions.create(")
    exec(code.replace("http://localhost:8000", str(shared_server)), {})
    serving = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    told = set(re.findall(r"`(\w+)`", serving.partition("has cost")[2].partition("##")[0]))
    printed = capsys.readouterr().out
    report = ast.literal_eval(printed[printed.index("{") :])
    assert {"backwards", "rows_forward"} <= set(report) <= told


@pytest.mark.slow
def test_the_readmes_offline_snippet_runs():
    code = snippet("outputs = llm.generate(")
    printed = run([sys.executable, "-c", code + "\nprint(len(outputs), 'answers')"])
    assert "2 answers\n" in printed


def test_the_readmes_notebook_snippet_runs(capsys):
    exec(snippet("d = Denoiser.from_pretrained("), {})
    assert re.match(r"[1-4]{16} \{'denoising_steps': 4, ", capsys.readouterr().out)
