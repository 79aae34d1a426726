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
    made.add_argument("folder", type=Path, nargs="?", metavar="DIR", help="the run's --out")
    made.add_argument(
        "--cells",
        type=Path,
        metavar="FILE",
        help="instead of DIR: finished cells, as Pareto fronts",
    )
    made.add_argument(
        "--chosen-on",
        type=Path,
        metavar="FILE",
        help="cells on other items, by which each policy's setting is chosen",
    )
    made.add_argument("--out", type=Path, metavar="FOLDER", help="default: the run's own")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 2 for arguments that do not fit, with a line that says why."""
    args = parser().parse_args(argv)
    try:
        require("matplotlib")
        if args.cells is not None or args.folder is None:
            return _fronts(args)
        out = args.folder if args.out is None else args.out
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out: expected a folder, got the file {out}; name another")
        for path in draw(read(args.folder), out):
            print(path)
    except ValueError as error:
        print(f"boe-vllm plot: {error}", file=sys.stderr)
        return 2
    return 0


def _fronts(args: argparse.Namespace) -> int:
    """Print the table of a file of cells and draw its fronts."""
    if args.cells is None or args.folder is not None or args.out is None:
        raise ValueError(
            "--cells: expected a run's folder DIR, or --cells FILE with --out FOLDER, got neither "
            "or both; name one"
        )
    from boe_vllm.lab.eval.cell_file import CellFile
    from boe_vllm.lab.eval.tables import to_markdown
    from boe_vllm.lab.pictures import figure, fronts

    own = fronts.points(CellFile(args.cells).cells)
    if not own:
        raise ValueError(f"--cells: expected finished cells, got none in {args.cells}; run some")
    chosen = None
    if args.chosen_on is not None:
        chosen = fronts.choose(fronts.points(CellFile(args.chosen_on).cells), "rows")
    print(to_markdown(fronts.table(own, chosen)))
    print(f"\n{fronts.TAKEN_IN}\n")
    for cost in fronts.COSTS:
        if not any(cost in point.costs for point in own):
            print(f"front-{cost}: not drawn, no cell has it")
            continue
        for path in figure.save(fronts.draw(own, cost), args.out, f"front-{cost}"):
            print(path)
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
