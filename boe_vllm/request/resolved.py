"""What the engine knows about a request: everything it asked for, resolved once at admission.

The API server makes a `ResolvedRequest` of what a request says (`resolve`); it travels with the
request as plain values, and the scheduler and the model runner read it. The plan of its canvas is
numbers: its length, its blocks, and the tokens due in each step.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from boe_vllm.base import options
from boe_vllm.policies import Policy, PolicyConfig, load_policy
from boe_vllm.policies.choices import ChoicesPolicy
from boe_vllm.request.config import CHOICES, FrameConfig, SamplerConfig, Schedule, ServerConfig
from boe_vllm.request.given_text import GivenText
from boe_vllm.sampling.constraints import TokenConstraints

DEFAULT_BLOCK_LENGTH = 32
DEFAULT_TOKENS_PER_STEP = 1

# The cosine of a third of a right angle and the like come out a little off: a count that is whole
# must not be rounded up to the next.
_ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CanvasPlan:
    """The shape of one request's canvas, in tokens and steps."""

    gen_length: int
    """Positions appended to the prompt."""
    block_length: int
    """Positions per block; the last block may be shorter where the context ends."""
    steps_per_block: int | None
    """Steps of each block if `steps` was given."""
    tokens_per_step: int
    """Tokens per step otherwise."""

    def steps_for(self, masked: int) -> int:
        """Denoising steps of a block that starts with `masked` masked positions."""
        return self.steps_per_block or -(-masked // self.tokens_per_step)

    def masks_by_block(self, texts: Sequence[int], infill: int) -> list[int]:
        """Masked positions of each block that has any, before the request's first step.

        Args:
            texts: positions of the canvas that hold given text, counted from 0.
            infill: masks in the prompt, which are written with the first block.
        """
        blocks = -(-self.gen_length // self.block_length)
        masks = [self.block_length] * blocks
        masks[-1] = self.gen_length - (blocks - 1) * self.block_length
        for position in texts:
            masks[position // self.block_length] -= 1
        masks[0] += infill
        return [number for number in masks if number]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedRequest:
    """What a request asked for, checked. Nobody downstream parses, plans or checks it again."""

    config: SamplerConfig
    """The policy, its settings, the frame, and the given text in tokens."""
    plan: CanvasPlan
    """The shape of the canvas."""
    temperature: float
    """0 writes the argmax, otherwise samples from softmax(logits / temperature)."""
    seed: int
    """Of every random number of the request."""
    logprobs: bool = False
    """Whether log-probabilities are reported at all."""
    top_logprobs: int = 0
    """Log-probabilities to report per token, beside its own."""
    constraints: TokenConstraints | None = None
    """What may be written at every position; None for anything."""
    prompt_len: int = 0
    """Tokens of the prompt."""
    max_tokens: int = 0
    """Tokens of the canvas that are sent at most."""
    text_end: int = 0
    """Canvas positions up to the end of the last given text: nothing ends the request in them."""
    rows: int = 0
    """Rows that one denoising step computes, its look-ahead left out."""
    rows_ahead: int = 0
    """Most rows that the policy's queries compute in one step."""

    @property
    def logprobs_per_row(self) -> int:
        """Most likely tokens that a pass must report per row; 0 if no log-probabilities are."""
        return self.logprobs * max(1, self.top_logprobs)

    @property
    def constrained(self) -> bool:
        """Whether something may not be written, or not everywhere, but the mask token."""
        frame = self.config.frame
        special = frame.logits_eos_inf or frame.confidence_eos_eot_inf
        return self.constraints is not None or special

    def policy(self, eos_token_id: int) -> Policy:
        """What decodes the request.

        Args:
            eos_token_id: what stands behind a chosen answer.
        """
        given = self.config.given_text
        answers = None if given is None else given.answers()
        if answers is not None:
            # The filters of the request's samples restrict the draw among the answers.
            rule = (self.constraints or TokenConstraints()).everywhere
            return ChoicesPolicy(answers, eos_token_id, rule)
        return load_policy(self.config.policy)(self.config.settings)

    def to_wire(self) -> dict[str, Any]:
        """The same as values that JSON and MessagePack know."""
        wire = {name: getattr(self, name) for name in _PLAIN}
        wire["policy"] = self.config.policy
        for name in (*_CONFIGS, "settings"):
            part = getattr(self.config, name)
            wire[name] = None if part is None else dataclasses.asdict(part)
        wire["plan"] = dataclasses.asdict(self.plan)
        constraints = self.constraints
        wire["constraints"] = None if constraints is None else constraints.to_wire()
        return wire

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> ResolvedRequest:
        """Read what `to_wire` wrote."""
        configs: dict[str, Any] = {
            name: None if wire[name] is None else options.restore(kind, wire[name])
            for name, kind in _CONFIGS.items()
        }
        settings_class, asked = _settings_class(wire["policy"]), wire["constraints"]
        return cls(
            config=SamplerConfig(
                policy=wire["policy"],
                **configs,
                settings=options.restore(settings_class, wire["settings"]),
            ),
            plan=CanvasPlan(**wire["plan"]),
            constraints=None if asked is None else TokenConstraints.from_wire(asked),
            **{name: wire[name] for name in _PLAIN},
        )


_CONFIGS = {"frame": FrameConfig, "server": ServerConfig, "given_text": GivenText}
_NOT_PLAIN = ("config", "plan", "constraints")
_PLAIN = [
    field.name for field in dataclasses.fields(ResolvedRequest) if field.name not in _NOT_PLAIN
]


def _settings_class(policy: str) -> type[PolicyConfig]:
    if policy == CHOICES:
        from boe_vllm.policies.choices import ChoicesConfig  # which brings torch

        return ChoicesConfig
    return load_policy(policy).Config


# ---- the canvas ----------------------------------------------------------------------------------


def plan_canvas(
    config: SamplerConfig, *, prompt_len: int, max_tokens: int, max_model_len: int
) -> CanvasPlan:
    """Fix the canvas of one request.

    Args:
        config: the request's settings; its given text is in tokens.
        prompt_len: tokens of the prompt.
        max_tokens: the request's `max_tokens`.
        max_model_len: tokens that the model's context holds.

    Raises:
        ValueError: when lengths or steps do not divide, or the canvas does not fit.
    """
    frame, given = config.frame, config.given_text
    room = max_model_len - prompt_len
    length, source = (given.length, given.source) if given else (max_tokens, "max_tokens")
    wanted = frame.gen_length or length
    source = "gen_length" if frame.gen_length else source
    if given and wanted < length:
        raise ValueError(
            f"gen_length: expected at least the {length} tokens of canvas_template, got "
            f"{wanted}; raise or remove it"
        )
    if wanted > room:
        raise ValueError(
            f"{source}: expected a canvas of at most {room} tokens (context of {max_model_len} "
            f"less a prompt of {prompt_len}), got {wanted}; lower {source!r} or shorten the prompt"
        )
    if source == "choices":
        block = wanted
    elif frame.block_length is not None:
        block = min(frame.block_length, wanted)  # a longer one would add tokens nobody asked for
    else:
        block = min(DEFAULT_BLOCK_LENGTH, wanted)
        if source != "max_tokens" and wanted % block:
            block = wanted
    # A template is as long as it is, whatever its blocks.
    room = wanted if source == "canvas_template" else room
    # Rounding up may not push a canvas that fits out of the context: the last block is cut there.
    gen_length = min(-(-wanted // block) * block, room)
    steps_per_block = None
    if frame.steps is not None:
        blocks = -(-gen_length // block)
        options.must_divide("steps", frame.steps, "number of blocks", blocks)
        steps_per_block = frame.steps // blocks
    return CanvasPlan(
        gen_length=gen_length,
        block_length=block,
        steps_per_block=steps_per_block,
        tokens_per_step=frame.tokens_per_step or DEFAULT_TOKENS_PER_STEP,
    )


def tokens_due(schedule: Schedule, *, masks: int, steps: int, step: int, written: int) -> int:
    """Tokens due in a step, at least one.

    "linear" (ML-GSAI/LLaDA `get_num_transfer_tokens`): `masks // steps`, and one more in each of
    the first `masks % steps` steps. "cosine" (MaskGIT, Chang et al. 2022): few at first, many at
    last, `ceil(masks (1 - cos(pi i / (2 steps))))` written after step `i` of the block. What
    earlier steps left unwritten is due as well, but never more than in the largest step.

    Args:
        schedule: the kind.
        masks: masked positions at the start of the block.
        steps: steps planned for the block.
        step: steps done so far.
        written: positions written so far.
    """
    if schedule == "linear":
        return max(1, masks // steps + (step < masks % steps))
    due = _written_after(step + 1, masks, steps) - written
    return max(1, min(due, most_tokens_due(schedule, masks=masks, steps=steps)))


@functools.lru_cache(maxsize=256)
def most_tokens_due(schedule: Schedule, *, masks: int, steps: int) -> int:
    """Tokens due in that step of a block in which most are."""
    if schedule == "linear":
        return -(-masks // steps)
    counts = [_written_after(step, masks, steps) for step in range(steps + 1)]
    return max(1, *(after - before for before, after in itertools.pairwise(counts)))


def _written_after(steps_done: int, masks: int, steps: int) -> int:
    share = 1.0 - math.cos(math.pi / 2 * min(steps_done, steps) / steps)
    return math.ceil(masks * share - _ROUNDING)
