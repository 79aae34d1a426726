"""Scores and engine times of variants as bars, per task (the paper's Table 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from boe_vllm.lab.eval.tables import Row
from boe_vllm.lab.pictures import figure

FULL = "BoE (full)"
"""The variant that the others take something from; marked."""
PLAIN, MARKED = figure.PALETTE[4], figure.PALETTE[5]


def draw_scores(panels: Mapping[str, Sequence[Row]]) -> Figure:
    """Scores with 95 % intervals; `panels` are rows by title, judged ones."""
    with figure.style():
        made, axes = _panels(panels)
        for axis, (title, rows) in zip(axes, panels.items(), strict=True):
            scores = [100 * row["score"] for row in rows]
            below = [100 * max(0.0, row["score"] - row["low"]) for row in rows]
            above = [100 * max(0.0, row["high"] - row["score"]) for row in rows]
            _bars(axis, rows, scores, title, xerr=[below, above])
            ends = [score + more for score, more in zip(scores, above, strict=True)]
            _write(axis, ends, [f"{score:.1f}" for score in scores], 100.0)
            axis.set_xticks(range(0, 101, 25))
        made.supxlabel("score (%), 95 % interval", fontsize=10)
    return made


def draw_times(panels: Mapping[str, Sequence[Row]], *, shared: bool) -> Figure:
    """Seconds of the engine, and their ratio to the first variant's.

    Args:
        panels: rows by title.
        shared: whether cells ran together, so that time was shared out by rows.
    """
    with figure.style():
        made, axes = _panels(panels)
        for axis, (title, rows) in zip(axes, panels.items(), strict=True):
            seconds = [row["seconds"] for row in rows]
            _bars(axis, rows, seconds, title)
            texts = [
                f"{value:.3g} s" + (f"  ×{value / seconds[0]:.2f}" if seconds[0] else "")
                for value in seconds
            ]
            _write(axis, seconds, texts, max(seconds) or 1.0)
        how = "shared out by rows among cells that ran together" if shared else "measured"
        made.supxlabel(f"engine time (s), {how}; ratio to the first", fontsize=10)
    return made


def _panels(panels: Mapping[str, Sequence[Row]]) -> tuple[Figure, Sequence[Axes]]:
    most = max(map(len, panels.values()))
    longest = max(len(row["policy"]) for rows in panels.values() for row in rows)
    size = (3.4 * len(panels) + 0.085 * longest, 0.36 * most + 1.3)
    made = Figure(figsize=size, layout="constrained")
    labels = [[row["policy"] for row in rows] for rows in panels.values()]
    alike = all(names == labels[0] for names in labels)
    return made, made.subplots(1, len(panels), squeeze=False, sharey=alike)[0]


def _bars(
    axis: Axes, rows: Sequence[Row], values: Sequence[float], title: str, **errors: Any
) -> None:
    names = [row["policy"] for row in rows]
    drawn = axis.barh(
        range(len(rows)),
        values,
        height=0.68,
        color=[MARKED if name == FULL else PLAIN for name in names],
        error_kw={"elinewidth": 1, "capsize": 3, "ecolor": "#1a1a1a"},
        **errors,
    )
    for name, bar in zip(names, drawn, strict=True):
        if name == FULL:
            bar.set_hatch("//")
            bar.set_edgecolor("white")
    axis.set_yticks(range(len(rows)), names)
    # An inner panel that shares its axis has no labels of its own.
    for name, label in zip(names, axis.get_yticklabels(), strict=False):
        label.set_fontweight("bold" if name == FULL else "normal")
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.grid(axis="y", visible=False)
    axis.set_title(title)


def _write(axis: Axes, ends: Sequence[float], texts: Sequence[str], full: float) -> None:
    """Numbers to the right of the bars and their intervals, with room for them."""
    longest = max(map(len, texts))
    axis.set_xlim(0, max(full, *ends) * (1.04 + 0.038 * longest))
    for place, (end, text) in enumerate(zip(ends, texts, strict=True)):
        axis.annotate(
            text, (end, place), (5, 0), textcoords="offset points", va="center", fontsize=8.5
        )
