"""Pareto fronts: nobody on one is beaten, and settings are chosen on other items than they are
reported on."""

import dataclasses
import itertools
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from boe_vllm.lab.eval.cell_file import CellFile, FinishedCell
from boe_vllm.lab.eval.presets import own_rate
from boe_vllm.lab.pictures import fronts, plot


def cell(label, right, passes, rows, *, task="t", rate=1, n=100):
    return FinishedCell(
        task=task, contestant=label, tokens_per_step=rate, valid=[i < right for i in range(n)],
        steps=passes, forwards=passes - 1, backwards=1.0, rows=rows, seconds=0.0,
    )  # fmt: skip


CELLS = [
    cell("confidence", 90, 36, 360),
    cell("confidence", 20, 18, 180, rate=2),
    cell("eb:gamma=0.1", 80, 12, 120),
    cell("eb:gamma=0.01", 89, 16, 160),
    cell("joint:commit=rounds", 88, 17, 100),
    cell("joint:commit=rounds:trust=9", 70, 17, 80),
]


def test_a_front_is_what_no_other_beats():
    rng = np.random.default_rng(0)
    for _ in range(50):
        cells = [
            cell(f"p{i}:x={i}", int(rng.integers(0, 9)), int(rng.integers(2, 9)), 1.0)
            for i in range(12)
        ]
        own = fronts.points(cells)
        best = fronts.front(own, "passes")

        def beats(a, b):
            better = a.share >= b.share and a.passes <= b.passes
            return better and (a.share, a.passes) != (b.share, b.passes)

        for point in own:
            beaten = any(beats(other, point) for other in own)
            twin = any(p.share == point.share and p.passes == point.passes for p in best)
            assert twin is not beaten
        for a, b in itertools.pairwise(best):
            assert a.passes < b.passes and a.share < b.share


def test_points_are_named_and_the_newest_cell_counts():
    found = fronts.points([cell("eb:gamma=0.1", 1, 1, 1), *CELLS])
    assert [p.label for p in found if p.policy == "confidence"] == [
        "confidence, 1 a step",
        "confidence, 2 a step",
    ]
    (eb,) = [p for p in found if p.label == "eb:gamma=0.1"]
    assert (eb.share, eb.passes, eb.rows) == (0.8, 12, 120)


def test_a_setting_is_the_cheapest_that_is_nearly_as_good_as_one_token_a_step():
    chosen = fronts.choose(fronts.points(CELLS), "rows")
    assert chosen["t", "eb"] == "eb:gamma=0.01"
    assert chosen["t", "joint"] == "joint:commit=rounds"  # 0.88 of 0.90; trust=9 is cheaper
    assert chosen["t", "confidence"] == "confidence, 1 a step"
    # Where none is, the best counts.
    lower = [dataclasses.replace(c, valid=[False] * 90 + c.valid[90:]) for c in CELLS[2:3]]
    assert fronts.choose(fronts.points([*CELLS[:1], *lower]), "rows")["t", "eb"] == "eb:gamma=0.1"


def test_the_table_marks_fronts_choices_and_pairs():
    own = fronts.points(CELLS)
    rows = {row["policy"]: row for row in fronts.table(own, {("t", "eb"): "eb:gamma=0.1"})}
    assert rows["joint:commit=rounds"]["front"].startswith("rows")
    assert rows["confidence, 1 a step"]["front"] == "passes, rows, ms-1, ms-25"
    assert rows["eb:gamma=0.1"]["chosen"] == "yes" and not rows["eb:gamma=0.01"]["chosen"]
    assert rows["eb:gamma=0.1"]["p, one a step"] == "0.002"
    assert "chosen" not in fronts.table(own)[0]


def test_the_command_draws_all_fronts(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file = CellFile(tmp_path / "cells.jsonl")
    for one in CELLS:
        file.append(one)
    path, out = str(tmp_path / "cells.jsonl"), tmp_path / "out"
    assert plot.main(["--cells", path, "--chosen-on", path, "--out", str(out)]) == 0
    assert {f.name for f in out.iterdir()} == {
        f"front-{cost}.{kind}"
        for cost in ("passes", "rows", "ms-1", "ms-25")
        for kind in ("png", "svg")
    }
    printed = capsys.readouterr().out
    assert "| eb:gamma=0.01 |" in printed and fronts.TAKEN_IN in printed
    axis = fronts.draw(fronts.points(CELLS), "rows").axes[0]
    line = axis.lines[0]
    assert line.get_label() == "front" and list(line.get_xdata()) == [80, 100, 160, 360]


def test_what_no_time_can_be_predicted_for_is_left_out(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file = CellFile(tmp_path / "cells.jsonl")
    unknown = cell("of another package", 50, 9, 90)
    for one in (*CELLS[1:], unknown):  # without one token a step
        file.append(one)
    path, out = str(tmp_path / "cells.jsonl"), tmp_path / "out"
    assert plot.main(["--cells", path, "--out", str(out)]) == 0
    assert "front-ms-25: not drawn, no cell has it" in capsys.readouterr().out
    assert not list(out.glob("front-ms*"))
    own = fronts.points([*CELLS, unknown])
    rows = {row["policy"]: row for row in fronts.table(own)}
    assert rows["of another package"]["ms-1"] == "-" != rows["eb:gamma=0.1"]["ms-1"]
    with pytest.raises(ValueError, match="cost: expected one that some point has, got 'ms-1'"):
        fronts.draw(fronts.points([unknown]), "ms-1")


def test_what_the_command_cannot_draw_is_named(tmp_path, capsys):
    for argv in (["--cells", "x"], [], [str(tmp_path), "--cells", "x", "--out", "y"]):
        assert plot.main(argv) == 2
        assert "--cells FILE with --out FOLDER" in capsys.readouterr().err
    none = str(tmp_path / "none.jsonl")
    assert plot.main(["--cells", none, "--out", str(tmp_path)]) == 2
    assert "expected finished cells, got none" in capsys.readouterr().err


def test_a_bound_decides_its_own_rate():
    assert own_rate({"policy": "eb"}) and own_rate({"policy": "joint", "commit": "rounds"})
    assert not own_rate({"policy": "joint"}) and not own_rate({"policy": "confidence"})


def test_the_example_meets_each_share_of_the_rivals(tmp_path, monkeypatch, capsys):
    """By the cheapest setting that reached it on the choosing items, reported on the others."""
    chosen = [*CELLS, cell("joint:commit=drafts", 89, 9, 400), cell("eb:gamma=9", 10, 1, 10)]
    reported = [dataclasses.replace(one, valid=one.valid[::-1]) for one in chosen]
    for name, cells in (("chosen", chosen), ("reported", reported)):
        file = CellFile(tmp_path / f"{name}.jsonl")
        for one in cells:
            file.append(one)
    files = ["--cells", tmp_path / "reported.jsonl", "--chosen-on", tmp_path / "chosen.jsonl"]
    example = Path(__file__).parents[2] / "examples" / "match_fronts.py"

    def table(*options):
        monkeypatch.setattr(sys, "argv", [str(example), *map(str, files), *options])
        runpy.run_path(str(example), run_name="__main__")
        printed = capsys.readouterr().out
        rows = [line.strip("| ").split(" | ") for line in printed.splitlines()]
        return [row[1:] for row in rows[2:]]

    rows = table("--rivals", "eb", "--cost", "rows", "--passes", "1.1", "--least", "0.5")
    assert rows == [
        [
            "eb:gamma=0.1",
            "0.800",
            "12.00",
            "joint:commit=drafts",
            "0.890",
            "0.0039",
            "0.75",
            "3.33",
        ],
        ["eb:gamma=0.01", "0.890", "16.00", "joint:commit=drafts", "0.890", "1", "0.56", "2.50"],
    ]
    (row,) = table("--rivals", "eb", "--cost", "rows", "--passes", "1.1", "--within", "0.01")
    assert row[3:] == ["joint:commit=rounds", "0.880", "1", "1.06", "0.62"]
    (row,) = table("--rivals", "confidence", "--cost", "passes")
    assert row[0] == "confidence, 1 a step" and row[3] == "none"
