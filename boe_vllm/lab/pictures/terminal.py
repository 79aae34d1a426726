"""A request in the terminal: canvases side by side, masks in the colour of their entropy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from boe_vllm.lab.pictures import figure
from boe_vllm.lab.pictures.trajectory import Recording, Trajectory

WRAP = 32
"""Positions in a row of a canvas that is no grid."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """What all frames of one recording share."""

    recording: Recording
    highest: float
    """Entropy at the end of the colour scale, nats."""
    scale: list[str] = dataclasses.field(default_factory=figure.entropy_scale)

    def render(self, frame: int) -> RenderableType:
        """All policies before step `frame`; those that are done stay as they ended."""
        return Group(
            Text(self.recording.title),
            Columns([self._panel(t, frame) for t in self.recording.trajectories], padding=(0, 1)),
            self._legend(),
        )

    def _panel(self, trajectory: Trajectory, frame: int) -> Panel:
        frame = min(frame, len(trajectory.steps))
        body = Group(self.canvas(trajectory, frame), Text(), *map(Text, facts(trajectory, frame)))
        return Panel(body, title=trajectory.label, expand=False)

    def canvas(self, trajectory: Trajectory, frame: int) -> Text:
        """The canvas, row by row."""
        entropy: dict[int, float] = {}
        new: set[int] = set()
        if frame < len(trajectory.steps):
            step = trajectory.steps[frame]
            entropy = dict(zip(step.positions, step.entropy, strict=True))
        if 0 < frame <= len(trajectory.steps):
            new = set(trajectory.steps[frame - 1].committed)
        text = Text()
        width = self.recording.width or WRAP
        for place, token in enumerate(trajectory.state(frame)):
            if place and place % width == 0:
                text.append("\n")
            text.append(*self._cell(token, entropy.get(place), place in new))
        return text

    def _cell(self, token: int, entropy: float | None, new: bool) -> tuple[str, str]:
        recording = self.recording
        spaced = f" {recording.glyph(token)} " if recording.width else recording.glyph(token)
        if token != recording.mask_token:
            return spaced, "bold reverse" if new else ""
        hole = " · " if recording.width else "·"
        if entropy is None:
            return hole, "dim"
        colour = figure.shade(entropy, self.highest, self.scale)
        return hole, f"{figure.ink(colour)} on {colour}"

    def _legend(self) -> Text:
        text = Text("entropy 0 ")
        for colour in self.scale[:: len(self.scale) // 16]:
            text.append(" ", f"on {colour}")
        return text.append(f" {self.highest:.2f} nats; reversed: written in the last step")


def facts(trajectory: Trajectory, frame: int) -> list[str]:
    """Where a trajectory stands before step `frame`, in lines."""
    steps: Sequence = trajectory.steps
    done = steps[frame - 1] if frame else None
    left = steps[frame].remaining if frame < len(steps) else 0.0
    lines = [
        f"step {frame}",
        f"forwards {done.forwards if done else 0}, backwards {done.backwards if done else 0}",
        f"remaining entropy {left:.2f} nats",
    ]
    return [*lines, verdict(trajectory)] if frame == len(steps) and frame else lines


def verdict(trajectory: Trajectory) -> str:
    """The judgement of an answer, in words."""
    return {True: "answer valid", False: "answer not valid", None: "answer not judged"}[
        trajectory.valid
    ]


def plain(recording: Recording) -> str:
    """The end of a recording as text without colours."""
    parts = [recording.title]
    width = recording.width or WRAP
    for trajectory in recording.trajectories:
        glyphs = [recording.glyph(token) or "·" for token in trajectory.tokens]
        joint = " " if recording.width else ""
        rows = [joint.join(glyphs[n : n + width]) for n in range(0, len(glyphs), width)]
        parts += ["", trajectory.label, *rows, *facts(trajectory, len(trajectory.steps))]
    return "\n".join(parts)
