"""What the engine knows about a request: everything it asked for, resolved once at admission.

The API server makes a `ResolvedRequest` of what a request says (`resolve`); it travels with the
request as plain values, and the scheduler and the model runner read it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from boe_vllm.base import options
from boe_vllm.policies import Policy, PolicyConfig, load_policy
from boe_vllm.policies.choices import ChoicesPolicy
from boe_vllm.request.config import CHOICES, FrameConfig, SamplerConfig, ServerConfig
from boe_vllm.request.given_text import GivenText
from boe_vllm.request.plan import CanvasPlan
from boe_vllm.sampling.automaton import TokenAutomaton
from boe_vllm.sampling.constraints import Constraint, TokenConstraints


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
        wire["constraints"] = None if constraints is None else _constraints_to_wire(constraints)
        return wire

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> ResolvedRequest:
        """Read what `to_wire` wrote."""
        configs: dict[str, Any] = {
            name: None if wire[name] is None else options.restore(kind, wire[name])
            for name, kind in _CONFIGS.items()
        }
        settings_class = _settings_class(wire["policy"])
        return cls(
            config=SamplerConfig(
                policy=wire["policy"],
                **configs,
                settings=options.restore(settings_class, wire["settings"]),
            ),
            plan=CanvasPlan(**wire["plan"]),
            constraints=_constraints_from_wire(wire["constraints"]),
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


def _to_plain(value: Any) -> Any:
    """Arrays and tuples as lists, at any depth."""
    if isinstance(value, dict):
        return {key: _to_plain(part) for key, part in value.items()}
    if isinstance(value, tuple):
        return [_to_plain(part) for part in value]
    return value.tolist() if isinstance(value, np.ndarray) else value


def _constraints_to_wire(constraints: TokenConstraints) -> dict[str, Any]:
    plain = dataclasses.asdict(dataclasses.replace(constraints, grammar=None))
    grammar = constraints.grammar
    return _to_plain(plain) | {"grammar": None if grammar is None else grammar.to_text()}


def _constraints_from_wire(wire: Mapping[str, Any] | None) -> TokenConstraints | None:
    if wire is None:
        return None
    grammar, everywhere = wire["grammar"], dict(wire["everywhere"])
    for name, value in everywhere.items():
        if name.endswith("_token_ids") and value is not None:
            everywhere[name] = np.array(value, np.int64)
    everywhere["logit_bias"] = np.array(everywhere["logit_bias"], np.float64)
    return TokenConstraints(
        everywhere=Constraint(**everywhere),
        min_tokens=wire["min_tokens"],
        stop_token_ids=tuple(wire["stop_token_ids"]),
        bad_words=tuple(tuple(word) for word in wire["bad_words"]),
        prefix_grammar=wire["prefix_grammar"],
        prefix_end=None if wire["prefix_end"] is None else tuple(wire["prefix_end"]),
        grammar=None if grammar is None else TokenAutomaton.from_text(grammar),
    )
