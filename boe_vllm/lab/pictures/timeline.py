"""A trajectory as a figure (the paper's Figures 1 and 2): positions down, steps across.

A masked position has the colour of its entropy, a written one none. The step that writes a position
bears its number in the order of writing; what is masked again is crossed out. Below, what entropy
is left.
"""

from __future__ import annotations

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from boe_vllm.lab.pictures import figure
from boe_vllm.lab.pictures.trajectory import Recording, Trajectory

CELL = 0.2
"""Inches of a position and of a step."""
NARROWEST = 3.6
"""Inches of a panel."""


def draw(recording: Recording) -> Figure:
    """The figure; one column per policy."""
    count = len(recording.trajectories)
    steps = max(len(t.steps) for t in recording.trajectories)
    positions = len(recording.trajectories[0].tokens)
    wide = max(NARROWEST, CELL * steps)
    high = max(2.0, CELL * positions)
    with figure.style():
        made = Figure(figsize=(count * (wide + 0.7) + 0.9, high + 3.1), layout="constrained")
        axes = made.subplots(
            2, count, squeeze=False, sharex=True, gridspec_kw={"height_ratios": [high, 1.5]}
        )
        colours = ScalarMappable(Normalize(0, recording.highest_entropy), colormaps[figure.ENTROPY])
        for trajectory, column in zip(recording.trajectories, axes.T, strict=True):
            _canvas(column[0], recording, trajectory, colours)
            _remaining(column[1], recording, trajectory)
        for axis in axes[0, 1:]:
            axis.set_ylabel("")
        for axis in axes[1, 1:]:
            axis.set_ylabel("")
        made.colorbar(colours, ax=axes[0, :], label="entropy of a masked position (nats)", pad=0.02)
        key = "numbers: order of writing; right of each row: what is written at the end"
        made.suptitle(f"{recording.title}\n{key}", fontsize=10)
    return made


def _canvas(
    axis: Axes, recording: Recording, trajectory: Trajectory, colours: ScalarMappable
) -> None:
    length, steps = len(trajectory.tokens), len(trajectory.steps)
    image = np.empty((length, steps, 3))
    image[:] = np.array([int(figure.WRITTEN[n : n + 2], 16) for n in (1, 3, 5)]) / 255
    small = 6.5 if length * steps > 400 else 7.5
    order, highest, scale = 0, recording.highest_entropy, figure.entropy_scale()
    for column, step in enumerate(trajectory.steps):
        masked = [p for p, token in enumerate(step.tokens) if token == recording.mask_token]
        image[masked, column] = 0.82  # of a later block: not predicted yet
        image[step.positions, column] = colours.to_rgba(np.array(step.entropy))[:, :3]
        entropy = dict(zip(step.positions, step.entropy, strict=True))
        for position in step.committed:
            order += 1
            background = figure.shade(entropy.get(position, 0.0), highest, scale)
            axis.text(
                column,
                position,
                str(order),
                ha="center",
                va="center",
                fontsize=small,
                fontweight="bold",
                color=figure.ink(background),
                gid="commit",
            )
        for position in step.remasked:
            axis.text(
                column, position, "×", ha="center", va="center", color="#b00020", gid="remask"
            )
    axis.imshow(image, aspect="auto", interpolation="nearest")
    axis.set_xticks(np.arange(-0.5, steps), minor=True)
    axis.set_yticks(np.arange(-0.5, length), minor=True)
    axis.grid(False)
    axis.grid(which="minor", color="white", linewidth=0.6)
    axis.tick_params(which="minor", length=0)
    axis.tick_params(labelbottom=True)
    every = recording.width or 8
    axis.set_yticks(range(0, length, every))
    axis.set_ylabel("canvas position")
    axis.set_title(f"{trajectory.label}\n{_facts(trajectory)}")
    answer = axis.secondary_yaxis("right")
    answer.set_yticks(range(length), [recording.glyph(token) for token in trajectory.tokens])
    answer.tick_params(length=0, labelsize=7, pad=1)
    answer.spines["right"].set_visible(False)


def _remaining(axis: Axes, recording: Recording, trajectory: Trajectory) -> None:
    left = [step.remaining for step in trajectory.steps]
    axis.plot(range(len(left)), left, color=figure.PALETTE[0], marker="o", markersize=3)
    axis.set_ylim(0, 1.08 * max(s.remaining for t in recording.trajectories for s in t.steps))
    axis.set_xlabel("denoising step")
    axis.set_ylabel("remaining\nentropy (nats)")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.tick_params(which="minor", length=0)


def _facts(trajectory: Trajectory) -> str:
    """Cost and judgement, in a line."""
    last = trajectory.steps[-1]
    verdict = {True: ", valid", False: ", not valid", None: ""}[trajectory.valid]
    backwards = f", {last.backwards} backwards" if last.backwards else ""
    return f"{len(trajectory.steps)} steps, {last.forwards} forwards{backwards}{verdict}"
