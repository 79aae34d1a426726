"""`boe-vllm plot`: figures of a run of `boe-vllm eval`, finished or not."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from boe_vllm.lab.pictures.packages import require
from boe_vllm.lab.pictures.results import Results, read


def parser() -> argparse.ArgumentParser:
    """All options."""
    made = argparse.ArgumentParser(
        prog="boe-vllm plot",
        description="Draw a run of boe-vllm eval, finished or not: score against cost where "
        "policies ran at several rates, otherwise scores and times as bars. PNG and SVG.",
    )
    made.add_argument("folder", type=Path, metavar="DIR", help="the run's --out")
    made.add_argument("--out", type=Path, metavar="FOLDER", help="default: the run's own")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 2 for arguments that do not fit, with a line that says why."""
    args = parser().parse_args(argv)
    try:
        require("matplotlib")
        out = args.folder if args.out is None else args.out
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out: expected a folder, got the file {out}; name another")
        for path in draw(read(args.folder), out):
            print(path)
    except ValueError as error:
        print(f"boe-vllm plot: {error}", file=sys.stderr)
        return 2
    return 0


def draw(results: Results, out: Path) -> list[Path]:
    """Write the figures that the run has the numbers for; returns their paths.

    Raises:
        ValueError: for a run without a score or a time.
    """
    from boe_vllm.lab.pictures import bars, curves, figure

    judged = {
        title: [row for row in rows if row["score"] is not None]
        for title, rows in results.panels.items()
    }
    judged = {title: rows for title, rows in judged.items() if rows}
    figures = {}
    if judged and results.swept:
        for cost, name in (("forwards", "score-nfe"), ("rows", "score-rows")):
            figures[name] = curves.draw(judged, cost)
    elif judged:
        figures["scores"] = bars.draw_scores(judged)
    if not results.swept and any(row["seconds"] for row in results.rows):
        figures["times"] = bars.draw_times(results.panels, shared=not results.one_by_one)
    if not figures:
        raise ValueError("DIR: expected a run with scores or times, got neither; nothing to draw")
    if not results.finished:
        for made in figures.values():
            done = sum(row["n"] for row in results.rows)
            made.suptitle(f"unfinished run: {done} items so far", fontsize=9, color="#b00020")
    return [path for name, made in figures.items() for path in figure.save(made, out, name)]
