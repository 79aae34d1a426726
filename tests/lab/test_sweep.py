"""A sweep in this process: the engine's answers, finished cells kept, policies paired by item."""

import json

import pytest

from boe_vllm.lab.eval import arguments, main
from boe_vllm.lab.eval.cell_file import CellFile, FinishedCell, digest_of, key_of
from boe_vllm.lab.eval.cells import make_cells
from boe_vllm.lab.eval.in_process import InProcess
from boe_vllm.lab.eval.pairs import compare
from boe_vllm.lab.eval.presets import OWN_RATE, RIVALS, contest
from boe_vllm.lab.eval.prompts import Prompts
from boe_vllm.lab.eval.statistics import mcnemar
from boe_vllm.lab.eval.sweep import Sweep
from boe_vllm.lab.tasks import TASKS
from boe_vllm.policies import POLICY_NAMES


def settings(*argv):
    return arguments.read(arguments.parser().parse_args([*argv, "--out", "unused"]))


# ---- pairs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 2 / 32), (8, 2, 2 * (1 + 10 + 45) / 1024), (3, 3, 1.0)],
)
def test_mcnemar_is_the_binomial_test_of_the_items_that_differ(wins, losses, p):
    first = [True] * wins + [False] * losses + [True, False]
    second = [False] * wins + [True] * losses + [True, False]
    assert mcnemar(first, second) == (wins, losses, pytest.approx(p))
    assert mcnemar(second, first)[2] == pytest.approx(p)


def test_a_policy_is_compared_with_its_rivals_where_both_have_run():
    made = settings("--tasks", "sudoku4,countdown", "--policies", "boe,random,eb")
    cells = make_cells(made, {name: TASKS[name] for name in made.tasks})
    rows = [
        {"task": c.task, "policy": c.label, "tokens_per_step": 1, "score": 0.5}
        | {"rows": 100.0 * (1 + n), "passes": 10.0}
        for n, c in enumerate(cells)
    ]
    outcomes = {cell.key: [cell.label == "boe", True] for cell in cells}
    del outcomes[cells[-1].key]
    compared = compare(cells, rows, outcomes, "boe", ["random", "eb", "absent"])
    assert [(row["task"], row["rival"]) for row in compared] == [
        *(("sudoku4", "random"), ("sudoku4", "eb"), ("countdown", "random")),
    ]
    assert (compared[0]["wins"], compared[0]["losses"], compared[0]["p"]) == (1, 0, 1.0)
    assert compared[0]["rows ratio"] == 0.5 and compared[0]["passes ratio"] == 1


# ---- the contest -------------------------------------------------------------------------------


def test_the_contest_has_every_policy_on_every_bundled_task():
    preset = contest()
    assert preset.tasks == tuple(TASKS)
    labels = [variant.label for variant in preset.variants]
    assert set(POLICY_NAMES) <= set(labels) and len(set(labels)) == len(labels)
    assert "boe paper" in labels
    short = settings("--contest", "--policies", "boe,confidence,eb", "--tokens-per-step", "2,4")
    assert (short.paired, short.against) == ("boe", ("confidence",))
    assert short.whole_canvas and short.one_by_one and short.tokens_per_step == (2, 4)
    cells = make_cells(short, {"sudoku4": TASKS["sudoku4"]})
    assert len(cells) == 5 and OWN_RATE.isdisjoint(RIVALS)  # `eb` decides its rate: one cell
    assert settings("--contest", "--policies", "random").paired is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tasks", "sudoku4"], "--out: expected a folder, or --cells FILE, got neither"),
        (["--contest", "--cells", "x", "--against", "boe"], "--against: expected --paired"),
        (
            ["--contest", "--cells", "x", "--policies", "boe", "--paired", "random"],
            "--paired: expected one of the policies that are run (boe), got 'random'",
        ),
        (
            ["--contest", "--cells", "x", "--policies", "boe", "--no-run"],
            "--no-run: expected finished cells or items, got none",
        ),
        (
            ["--tasks", "sudoku4", "--cells", "x", "--in-process", "--engine-args", '{"a": 1}'],
            "--engine-args: expected none beside --in-process",
        ),
    ],
)
def test_bad_arguments_are_named(argv, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ---- finished cells ----------------------------------------------------------------------------


def finished(**fields):
    usual = {"task": "sudoku4", "contestant": "random", "tokens_per_step": 1, "valid": [True]}
    costs = dict.fromkeys(("steps", "forwards", "backwards", "rows", "seconds"), 1.0)
    return FinishedCell(**(usual | costs | fields))


def test_right_items_are_ones_and_zeros_and_were_a_list_once(tmp_path):
    path = tmp_path / "cells.jsonl"
    CellFile(path).append(finished(valid=[True, False, True]))
    assert json.loads(path.read_text())["valid"] == "101"
    path.write_text(path.read_text().replace('"101"', "[true, false, true]"))
    (cell,) = CellFile(path).cells
    assert cell.valid == [True, False, True]


def test_a_file_of_cells_is_read_by_key_digest_and_number_of_items(tmp_path):
    path = tmp_path / "cells.jsonl"
    (cell,) = make_cells(
        settings("--tasks", "sudoku4", "--policies", "random"), {"sudoku4": TASKS["sudoku4"]}
    )
    file = CellFile(path)
    assert file.find(cell, "d", 1) is None
    file.append(finished(of="other"))
    file.append(finished(of="d", steps=2.0))
    file.append(finished(of="d", valid=[True, False]))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"task": "sud')  # from a run that was killed
    again = CellFile(path)
    assert path.read_bytes() == whole
    assert again.find(cell, "d", 1).steps == 2.0 and again.find(cell, "e", 1) is None
    assert again.find(cell, "d", 2).valid == [True, False]
    plain = {k: v for k, v in json.loads(whole.splitlines()[0]).items() if k != "of"}
    path.write_text(json.dumps(plain) + "\n")
    assert CellFile(path).find(cell, "d", 1).of is None  # a line without a digest is taken as it is
    path.write_text("{}\n")
    with pytest.raises(ValueError, match=r"--cells: expected a finished cell in .*:1, got '\{\}'"):
        CellFile(path)


def test_a_digest_changes_with_what_the_numbers_depend_on():
    def digest(*argv, checkpoint="c"):
        made = settings("--tasks", "sudoku4", "--policies", "boe", *argv)
        (cell,) = make_cells(made, {"sudoku4": TASKS["sudoku4"]})
        return digest_of(made, checkpoint, cell)

    same = [digest(), digest("--trace"), digest("--one-by-one"), digest("--limit", "7")]
    assert len(set(same)) == 1
    others = [
        ("--seed", "1"),
        ("--temperature", "1"),
        ("--set", "cfg_scale=1"),
        ("--whole-canvas",),
    ]
    others += [("--policies", "boe:rho=0.5"), ("--gen-length", "32"), ("--tokens-per-step", "2")]
    digests = {*same, digest(checkpoint="d"), *(digest(*other) for other in others)}
    assert len(digests) == 2 + len(others)


def test_a_policy_of_its_own_rate_has_one_key():
    made = settings("--tasks", "sudoku4", "--policies", "eb,random", "--tokens-per-step", "4")
    cells = make_cells(made, {"sudoku4": TASKS["sudoku4"]})
    assert [key_of(cell)[1:] for cell in cells] == [("eb", 1), ("random", 4)]
    assert [cell.tokens_per_step for cell in cells] == [1, 4]  # what is decoded is what is noted


# ---- in this process -----------------------------------------------------------------------------


def test_a_contest_is_run_once_per_cell_and_summed_up(tmp_path, capsys):
    cells = tmp_path / "cells.jsonl"
    command = ["--contest", "--in-process", "--cells", str(cells), "--limit", "6"]
    command += ["--tasks", "sudoku4,sudoku4-few", "--tokens-per-step", "4"]
    command += ["--policies", "confidence,boe,threshold,pc"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    lines = [json.loads(line) for line in cells.read_text().splitlines()]
    assert [(line["task"], line["contestant"]) for line in lines] == [
        (task, name)
        for task in ("sudoku4", "sudoku4-few")
        for name in ("confidence", "boe", "threshold", "pc")
    ]
    assert all(len(line["valid"]) == 6 and line["of"] for line in lines)
    assert lines[0]["steps"] == lines[0]["forwards"] == 16 / 4
    assert "| sudoku4-few | 4 | boe | confidence |" in printed
    assert "| sudoku4 | threshold | 16 | own | 6 |" in printed

    def tables(text):
        return [line for line in text.splitlines() if line.startswith("|")]

    written = cells.read_text()
    assert main(command) == 0
    assert cells.read_text() == written  # nothing was run again
    again = tables(capsys.readouterr().out)
    assert again[:4] == tables(printed)[:4]  # the paired table
    summed = [*command, "--no-run", "--tasks", "sudoku4,sudoku4-few,addition"]
    assert main(summed) == 0
    assert cells.read_text() == written
    assert tables(capsys.readouterr().out) == again


def test_whole_canvases_cost_every_step_and_say_the_same():
    fields = ("--tasks", "addition", "--policies", "confidence", "--limit", "4")
    sweeps = [
        Sweep(settings(*fields, *more, "--tokens-per-step", "4"), CellFile(None))
        for more in ((), ("--whole-canvas",))
    ]
    short, whole = (
        sorted(
            InProcess(sweep.settings, sweep.tasks).run(
                sweep.jobs(NO_LEDGER), Prompts(sweep.settings, sweep.tasks)
            ),
            key=lambda answer: answer.job.index,
        )
        for sweep in sweeps
    )
    for one, other in zip(short, whole, strict=True):
        assert one.text == other.text
        assert other.report["denoising_steps"] == 32 / 4 >= one.report["denoising_steps"]
        assert len(other.token_ids) == 32 >= len(one.token_ids)
        assert one.finish_reason == "stop" and other.finish_reason == "length"


class NoLedger:
    records: dict = {}


NO_LEDGER = NoLedger()
SAME = ["--tasks", "sudoku4,addition,countdown", "--limit", "5", "--tokens-per-step", "2"]
SAME += ["--policies", "confidence,confidence:cache=dual:block_length=4,boe,random,remdm"]
SAME += ["--temperature", "0.7", "--trace"]


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--whole-canvas",)])
def test_both_backends_give_the_same_answers_at_the_same_cost(more, tmp_path):
    records = []
    for backend in ((), ("--in-process",)):
        out = tmp_path / f"run{len(records)}"
        assert main([*SAME, *more, *backend, "--out", str(out)]) == 0
        lines = (out / "items.jsonl").read_text().split("\n")[:-1]
        records.append([json.loads(line) for line in lines])
    timeless = [[{**record, "times": None} for record in run] for run in records]
    assert timeless[0] == timeless[1]
