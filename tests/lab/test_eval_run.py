"""`boe-vllm eval` as people run it: a real sweep in one engine, killed and continued."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_benchmarks import RECORDS, write

pytestmark = pytest.mark.slow
PER_CELL = 12
# Few requests at a time, so that items finish one after the other.
SWEEP = [
    *("--model", "tiny", "--tasks", "sudoku4,countdown,humaneval", "--limit", str(PER_CELL)),
    *("--policies", "confidence,boe:rho=0.5:bypass=null,random", "--tokens-per-step", "1,2"),
    *("--temperature", "0.7", "--seed", "3", "--set", "schedule=cosine", "--trace"),
    *("--gen-length", "16", "--engine-args", '{"max_num_seqs": 4}'),
]
CELLS = 3 * 3 * 2


def start(out: Path, data: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "boe_vllm.lab.eval", *SWEEP, "--data", str(data)]
    return subprocess.Popen(
        [*command, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> str:
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0, text[-3000:]
    return text


def lines(out: Path) -> list[str]:
    file = out / "items.jsonl"
    return file.read_text().split("\n")[:-1] if file.exists() else []


def timeless(out: Path) -> list[dict]:
    return [{k: v for k, v in json.loads(line).items() if k != "times"} for line in lines(out)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write("humaneval", folder, [RECORDS["humaneval"] | {"entry_point": f"f{n}"} for n in range(12)])
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """A run that nobody disturbed, and what it printed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, finish(start(out, data))


def test_a_run_writes_every_item_once_and_its_tables(whole):
    out, printed = whole
    records = [json.loads(line) for line in lines(out)]
    keys = [(record["cell"], record["index"]) for record in records]
    assert len(set(keys)) == len(keys) == CELLS * PER_CELL
    with (out / "cells.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == CELLS and {row["n"] for row in rows} == {str(PER_CELL)}
    for row in rows:
        prefix = f"{row['task']}/{row['policy']}/16/{row['tokens_per_step']}"
        own = [record for record in records if record["cell"] == prefix]
        assert float(row["score"]) == sum(record["valid"] for record in own) / PER_CELL
        assert float(row["seconds"]) > 0 and float(row["forwards"]) > 0
        assert (float(row["backwards"]) > 0) == row["policy"].startswith("boe")
        for record in own:
            trace = record["trace"]
            assert len(trace["step"]) == len(trace["token"]) >= record["tokens"] > 0
            assert record["prompt"] and record["answer"]
    tables = (out / "tables.md").read_text()
    assert tables in printed and "--tasks sudoku4,countdown,humaneval" in tables
    assert "95 % interval" in tables and "vllm" in tables and "torch" in tables
    assert f"{CELLS * PER_CELL}/{CELLS * PER_CELL}" in printed  # the progress bar


def test_a_killed_run_continues_to_the_same_files(whole, data, tmp_path):
    out = tmp_path / "run"
    process = start(out, data)
    while len(lines(out)) < CELLS * PER_CELL // 3 and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    before = lines(out)
    assert CELLS * PER_CELL // 3 <= len(before) < CELLS * PER_CELL

    finish(start(out, data))
    assert timeless(out) == timeless(whole[0])
    kept = {line for line in lines(out) if json.loads(line)["times"]["session"] == 1}
    assert kept == set(before)  # nothing was done twice

    def table(folder):
        with (folder / "cells.csv").open() as file:
            times = ("seconds", "tokens_per_second")
            return [
                {k: v for k, v in row.items() if k not in times} for row in csv.DictReader(file)
            ]

    assert table(out) == table(whole[0])
    assert (out / "run.json").read_text() == (whole[0] / "run.json").read_text()


def test_a_finished_run_is_not_run_again_and_another_is_refused(whole, data):
    out, _ = whole
    before = {name: (out / name).read_bytes() for name in ("items.jsonl", "cells.csv", "run.json")}
    finish(start(out, data))
    assert before == {name: (out / name).read_bytes() for name in before}
    process = subprocess.run(
        [sys.executable, "-m", "boe_vllm.lab.eval", *SWEEP, "--seed", "4", "--data", str(data)]
        + ["--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 2
    assert "whose seed is 3 and not 4; name another --out" in process.stderr
    assert before == {name: (out / name).read_bytes() for name in before}
