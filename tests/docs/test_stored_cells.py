"""The front page's shares are what its command prints from the stored cells, as they are now."""

import re
from pathlib import Path

import pytest

from boe_vllm.lab.eval.run import main

ROOT = Path(__file__).parents[2]
CELLS = ROOT / "docs" / "results" / "policies.jsonl"
LINES = {"6x6 Sudokus with 6 clues": "sudoku6-few", "6x6 Sudokus with one answer": "sudoku6"}


@pytest.fixture(scope="module")
def printed():
    """What the cells that still hold, of today's settings, add up to."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()) as text:
        assert main(["--contest", "--cells", str(CELLS), "--no-run"]) == 0
    return text.getvalue()


@pytest.mark.parametrize("line", LINES)
def test_the_front_pages_shares_are_printed(printed, line):
    readme = (ROOT / "README.md").read_text()
    (row,) = re.findall(rf"^\| {line}, 4 tokens a step, .*$", readme, re.MULTILINE)
    shares = re.findall(r"([\d.]+) %", row)
    for policy, share in zip(("confidence", "boe", "joint"), shares, strict=True):
        assert f"| {LINES[line]} | {policy} | 36 | 4 | 500 | {share} |" in printed
