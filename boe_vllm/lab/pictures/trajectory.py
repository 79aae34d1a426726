"""What one request did, step by step, under one or more policies; as JSON.

Legend: `N` canvas positions, `M` masked positions of the block, `k` most likely tokens.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

FORMAT = 1
"""Of the JSON; raised when older readers would misread it."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One denoising step. Positions count from the start of the canvas, entropies are in nats."""

    tokens: list[int]
    """[N] the canvas before the step, the mask token where nothing is written."""
    positions: list[int]
    """[M] masked positions that might be written, ascending."""
    entropy: list[float]
    """[M] of the predictions there."""
    confidence: list[float]
    """[M] probability of the token that would be written."""
    top_tokens: list[list[int]]
    """[M, k] most likely tokens, best first."""
    top_probabilities: list[list[float]]
    """[M, k]"""
    scores: list[float | None] | None
    """[M] what the policy ranked by, None where it ruled a position out; None if it ranks by
    nothing."""
    committed: list[int]
    """Positions that the step wrote, the best first."""
    remasked: list[int]
    """Positions that it masked again, ascending."""
    forwards: int
    """Of the network, up to and with this step."""
    backwards: int
    influence: list[list[float]] | None = None
    """[M, M] see `boe_vllm.lab.pictures.influence`; None where it was not measured."""

    @property
    def remaining(self) -> float:
        """Entropy of the block's masked positions before the step, summed, nats."""
        return sum(self.entropy)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Trajectory:
    """One request under one policy."""

    label: str
    """The policy with its settings, as written on the command line."""
    steps: list[Step]
    tokens: list[int]
    """[N] the canvas at the end."""
    text: str
    """The answer."""
    valid: bool | None
    """Whether it is right; None where nothing can judge it."""

    def state(self, frame: int) -> list[int]:
        """[N] the canvas before step `frame`; after the last step, at the end."""
        return self.steps[frame].tokens if frame < len(self.steps) else self.tokens


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Recording:
    """One request under several policies, with all that is needed to show it."""

    model: str
    task: str | None
    """None for a prompt of one's own."""
    item: int | None
    """Number of the item in the task's list."""
    seed: int
    prompt: str
    width: int | None
    """Columns of the canvas, if it is a grid."""
    mask_token: int
    eos_token: int
    vocabulary: dict[int, str]
    """Texts of all tokens that occur."""
    trajectories: list[Trajectory]

    @property
    def title(self) -> str:
        """What is shown, in a line."""
        what = "a prompt" if self.task is None else f"{self.task}, item {self.item}"
        return f"{what}, seed {self.seed}, model {self.model}"

    @property
    def highest_entropy(self) -> float:
        """The largest entropy of all positions and steps, nats: the end of the colour scale."""
        entropies = [e for t in self.trajectories for step in t.steps for e in step.entropy]
        return max(entropies, default=1.0) or 1.0

    def glyph(self, token: int) -> str:
        """A token as one reads it in a cell: white space visible, nothing for the mask."""
        if token == self.mask_token:
            return ""
        if token == self.eos_token:
            return "∎"
        text = self.vocabulary[token]
        return text.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣") or "·"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    def write(self, path: Path) -> None:
        """As a JSON file; parents are made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.as_dict(), ensure_ascii=False, allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")


def read(path: Path) -> Recording:
    """A recording that `Recording.write` wrote.

    Raises:
        ValueError: for a file that is none.
    """
    remedy = "name a file that `boe-vllm watch --json` wrote"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"recording: expected a file, got {path}; {remedy}") from None
    except ValueError as error:
        raise ValueError(f"recording: expected JSON in {path}, got {error}; {remedy}") from None
    if not isinstance(raw, dict) or raw.pop("format", None) != FORMAT:
        raise ValueError(f"recording: expected format {FORMAT}, got {path} without it; {remedy}")
    try:
        raw["vocabulary"] = {int(token): text for token, text in raw["vocabulary"].items()}
        raw["trajectories"] = [
            Trajectory(**{**entry, "steps": [Step(**step) for step in entry["steps"]]})
            for entry in raw["trajectories"]
        ]
        return Recording(**raw)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"recording: expected the fields of a recording in {path}, got {error}; {remedy}"
        ) from None
