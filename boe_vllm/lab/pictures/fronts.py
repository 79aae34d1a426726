"""Pareto fronts of finished cells: share of right answers against passes, rows and predicted time.

A cell is on a front where no other of its task has at least its share for at most its cost. Each
policy's setting is chosen on one file of cells and reported from another, of other items.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from boe_vllm.lab.bench import answers
from boe_vllm.lab.bench.ceilings import H100
from boe_vllm.lab.bench.costs import Network
from boe_vllm.lab.bench.predict import MODELS
from boe_vllm.lab.eval.cell_file import FinishedCell
from boe_vllm.lab.eval.statistics import mcnemar, wilson
from boe_vllm.lab.pictures import figure
from boe_vllm.lab.pictures.curves import scale

Cost = Literal["passes", "rows", "ms-1", "ms-25"]
COSTS: dict[Cost, str] = {
    "passes": "passes per item, forward and backward; one over a few rows counts as one",
    "rows": "rows through the network, forward and backward, per item",
    "ms-1": "predicted milliseconds an answer, LLaDA-8B's weights on an H100, one request",
    "ms-25": "predicted milliseconds an answer, LLaDA-8B's weights on an H100, 25 requests",
}
REQUESTS: dict[Cost, int] = {"ms-1": 1, "ms-25": 25}
"""Requests that share the steps of a predicted time."""
TAKEN_IN = f"""\
ms-1 and ms-25 are predicted, not measured: milliseconds an answer with the weights of LLaDA-8B on
an {H100.name}, at 1 and at 25 requests at a time (the time of all steps over the requests), by the
cost model of `boe-vllm bench predict` from each cell's steps, passes and rows. Taken in: in each
step a pass over the whole sequence, the further passes with the rows that are left, the
vocabulary's products, launches, and a blocking copy for each pass. Left out: attention and
distributions that a policy reads beside its passes, that a batch is not always full, and the server
around it. A task without `confidence` at one token a step has no such time."""
"""What is said beside the table."""
LLADA_8B = Network.of(MODELS["llada-8b"])
NEAR = 0.98
"""Part of the sequential policy's share that a chosen setting reaches where it is chosen."""
SEQUENTIAL = "confidence"
MOST_COLUMNS = 3
"""Panels side by side."""
DRAWN = 0.6
"""Part of a task's best share below which a point is not drawn."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One setting of one policy on one task."""

    task: str
    policy: str
    """Its name without settings."""
    label: str
    """With settings, and tokens a step where the schedule decides."""
    valid: Sequence[bool]
    passes: float
    """Per item."""
    rows: float
    """Per item."""
    milliseconds: Mapping[Cost, float]
    """Predicted, by the costs of `REQUESTS`; empty where nothing can be."""

    @property
    def share(self) -> float:
        """Of right answers."""
        return sum(self.valid) / len(self.valid)

    def cost(self, name: Cost) -> float:
        """Per item."""
        if name in REQUESTS:
            return self.milliseconds[name]
        return self.passes if name == "passes" else self.rows

    @property
    def costs(self) -> tuple[Cost, ...]:
        """Those that are known."""
        return tuple(name for name in COSTS if name not in REQUESTS or name in self.milliseconds)


def points(cells: Iterable[FinishedCell]) -> list[Point]:
    """The newest cell of every name, in the file's order."""
    newest = {cell.key: cell for cell in cells}
    canvases = answers.canvases(newest.values())
    found = []
    for cell in newest.values():
        policy = cell.contestant.partition(":")[0].partition(" ")[0]
        paced = cell.contestant == SEQUENTIAL or cell.tokens_per_step > 1
        found.append(
            Point(
                task=cell.task,
                policy=policy,
                label=cell.contestant + (f", {cell.tokens_per_step} a step" if paced else ""),
                valid=cell.valid,
                passes=cell.forwards + cell.backwards,
                rows=cell.rows,
                milliseconds=_predicted(cell, canvases.get(cell.task)),
            )
        )
    return found


def _predicted(cell: FinishedCell, canvas: answers.Canvas | None) -> dict[Cost, float]:
    found: dict[Cost, float] = {}
    for cost, requests in REQUESTS.items():
        if canvas is not None:
            time = answers.milliseconds(cell, canvas, requests, LLADA_8B, H100)
            if time is not None:
                found[cost] = time
    return found


def front(own: Sequence[Point], cost: Cost) -> list[Point]:
    """The points of one task that no other beats, cheapest first; of those that have the cost."""
    kept = []
    best = -1.0
    for point in sorted(
        (p for p in own if cost in p.costs), key=lambda p: (p.cost(cost), -p.share)
    ):
        if point.share > best:
            kept.append(point)
            best = point.share
    return kept


def choose(selection: Sequence[Point], cost: Cost) -> dict[tuple[str, str], str]:
    """(task, policy) -> the label of the cheapest setting that reaches `NEAR` of what one token a
    step reaches on the same items, else of the one with the largest share."""
    chosen = {}
    for task in dict.fromkeys(p.task for p in selection):
        own = [p for p in selection if p.task == task]
        target = NEAR * max(
            (p.share for p in own if p.label == f"{SEQUENTIAL}, 1 a step"), default=1
        )
        for policy in dict.fromkeys(p.policy for p in own):
            settings = [p for p in own if p.policy == policy]
            enough = [p for p in settings if p.share >= target]
            best = (
                min(enough, key=lambda p: p.cost(cost))
                if enough
                else max(settings, key=lambda p: p.share)
            )
            chosen[task, policy] = best.label
    return chosen


def table(
    own: Sequence[Point], chosen: Mapping[tuple[str, str], str] | None = None
) -> list[dict[str, Any]]:
    """One row per point: share with its interval, costs, what front it is on, and the exact McNemar
    p against one token a step.

    Args:
        own: of any tasks.
        chosen: from `choose`, marked; None for no mark.
    """
    rows = []
    for task in dict.fromkeys(p.task for p in own):
        of_task = [p for p in own if p.task == task]
        on = {cost: {p.label for p in front(of_task, cost)} for cost in COSTS}
        one = next((p for p in of_task if p.label == f"{SEQUENTIAL}, 1 a step"), None)
        for p in of_task:
            low, high = wilson(sum(p.valid), len(p.valid))
            against = None if one is None or len(one.valid) != len(p.valid) else one.valid
            rows.append(
                {
                    "task": task,
                    "policy": p.label,
                    "n": len(p.valid),
                    "share": f"{p.share:.3f}",
                    "95 % interval": f"{low:.3f} to {high:.3f}",
                    "passes": f"{p.passes:.2f}",
                    "rows": f"{p.rows:.0f}",
                }
                | {cost: f"{p.cost(cost):.1f}" if cost in p.costs else "-" for cost in REQUESTS}
                | {
                    "front": ", ".join(cost for cost in COSTS if p.label in on[cost]) or "-",
                    "p, one a step": f"{mcnemar(p.valid, against)[2]:.2g}" if against else "-",
                }
                | (
                    {}
                    if chosen is None
                    else {"chosen": "yes" if chosen.get((task, p.policy)) == p.label else ""}
                )
            )
    return rows


def draw(own: Sequence[Point], cost: Cost) -> Figure:
    """One panel per task, a few side by side; a colour and a mark per policy, a point per setting,
    the front as a line. Points on it have their intervals, the others are pale. Points without the
    cost are left out, and those of less than `DRAWN` of the best share.

    Raises:
        ValueError: when no point has it.
    """
    own = [p for p in own if cost in p.costs]
    best = {p.task: max(q.share for q in own if q.task == p.task) for p in own}
    own = [p for p in own if p.share >= DRAWN * best[p.task]]
    if not own:
        raise ValueError(f"cost: expected one that some point has, got {cost!r}; name another")
    tasks = list(dict.fromkeys(p.task for p in own))
    policies = list(dict.fromkeys(p.policy for p in own))
    with figure.style():
        columns = min(len(tasks), MOST_COLUMNS)
        lines = -(-len(tasks) // columns)
        size = (max(4.6, 3.9 * columns), 0.9 + 3.6 * lines)
        made = Figure(figsize=size, layout="constrained")
        grid = made.subplots(lines, columns, squeeze=False)
        axes = list(grid.flat)
        for unused in axes[len(tasks) :]:
            unused.remove()
        for axis, task in zip(axes, tasks, strict=False):
            axis.set_title(task)
            _panel(axis, [p for p in own if p.task == task], policies, cost)
            scale(axis)
        made.supylabel("right answers (%), 95 % interval", fontsize=10)
        made.supxlabel(COSTS[cost], fontsize=10)
        keys: dict[str, Any] = {}
        for axis in axes[: len(tasks)]:
            for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
                keys.setdefault(name, handle)
        made.legend(
            list(keys.values()), list(keys), loc="outside upper center", ncols=min(len(keys), 8)
        )
    return made


def _panel(axis: Axes, own: Sequence[Point], policies: Sequence[str], cost: Cost) -> None:
    best = front(own, cost)
    axis.plot(
        [p.cost(cost) for p in best],
        [100 * p.share for p in best],
        drawstyle="steps-post",
        color="#999999",
        linewidth=1.0,
        label="front",
        zorder=1,
    )
    for number, policy in enumerate(policies):
        turn = number // len(figure.PALETTE)  # colours come again, with other marks
        look: dict[str, Any] = {
            "color": figure.PALETTE[number % len(figure.PALETTE)],
            "marker": figure.MARKERS[(number + turn) % len(figure.MARKERS)],
            "linestyle": "none",
        }
        mine = [p for p in own if p.policy == policy]
        x, y = [p.cost(cost) for p in mine], [100 * p.share for p in mine]
        axis.plot(x, y, label=policy, markersize=5, alpha=0.35, zorder=2, **look)
        _marked(axis, [p for p in mine if p in best], cost, look)


def _marked(axis: Axes, mine: Sequence[Point], cost: Cost, look: Mapping[str, Any]) -> None:
    """Points on the front, with their intervals."""
    if not mine:
        return
    ends = [wilson(sum(p.valid), len(p.valid)) for p in mine]
    below = [100 * max(0.0, p.share - low) for p, (low, _) in zip(mine, ends, strict=True)]
    above = [100 * max(0.0, high - p.share) for p, (_, high) in zip(mine, ends, strict=True)]
    axis.errorbar(
        [p.cost(cost) for p in mine],
        [100 * p.share for p in mine],
        yerr=[below, above],
        markersize=7,
        elinewidth=0.6,
        capsize=2,
        zorder=3,
        **look,
    )
