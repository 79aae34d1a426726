"""What a policy needs to reach each share that its rivals reach at their best settings.

    python examples/match_fronts.py --cells docs/results/fronts.jsonl \
        --chosen-on docs/results/fronts-selection.jsonl \
        --policy joint --rivals eb,threshold --cost rows --passes 1.05

Settings are chosen on one file of cells and reported from the other, which has other items. Of the
rivals' settings, those on their common front by the cost are kept where they reach `--least` of the
share of one token a step. Each is met by the policy's cheapest setting that reaches its share there
(or `--within` less, and with at most `--passes` times its passes). The table has both on the
reported items: shares, the exact McNemar p, and the ratios of passes and rows. Where no setting of
the policy reaches the share on the choosing items, the line says so.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from boe_vllm.lab.eval.cell_file import CellFile
from boe_vllm.lab.eval.statistics import mcnemar
from boe_vllm.lab.pictures.fronts import SEQUENTIAL, Point, front, points

Named = dict[tuple[str, str], Point]


def by_name(path: Path) -> Named:
    """The points of a file, by task and label."""
    return {(p.task, p.label): p for p in points(CellFile(path).cells)}


def rivals_of(chosen: Sequence[Point], names: Sequence[str], own: str, args: argparse.Namespace):
    """The rivals' settings that are on their common front and good enough."""
    one = next(p for p in chosen if p.label == f"{SEQUENTIAL}, 1 a step")
    wanted = [p for p in chosen if p.policy in names or (not names and p.policy not in own)]
    return [p for p in front(wanted, args.cost) if p.share >= args.least * one.share]


def answer_to(
    rival: Point, chosen: Sequence[Point], reported: Named, args: argparse.Namespace
) -> Point | None:
    """The policy's cheapest setting that reaches a rival's share on the choosing items."""
    enough = [
        p
        for p in chosen
        if p.policy == args.policy
        and (p.task, p.label) in reported
        and p.share >= rival.share - args.within
        and p.passes <= args.passes * rival.passes
        and all(word in p.label for word in args.having)
    ]
    return min(enough, key=lambda p: p.cost(args.cost), default=None)


def lines(args: argparse.Namespace):
    """One row of the table for each task and setting of a rival."""
    chosen, reported = by_name(args.chosen_on), by_name(args.cells)
    for task in dict.fromkeys(task for task, _ in reported):
        own = [p for p in chosen.values() if p.task == task]
        for rival in rivals_of(own, args.rivals, args.leave_out, args):
            there = reported.get((task, rival.label))
            if there is None:
                continue
            found = answer_to(rival, own, reported, args)
            cells = [task, rival.label, f"{there.share:.3f}", f"{there.passes:.2f}"]
            if found is None:
                yield [*cells, "none", "-", "-", "-", "-"]
                continue
            here = reported[task, found.label]
            yield [
                *cells,
                here.label,
                f"{here.share:.3f}",
                f"{mcnemar(here.valid, there.valid)[2]:.2g}",
                f"{here.passes / there.passes:.2f}",
                f"{here.rows / there.rows:.2f}",
            ]


def main() -> None:
    """Print the table."""

    def names(text: str) -> list[str]:
        return text.split(",") if text else []

    parser = argparse.ArgumentParser(description="A policy against its rivals, share by share.")
    parser.add_argument("--cells", type=Path, required=True, help="reported from")
    parser.add_argument("--chosen-on", type=Path, required=True, help="other items")
    parser.add_argument("--policy", default="joint")
    parser.add_argument("--having", type=names, default=[], help="words of its settings")
    parser.add_argument("--rivals", type=names, default=[], help="default: all others")
    parser.add_argument("--leave-out", type=names, default=["joint", "boe"], help="of the others")
    parser.add_argument("--cost", choices=("passes", "rows"), default="rows")
    parser.add_argument("--passes", type=float, default=math.inf, help="most, over the rival's")
    parser.add_argument("--within", type=float, default=0.0, help="less of the share, at most")
    parser.add_argument("--least", type=float, default=0.9, help="of one token a step's share")
    args = parser.parse_args()
    head = [
        "task",
        "rival",
        "share",
        "passes",
        args.policy,
        "share",
        "p",
        "passes over",
        "rows over",
    ]
    print("| " + " | ".join(head) + " |\n|" + " --- |" * len(head))
    for row in lines(args):
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
