"""Score against cost, per task and policy (the paper's Figure 4), with 95 % intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from boe_vllm.lab.eval.tables import Row
from boe_vllm.lab.pictures import figure

COSTS = {
    "forwards": "network function evaluations (forwards per item)",
    "rows": "rows through the network, forward and backward, per item",
}
"""Columns of the table. A forward over a few rows counts as one, hence the rows beside it."""
LADDER = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)


def draw(panels: Mapping[str, Sequence[Row]], cost: str) -> Figure:
    """One panel per task; a line per policy, a point per rate.

    Args:
        panels: rows by title, judged ones.
        cost: one of `COSTS`.
    """
    labels = list(dict.fromkeys(row["policy"] for rows in panels.values() for row in rows))
    with figure.style():
        made = Figure(figsize=(max(4.6, 3.7 * len(panels)), 4.3), layout="constrained")
        axes = made.subplots(1, len(panels), squeeze=False)[0]
        for axis, (title, rows) in zip(axes, panels.items(), strict=True):
            axis.set_title(title)
            for number, label in enumerate(labels):
                own = [row for row in rows if row["policy"] == label and row[cost]]
                if own:
                    _curve(
                        axis,
                        sorted(own, key=lambda row: row["tokens_per_step"]),
                        label,
                        number,
                        cost,
                    )
            scale(axis)
        axes[0].set_ylabel("score (%), 95 % interval")
        made.supxlabel(COSTS[cost], fontsize=10)
        handles, names = _keys(axes)
        made.legend(handles, names, loc="outside upper center", ncols=min(len(names), 4))
    return made


def _curve(axis: Axes, rows: Sequence[Row], label: str, number: int, cost: str) -> None:
    score = [100 * row["score"] for row in rows]
    below = [100 * max(0.0, row["score"] - row["low"]) for row in rows]
    above = [100 * max(0.0, row["high"] - row["score"]) for row in rows]
    axis.errorbar(
        [row[cost] for row in rows],
        score,
        yerr=[below, above],
        label=label,
        color=figure.PALETTE[number % len(figure.PALETTE)],
        marker=figure.MARKERS[number % len(figure.MARKERS)],
        linestyle=figure.LINES[number % len(figure.LINES)],
        # Later ones are smaller: points that coincide stay to be seen.
        markersize=max(4.0, 8.5 - number),
        linewidth=max(1.2, 2.4 - 0.25 * number),
        elinewidth=0.9,
        capsize=2.5,
    )


def scale(axis: Axes) -> None:
    """A logarithmic cost with plain numbers, and shares within 0 to 102."""
    axis.set_xscale("log")
    axis.set_ylim(bottom=max(0.0, axis.get_ylim()[0]), top=min(102.0, axis.get_ylim()[1]))
    low, high = axis.get_xlim()
    steps = LADDER if high / low < 30 else (1.0, 3.0)
    axis.xaxis.set_major_locator(LogLocator(subs=steps))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _short(x)))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _short(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"


def _keys(axes: Sequence[Axes]) -> tuple[list, list[str]]:
    """Every policy once, whatever panel it is in."""
    found: dict[str, object] = {}
    for axis in axes:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    return list(found.values()), list(found)
