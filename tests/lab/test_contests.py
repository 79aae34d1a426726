"""Policies are compared on the same items, with exact tests, and cells are not run twice."""

import json

import pytest
from test_bench import bench

from boe_vllm.lab.bench.paired import mcnemar


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 2 / 32), (8, 2, 2 * (1 + 10 + 45) / 1024), (3, 3, 1.0)],
)
def test_mcnemar_is_the_binomial_test_of_the_items_that_differ(wins, losses, p):
    first = [True] * wins + [False] * losses + [True, False]
    second = [False] * wins + [True] * losses + [True, False]
    assert mcnemar(first, second) == (wins, losses, pytest.approx(p))
    assert mcnemar(second, first)[2] == pytest.approx(p)


def test_policies_run_once_per_cell_and_sum_up(tmp_path):
    cells = tmp_path / "cells.jsonl"
    arguments = ["policies", "--items", "6", "--tasks", "sudoku4,sudoku4-few", "--threads", "1"]
    arguments += ["--budgets", "4", "--policies", "confidence,boe,threshold,pc"]
    arguments += ["--cells", str(cells)]
    result = bench(*arguments)
    rows = result["details"]["cells"]
    assert {(row["task"], row["policy"]) for row in rows} == {
        (task, name)
        for task in ("sudoku4", "sudoku4-few")
        for name in ("confidence", "boe", "threshold", "pc")
    }
    assert all(row["low"] <= row["share"] <= row["high"] for row in rows)
    plain = {row["task"]: row for row in rows if row["policy"] == "confidence"}
    assert plain["sudoku4"]["steps"] == plain["sudoku4"]["forwards"] == 16 / 4
    (compared,) = [row for row in result["details"]["comparisons"] if row["task"] == "sudoku4-few"]
    assert compared["rival"] == "confidence" and compared["rows ratio"] > 1
    written = cells.read_text()
    assert len(written.splitlines()) == len(rows)
    again = bench(*arguments)
    assert cells.read_text() == written
    assert again["details"] == result["details"]
    assert json.loads(written.splitlines()[0])["task"] == "sudoku4"
    summed = bench(*arguments, "--no-run", "--tasks", "sudoku4,sudoku4-few,addition")
    assert cells.read_text() == written
    assert summed["details"] == result["details"]
